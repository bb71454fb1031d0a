"""The proof of an edited file: import it, build the model anew, load the old weights, observe, compare.

It runs in a process of its own, where the edited text stands in for the file from the start: code that
may be imported once (a registry of models, say) is imported once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bntool.core.errors import BntoolError
from bntool.core.plan import Plan
from bntool.core.sites import InsertSite
from bntool.core.verdicts import Check
from bntool.files.filling import fill
from bntool.files.references import build
from bntool.files.scripts import running_user_code, seeded
from bntool.graph.dataflow import Graph
from bntool.graph.inputs import Inputs
from bntool.inserting import InsertOptions
from bntool.observe.eager import Observation, observe
from bntool.observe.stand_in import set_modes
from bntool.runtime.torch_runner import TorchRunner
from bntool.subjects.insertion import Outline, exactly, outline, stands
from bntool.surgery.converting import convert_state_dict
from bntool.verifying.checking import seeded_batches
from bntool.verifying.reference import Reference

_CHILD = "import sys; from bntool.source.proof import child; child(*sys.argv[1:])"


@dataclasses.dataclass(frozen=True)
class Task:
    """What is to be proved, as plain data: the edited file, and what the model was before.

    `state` is the old state_dict; `batches` are inputs and `outputs` what the old model makes of them.
    """

    reference: str
    module: str
    path: str
    source: bytes
    plan: dict[str, Any]
    state: dict[str, Any]
    training: bool
    example: Inputs
    outline: Outline
    batches: list[Inputs]
    outputs: list[dict[str, Tensor]]
    threads: int


def make_task(
    reference: str,
    module: types.ModuleType,
    path: Path,
    source: bytes,
    plan: Plan,
    model: nn.Module,
    observation: Observation,
    *,
    full: bool,
) -> Task:
    """A task for `prove`: run the old model once more, with `full` on batches of 1, 2 and 3."""
    example = observation.inputs
    before = Reference(model, seeded_batches(example) if full else [example])
    return Task(
        reference=reference,
        module=module.__name__,
        path=str(path),
        source=source,
        plan=dataclasses.replace(plan, options={**plan.options, "init": "identity"}).to_dict(),
        state=dict(model.state_dict()),
        training=model.training,
        example=example,
        outline=outline(observation.graph),
        batches=list(before.inputs),
        outputs=[dict(outputs) for outputs in before.own],
        threads=torch.get_num_threads(),
    )


def prove_apart(task: Task) -> tuple[str, Check | None]:
    """`prove` in a process of its own; why it failed ("" where it holds), and the check of the outputs."""
    with tempfile.TemporaryDirectory(prefix="bntool-") as folder:
        question, answer = Path(folder, "task.pt"), Path(folder, "answer.json")
        torch.save(task, question)
        ran = subprocess.run(  # noqa: S603 - this interpreter, and files just made
            [sys.executable, "-c", _CHILD, str(question), str(answer)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        if not answer.exists():
            said = ran.stdout.decode(errors="replace").strip().splitlines() or [f"exit {ran.returncode}"]
            return f"the process that runs the new source ended: {said[-1]}", None
        found = json.loads(answer.read_text(encoding="utf-8"))
    check = found["check"]
    if check is None:
        return found["why"], None
    output, index = check["worst"]
    return found["why"], Check(**{**check, "worst": (output, tuple(index))})


def child(question: str, answer: str) -> None:
    """What the process of `prove_apart` does. The task file was written by that process's parent."""
    task: Task = torch.load(question, weights_only=False)
    torch.set_num_threads(task.threads)  # another number may sum in another order
    why, check = prove(task)
    found = {"why": why, "check": dataclasses.asdict(check) if check is not None else None}
    Path(answer).write_text(json.dumps(found), encoding="utf-8")


def prove(task: Task) -> tuple[str, Check | None]:
    """Why the edited file is not right ("" where it is), and the check of its outputs where they were run.

    The new class must take the old weights under their new names with nothing missing but the new
    layers, have each new layer where the plan says and nothing else moved, and with σ² = 1 − ε compute
    the same to the last bit in eval mode.
    """
    plan = Plan.from_dict(task.plan)
    sites = list(plan.insert_sites)
    options = InsertOptions(pooling=bool(plan.options.get("pooling")))
    try:
        with edited_module(task.module, Path(task.path), task.source):
            model = build(task.reference).model
            fill(model, convert_state_dict(task.state, plan), "the new source", "")
            set_modes(model, training=task.training)
            again = observe(model, task.example)
            missing = [
                s for s in sites if not (stands(again.graph, s, options) and _reads(again.graph, s, plan))
            ]
            if missing:
                return f"{missing[0].bn} does not stand between {missing[0].conv} and its activation", None
            if outline(again.graph, without=sites) != task.outline:
                return "the new source runs other operations than the old one", None
            runner = TorchRunner(model)
            check = exactly(task.outputs, [runner.run(inputs) for inputs in task.batches])
    except BntoolError as error:
        return f"{error.what} {error.where}".strip(), None
    return ("" if check.agrees else "the new source computes something else"), check


def _reads(graph: Graph, site: InsertSite, plan: Plan) -> bool:
    """Whether the new layer reads the very layer that the plan names, wherever that is now."""
    (norm,) = [op for op in graph.of_kind("batch_norm") if op.scope == site.bn]
    before = graph.producer(graph.input(norm))
    weight = f"{site.conv}.weight"
    return before is not None and f"{before.scope}.weight" == plan.key_map.get(weight, weight)


@contextlib.contextmanager
def edited_module(name: str, path: Path, source: bytes) -> Iterator[None]:
    """Have the module `name`, whose file is `path`, made from other source meanwhile."""
    finder = _Finder(name, path, source)
    previous = sys.modules.pop(name, None)
    root = path.parents[name.count(".")]
    sys.meta_path.insert(0, finder)
    try:
        with running_user_code(root, first=True), seeded():
            try:
                importlib.import_module(name)
            except Exception as error:
                raise BntoolError(f"importing it raised {type(error).__name__}: {error}") from error
        yield
    finally:
        sys.meta_path.remove(finder)
        sys.modules.pop(name, None)
        if previous is not None:
            sys.modules[name] = previous


class _Loader(importlib.abc.SourceLoader):
    def __init__(self, path: Path, source: bytes) -> None:
        self.path, self.source = str(path), source

    def get_filename(self, fullname: str) -> str:  # noqa: ARG002 - the protocol's
        return self.path

    def get_data(self, path: str | bytes) -> bytes:
        return self.source if path == self.path else Path(os.fsdecode(path)).read_bytes()


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, name: str, path: Path, source: bytes) -> None:
        self.name, self.loader = name, _Loader(path, source)

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,  # noqa: ARG002 - the protocol's
        target: types.ModuleType | None = None,  # noqa: ARG002
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        return importlib.util.spec_from_file_location(fullname, self.loader.path, loader=self.loader)
