"""What the proof of a fold finds: networks made at random, a share of them folded wrongly on purpose.

    make faults                                 # this proof, of modules; AS=program and AS=onnx too
    python -m tools.sweeps.random_faults --share 0.1 --out a.json
    # then --against a.json: beside the proof of another version

A fault is one number of a folded weight that is off, or (of modules) one edit of the plan that is left out.
Of each network it is told whether the fault can be seen at all: how far the outputs move, on inputs of
several sizes; in float64, but for ONNX files, which run as they are.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.export import Dim, export

from bntool.core.errors import BntoolError, ObserveError
from bntool.core.options import FoldOptions
from bntool.core.plan import Plan
from bntool.graph.inputs import Inputs
from bntool.runtime.ort_runner import OrtRunner
from bntool.runtime.programs import RunnableProgram
from bntool.subjects.base import Checking
from bntool.subjects.module import ModuleSubject
from bntool.subjects.onnx import OnnxSubject
from bntool.subjects.program import ProgramSubject
from bntool.surgery.fold_program import in_float64
from tools.sweeps.random_files import exporter_of, write
from tools.sweeps.random_nets import SIDE, RandomNet
from tools.sweeps.random_trials import has_norms, outputs_of

SHARES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
"""By how much of the largest number of its weight a number is off."""
SEEN = 1e-4
"""A fault that moves an output by this share of its peak is one that a proof must find."""

Run = Callable[[Tensor], Sequence[Tensor]]


@dataclasses.dataclass
class Case:
    """A network as a subject, and what differs from kind to kind: its weights, and how it is run exactly.

    `weights` are the names of those of a folded subject, `spoil` changes one of them, and `exact` runs a
    subject.
    """

    subject: Any
    weights: Callable[[Any], list[str]]
    spoil: Callable[[Any, str, random.Random, float], None]
    exact: Callable[[Any], Run]


def tried(seed: int, share: float, form: str) -> dict[str, Any] | None:
    """One network: whether it is broken, how far that moves its outputs, and what the proof says."""
    draw = random.Random(seed)  # noqa: S311 - networks, not secrets
    net = RandomNet(seed)
    if not has_norms(net):
        return None
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        case = FORMS[form](net, Path(folder), seed)
        if case is None:
            return None
        plan = case.subject.plan_fold(FoldOptions(), thorough=False)
        if not plan:
            return None
        broken = draw.random() < share
        fault, wrong, after = _broken(case, plan, draw) if broken else ("", plan, case.subject.folded(plan))
        found, told = _judged(case.subject, wrong, after)
        moved = _moved(net.channels, case.exact(case.subject), case.exact(after))
    return {"seed": seed, "fault": fault, "moved": moved, "found": found, "told": told}


def _broken(case: Case, plan: Plan, draw: random.Random) -> tuple[str, Plan, Any]:
    """The fold with a fault: a plan that lacks an edit, or a weight with one number that is off."""
    edits = [(i, j) for i, site in enumerate(plan.fold_sites) for j, e in enumerate(site.edits) if e.map]
    if edits and case.subject.kind == "module" and draw.random() < 0.5:
        i, j = draw.choice(edits)
        sites = list(plan.fold_sites)
        left = tuple(edit for k, edit in enumerate(sites[i].edits) if k != j)
        sites[i] = dataclasses.replace(sites[i], edits=left)
        wrong = dataclasses.replace(plan, sites=tuple(sites))
        return "an edit left out", wrong, case.subject.folded(wrong)
    after = case.subject.folded(plan)
    names = case.weights(after)
    if not names:
        return "", plan, after
    name, share = draw.choice(names), draw.choice(SHARES)
    case.spoil(after, name, draw, share)
    return f"a number off by {share:g}", plan, after


def _judged(subject: Any, plan: Plan, candidate: Any) -> tuple[bool, str]:
    """Whether the proof finds anything wrong, and where."""
    try:
        rows = subject.proof(Checking()).rows(plan, candidate)
    except BntoolError as error:
        return True, type(error).__name__
    failed = [f"{row.precision or 'own'}" for row in rows if not row.agrees]
    return bool(failed), ", ".join(failed)


def _moved(channels: int, before: Run, after: Run) -> float:
    """The largest difference of an output, relative to its peak, on inputs of several sizes."""
    worst = 0.0
    for batch, side in ((2, SIDE), (3, SIDE), (1, SIDE + 8), (2, SIDE + 33)):
        x = torch.randn(batch, channels, side, side, dtype=torch.float64)
        try:
            pairs = list(zip(before(x), after(x), strict=True))
        except Exception:  # noqa: BLE001, S112  a size that it does not take
            continue
        worst = max([worst, *(_apart(a, b) for a, b in pairs)])
    return worst


def _apart(old: Tensor, new: Tensor) -> float:
    if not torch.equal(torch.isfinite(old), torch.isfinite(new)):
        return float("inf")
    numbers = torch.isfinite(old)
    if not bool(numbers.any()):
        return 0.0
    return float((old - new)[numbers].abs().max()) / max(float(old[numbers].abs().max()), 1e-12)


# -- the kinds ---------------------------------------------------------------------------------------------


def _module(net: RandomNet, folder: Path, seed: int) -> Case:  # noqa: ARG001 - as the others
    example = torch.randn(2, net.channels, SIDE, SIDE)
    subject = ModuleSubject(net.float(), (example,))
    try:
        subject.plan_fold(FoldOptions(), thorough=False)
    except ObserveError:  # it has float64 constants
        subject = ModuleSubject(net.double(), (example.double(),))

    def spoil(after: Any, name: str, draw: random.Random, share: float) -> None:
        weight = after.model.get_parameter(name)
        other = nn.Parameter(_off(weight, draw, share))
        for module in after.model.modules():
            for key, held in module._parameters.items():
                if held is weight:
                    module._parameters[key] = other

    def weights(after: Any) -> list[str]:
        return [name for name, tensor in after.model.named_parameters() if tensor.numel()]

    return Case(subject, weights, spoil, lambda one: lambda x: outputs_of(one.model.double(), x))


def _program(net: RandomNet, folder: Path, seed: int) -> Case | None:  # noqa: ARG001 - as the others
    example = (torch.randn(2, net.channels, SIDE, SIDE),)
    dim: Any = ({0: Dim("batch", min=2)},)
    for axes in (dim, None):
        try:
            subject = ProgramSubject(export(net.float(), example, dynamic_shapes=axes))
            break
        except Exception:  # noqa: BLE001, S112  whatever stands in the way of an open axis, or of all
            continue
    else:
        return None

    def spoil(after: Any, name: str, draw: random.Random, share: float) -> None:
        state = after.model.state_dict
        held = state[name]
        new = _off(held, draw, share)
        state[name] = nn.Parameter(new) if isinstance(held, nn.Parameter) else new
        after.__dict__.pop("runnable", None)

    def weights(after: Any) -> list[str]:
        return [n for n, t in after.model.state_dict.items() if t.is_floating_point() and t.numel()]

    def exact(one: Any) -> Run:
        run = RunnableProgram(in_float64(one.model))
        return lambda x: outputs_of(run, x)

    return Case(subject, weights, spoil, exact)


def _file(net: RandomNet, folder: Path, seed: int) -> Case | None:
    path = folder / "net.onnx"
    try:
        write(net.float(), path, exporter_of(seed), torch.float32)
    except Exception:  # noqa: BLE001  no exporter takes it in float32
        return None
    subject = OnnxSubject(path)

    def spoil(after: Any, name: str, draw: random.Random, share: float) -> None:
        proto = onnx.load(after.model)
        (stored,) = [tensor for tensor in proto.graph.initializer if tensor.name == name]
        new = _off(torch.from_numpy(numpy_helper.to_array(stored).copy()), draw, share)
        stored.CopyFrom(numpy_helper.from_array(new.numpy(), name))
        onnx.save(proto, after.model)

    def weights(after: Any) -> list[str]:
        stored = onnx.load(after.model).graph.initializer
        return [t.name for t in stored if t.data_type == onnx.TensorProto.FLOAT and np.prod(t.dims) > 0]

    def exact(one: Any) -> Run:
        runner = OrtRunner(one.model, "cpu", optimize=False)
        return lambda x: [t.double() for t in runner.run(Inputs((x.float(),))).values()]

    return Case(subject, weights, spoil, exact)


def _off(weight: Tensor, draw: random.Random, share: float) -> Tensor:
    """The numbers with one of them off by a share of the largest."""
    with torch.no_grad():
        other = weight.detach().clone().contiguous()
        other.view(-1)[draw.randrange(weight.numel())] += share * float(weight.abs().max() or 1.0)
    return other


FORMS: dict[str, Callable[[RandomNet, Path, int], Case | None]] = {
    "module": _module,
    "program": _program,
    "onnx": _file,
}


def _rows(chosen: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for seed in range(chosen.first, chosen.first + chosen.nets):
        row = tried(seed, chosen.share, chosen.form)
        if row is not None:
            yield row


def told_of(rows: list[dict[str, Any]]) -> list[str]:
    """The figures, one a line."""
    broken = [row for row in rows if row["fault"]]
    whole = [row for row in rows if not row["fault"]]
    seen = [row for row in broken if row["moved"] > SEEN]
    other = [row for row in broken if row["moved"] <= SEEN]
    kinds = Counter(row["fault"] for row in broken if row["found"])
    return [
        f"{len(rows)} networks folded, {len(broken)} of them with a fault",
        f"faults that move an output by more than {SEEN:g}: {len(seen)}, found {_found(seen)}",
        f"other faults: {len(other)}, found {_found(other)}",
        f"without a fault: {len(whole)}, refused {_found(whole)}",
        *(f"  found, {kind}: {count}" for kind, count in sorted(kinds.items())),
        *(f"  NOT FOUND: {_fault(row)}" for row in seen if not row["found"]),
    ]


def _found(rows: list[dict[str, Any]]) -> int:
    return sum(row["found"] for row in rows)


def _fault(row: dict[str, Any]) -> str:
    return f"seed {row['seed']}, {row['fault'] or 'no fault'}, moves {row['moved']:.2g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--as", choices=FORMS, default="module", dest="form", help="what a network is given as"
    )
    parser.add_argument("--nets", type=int, default=600)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--share", type=float, default=0.5, help="of the networks, that get a fault")
    parser.add_argument("--out", type=Path, help="write what was found, network by network")
    parser.add_argument("--against", type=Path, help="what another version found")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = list(_rows(chosen))
    print(*told_of(rows), sep="\n")
    if chosen.out:
        chosen.out.write_text(json.dumps(rows), encoding="utf-8")
    if chosen.against:
        before = {row["seed"]: row for row in json.loads(chosen.against.read_text(encoding="utf-8"))}
        for row in rows:
            old = before.get(row["seed"])
            if old is not None and old["found"] != row["found"]:
                change = "now found" if row["found"] else "no longer found"
                print(f"{change}: {_fault(row)} ({old['told'] or row['told']})")


if __name__ == "__main__":
    main()
