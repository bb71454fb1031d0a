"""What a command works on: the model, where it came from, its example inputs, and how it speaks."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bntool.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

    from bntool.files.loading import Loaded
    from bntool.inputs import Inputs
    from bntool.observe.eager import Observation
    from bntool.plan import Plan


@dataclasses.dataclass
class Voice:
    """Results go to stdout, progress to stderr; with `--json` stdout is one document and nothing else."""

    as_json: bool = False
    quiet: bool = False
    verbose: bool = False
    notes: list[str] = dataclasses.field(default_factory=list)

    def say(self, text: str = "") -> None:
        if not self.as_json:
            click.echo(text)

    def note(self, text: str) -> None:
        """A remark: a line of text, or an entry of the document's `notes`."""
        self.notes.append(text)
        if not self.as_json and not self.quiet:
            click.echo(f"note: {text}")

    def emit(self, document: dict[str, Any]) -> None:
        if self.as_json:
            from bntool.cli import SCHEMA_VERSION

            whole = {"schema_version": SCHEMA_VERSION, **document, "notes": self.notes}
            click.echo(json.dumps(whole, indent=1))

    @contextlib.contextmanager
    def progress(self, title: str) -> Iterator[Any]:
        """A progress line on stderr for work that takes over a second, where stderr is a terminal.

        Yields a function that takes the text of the current step.
        """
        if self.quiet or self.as_json or not sys.stderr.isatty():
            yield lambda text: None
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        bar = Progress(*columns, console=Console(stderr=True), transient=True)
        task = bar.add_task(title, total=None)
        timer = threading.Timer(1.0, bar.start)
        timer.start()
        try:
            yield lambda text: bar.update(task, description=text)
        finally:
            timer.cancel()
            bar.stop()


@dataclasses.dataclass
class Session:
    """A loaded model and what is known about it."""

    voice: Voice
    loaded: Loaded
    inputs: Inputs | None
    seed: int
    earlier_plans: list[Plan] = dataclasses.field(default_factory=list)
    baseline: str = ""
    baseline_options: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def model(self) -> nn.Module:
        return self.loaded.model

    @property
    def source(self) -> str:
        """The model's file as an absolute path, or its reference."""
        return str(self.loaded.path.resolve()) if self.loaded.path else self.loaded.reference

    def observe(self) -> Observation:
        """Observe the model on the given inputs, else on inferred ones, which are said."""
        from bntool.observe.eager import observe
        from bntool.observe.inference import observe_inferred

        if self.inputs is not None:
            return observe(self.model, self.inputs)
        observation = observe_inferred(self.model)
        self.inputs = observation.inputs
        self.voice.note(f"example input: {observation.inputs.origin} (--input sets another)")
        return observation

    def shapes(self) -> tuple[str, ...]:
        """The example inputs as `--input` takes them, where it can."""
        if self.inputs is None or any(not hasattr(a, "shape") for a in self.inputs.args):
            return ()
        named = [(f"{k}:", v) for k, v in self.inputs.kwargs.items() if hasattr(v, "shape")]
        positional = [("", a) for a in self.inputs.args]
        return tuple(f"{name}{'x'.join(map(str, t.shape))}" for name, t in [*positional, *named])


def open_session(voice: Voice, options: dict[str, Any]) -> Session:
    """Load MODEL, or what the last command in this folder wrote."""
    from bntool.files.loading import load
    from bntool.files.memory import Grant, last_output, recall
    from bntool.files.references import is_reference

    given = options.get("model")
    record = recall(Path.cwd()) if given else last_output(Path.cwd())
    name = given or os.path.relpath(record.output) if record else given
    assert name is not None
    if not given and record is not None:
        voice.say(f"using {name}, written by the last bntool {record.command} here")
    is_file = Path(name).exists() or not is_reference(name)
    grant = record.granted(name) if record is not None and is_file else Grant()
    ours = record is not None and is_file and Path(name).exists() and _same(name, record.output)
    arch = options.get("arch") or (record.arch if ours and record else None)
    plans, prepare = _history(name) if is_file and arch else ([], None)
    with voice.progress(f"loading {name}"):
        loaded = load(
            name,
            arch=arch,
            weights=options.get("weights"),
            key=options.get("key") or (record.key if ours and record else None),
            allow=(*options.get("allow", ()), *grant.allow),
            trust_pickle=bool(options.get("trust_pickle")) or grant.trust_pickle,
            pretrained=bool(options.get("pretrained")),
            prepare=prepare,
        )
    for text in loaded.notes:
        voice.note(text)
    shapes = tuple(options.get("inputs") or ()) or (record.input_shapes if ours and record else ())
    seed = int(options.get("seed") or 0)
    inputs = parse_inputs(shapes, loaded.model, seed) if shapes else loaded.example_inputs
    session = Session(voice, loaded, inputs, seed, plans)
    if ours and record is not None and record.source:
        session.baseline = record.source
        granted = record.granted(record.source)
        session.baseline_options = {
            "arch": record.arch,
            "weights": record.weights,
            "key": record.key,
            "allow": granted.allow,
            "pretrained": record.pretrained,
        }
    return session


def _same(a: str, b: str) -> bool:
    try:
        return Path(a).samefile(b)
    except OSError:
        return False


def _history(path: str) -> tuple[list[Plan], Any]:
    """The plans that made a file of weights, so that its architecture can be made to fit it."""
    from bntool.files.sidecar import describes, read_sidecar
    from bntool.plan import Plan

    document = read_sidecar(path) if Path(path).exists() else None
    if document is None or not describes(document, path):
        return [], None
    raw = [*document.get("earlier_plans", []), *([document["plan"]] if document.get("plan") else [])]
    plans = [Plan.from_dict(data) for data in raw]

    def prepare(model: nn.Module) -> nn.Module:
        from bntool.api import apply

        for plan in plans:
            model = apply(model, plan, share=True).model
        return model

    return plans, prepare


_SHAPE = re.compile(r"(?:(?P<name>[A-Za-z_]\w*):)?(?P<dims>\d+(?:[x,]\d+)*)")


def parse_inputs(texts: tuple[str, ...], model: nn.Module, seed: int) -> Inputs:
    """`[NAME:]1x3x224x224` for each input: seeded values of the model's type, N(0, 1)."""
    import torch

    from bntool.inputs import Inputs

    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    embeds = _first_reads_tokens(model)
    generator = torch.Generator().manual_seed(seed)
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for text in texts:
        match = _SHAPE.fullmatch(text.strip())
        if match is None:
            raise UsageError(
                f"--input {text} is not a shape", next_step="write it as 1x3x224x224 or NAME:1x3x224x224"
            )
        shape = [int(n) for n in re.split("[x,]", match["dims"])]
        if 0 in shape:
            raise UsageError(f"--input {text} has an axis of size 0", next_step="every axis needs at least one")
        if embeds:
            value = torch.randint(embeds, shape, generator=generator)
        else:
            value = torch.randn(shape, generator=generator).to(weight)
        if match["name"] and args and match["name"] not in kwargs:
            kwargs[match["name"]] = value
        elif match["name"] and _takes_keyword(model, match["name"]):
            kwargs[match["name"]] = value
        else:
            args.append(value)
    return Inputs(tuple(args), kwargs, origin="--input " + " --input ".join(texts))


def _takes_keyword(model: nn.Module, name: str) -> bool:
    import inspect

    return name in inspect.signature(model.forward).parameters


def _first_reads_tokens(model: nn.Module) -> int:
    """The vocabulary of an embedding that comes first; 0 where the model reads numbers."""
    from torch import nn

    for module in model.modules():
        if isinstance(module, nn.Embedding):
            return module.num_embeddings
        if isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
            return 0
    return 0
