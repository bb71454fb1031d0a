"""Find the first layer or node at which a candidate parts from its reference.

Values between the layers are judged like outputs: by what the reference itself loses to rounding there, its
own precision against float64. Torch models are compared layer by layer under their qualified names, an ONNX
file with the torch model where its nodes carry the layers' names, two files under the names of their values,
and a file with itself, optimised, in log2 steps: the model cut after half of the nodes, and so on.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from bntool.core.blame import Blame, Step, first_fault
from bntool.core.errors import BntoolError, UsageError
from bntool.core.limits import binary
from bntool.core.tolerances import EXACT, Limit, walk
from bntool.core.verdicts import Check, first_failed
from bntool.graph.inputs import Inputs
from bntool.runtime.libraries import CPU, CUDA
from bntool.runtime.memory import available_bytes
from bntool.runtime.ort_runner import OrtRunner
from bntool.verifying.comparing import noise_limits
from bntool.verifying.differences import difference
from bntool.verifying.onnx_cutting import Cut, OnnxGraph
from bntool.verifying.tracing import Trace, once_called, trace_module


@dataclasses.dataclass(frozen=True)
class Found:
    """A blame and what shows it again: the layers, or the cut model, its inputs and what was expected.

    `optimize` and `device` say how ONNX Runtime ran the cut model when it differed.
    """

    blame: Blame
    feeds: Mapping[str, Tensor]
    expected: Tensor
    cut: Cut | None = None
    layers: tuple[nn.Module, nn.Module] | None = None
    optimize: bool | str = False
    device: str = "cpu"


def blame_modules(
    reference: nn.Module, candidate: nn.Module, inputs_list: Sequence[Inputs], *, stage: str
) -> Found | None:
    """The first layer at which two torch models part; None where no layer can be told."""
    for inputs in inputs_list:
        own, limits, exact = _yardstick(reference, inputs)
        got = trace_module(candidate, inputs)
        agrees = _judge(exact, got.values, limits)
        fault = first_fault(own.steps, agrees, own.outputs)
        if fault is not None:
            step, value = fault
            chain = _folded_chain(step, own, reference, candidate)
            value = chain[-1].gives[0] if len(chain) > 1 else value
            blame = _blame(stage, step, value, exact[value], got.values[value], limits[value])
            feeds = {name: own.values[name] for name in step.reads if name in own.values}
            layers = None
            if step.kind != "forward" and len(feeds) == len(step.reads) == 1:
                layers = (_in_a_row(reference, chain), _in_a_row(candidate, chain))
            return Found(blame, feeds, own.values[value], layers=layers)
    return None


def _folded_chain(step: Step, own: Trace, reference: nn.Module, candidate: nn.Module) -> list[Step]:
    """The layer, and those right after it that the candidate has another kind of: what was folded into it.

    Only after the last of them do both models hold the same value.
    """
    chain, told = [step], dict(reference.named_modules())
    others = dict(candidate.named_modules())
    while True:
        (value,) = chain[-1].gives
        after = [s for s in own.steps if value in s.reads and s.kind != "forward"]
        if len(after) != 1 or step.kind == "forward":
            return chain
        name = _plain(after[0])
        if type(told.get(name)) is type(others.get(name)) or after[0].gives[0] not in own.values:
            return chain
        chain.append(after[0])


def _in_a_row(model: nn.Module, chain: Sequence[Step]) -> nn.Module:
    layers = [model.get_submodule(_plain(step)) for step in chain]
    return layers[0] if len(layers) == 1 else nn.Sequential(*layers)


def blame_export(model: nn.Module, path: Path, inputs_list: Sequence[Inputs]) -> Found | None:
    """The first node of a file, run as it is written, that parts from the layer it was exported from."""
    graph = OnnxGraph(path)
    for inputs in inputs_list:
        own, limits, exact = _yardstick(model, inputs)
        places = graph.values_of_scopes({name for name, _ in once_called(own)})
        named = {value: name for name, value in places.items()}
        if len(graph.outputs) == len(own.outputs):
            named |= dict(zip(graph.outputs, own.outputs, strict=True))
        expected = {value: exact[name] for value, name in named.items()}
        allowed = {value: limits[name] for value, name in named.items()}
        found = _blame_values(graph, inputs, expected, allowed, "export", own, named)
        if found is not None:
            return found
    return None


def blame_onnx(
    model: nn.Module, path: Path, inputs_list: Sequence[Inputs], checks: Sequence[Check]
) -> Found | None:
    """What the first failed stage of an ONNX check is due to: the export, or the runtime on its device."""
    failed = first_failed(checks)
    if failed is None:
        return None
    if failed.stage != "runtime":
        return blame_export(model, path, inputs_list)
    return blame_runtime(path, inputs_list, device=where_it_ran(failed))


def where_it_ran(check: Check) -> str:
    """The device, or the provider that no device names, by which a run of ONNX Runtime is repeated."""
    device = check.device.partition(" ")[0]
    return device if check.provider in (CPU, CUDA) else check.provider


def blame_files(reference: Path, candidate: Path, inputs_list: Sequence[Inputs]) -> Found | None:
    """The first node at which two ONNX files part that name their values alike; both unoptimised."""
    before, after = OnnxGraph(reference), OnnxGraph(candidate)
    names = [value for value in after.values if value in set(before.values)]
    for inputs in inputs_list:
        expected = _run(before, before.prefix(len(before.steps), names), inputs)
        allowed = {name: _walk(t, len(before.steps)) for name, t in expected.items()}
        found = _blame_values(after, inputs, expected, allowed, "verify")
        if found is not None:
            return found
    return None


def blame_runtime(
    path: Path, inputs_list: Sequence[Inputs], *, device: str, optimize: bool | str = True
) -> Found | None:
    """The node at which ONNX Runtime's optimisations change a file's values, in log2 steps."""
    graph = OnnxGraph(path)
    for inputs in inputs_list:

        def parts(count: int, inputs: Inputs = inputs) -> tuple[Blame, Cut, Tensor] | None:
            cut = graph.prefix(count)
            plain = _run(graph, cut, inputs)
            fast = _run(graph, cut, inputs, device=device, optimize=optimize)
            for value, expected in plain.items():
                limit = _walk(expected, count)
                if not difference(expected, fast.get(value)).relative <= limit.limit:
                    step = graph.maker[value]
                    blame = _blame("runtime", step, value, expected, fast[value], limit)
                    return blame, graph.ancestors(value), expected
            return None

        low, high, last = 0, len(graph.steps), parts(len(graph.steps))
        if last is None:
            continue
        while high - low > 1:
            middle = (low + high) // 2
            found = parts(middle)
            low, high, last = (middle, high, last) if found is None else (low, middle, found)
        blame, cut, expected = last
        fed = graph.fed(inputs)
        feeds = {name: fed[name] for name in cut.inputs}
        return Found(blame, feeds, expected, cut=cut.typed(feeds), optimize=optimize, device=device)
    return None


def told(find: Callable[[], Found | None]) -> Found | str:
    """What `find` finds, or in words why nothing can be told: blame never hides the verdict."""
    try:
        return find() or "they agree layer by layer, as far as the layers can be told apart"
    except BntoolError as error:
        return error.what
    except Exception as error:  # noqa: BLE001 - whatever a model's forward, or a file that was cut, raises
        first_line = str(error).strip().partition("\n")[0]
        return f"taken apart, they do not run: {first_line or type(error).__name__}"


def _yardstick(model: nn.Module, inputs: Inputs) -> tuple[Trace, dict[str, Limit], Mapping[str, Tensor]]:
    own = trace_module(model, inputs)
    _require_room(own)
    layers = len(own.steps)
    eps = max((torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point()), default=1e-7)
    try:
        exact = trace_module(model, inputs, float64=True).values
    except Exception:  # noqa: BLE001 - whatever a model's forward raises on float64
        exact = own.values
    return own, noise_limits([exact], [own.values], layers, eps), exact


def _require_room(own: Trace) -> None:
    """Raise `UsageError` where float64's values and the candidate's beside these would fill the memory."""
    wanted = 4 * sum(value.nbytes for value in own.values.values())
    if (free := available_bytes()) is not None and wanted > free:
        raise UsageError(
            f"the values between the layers take {binary(wanted)}, and {binary(free)} are free",
            next_step="verify on smaller inputs: --input",
        )


def _judge(
    expected: Mapping[str, Tensor], got: Mapping[str, Tensor], limits: Mapping[str, Limit]
) -> dict[str, bool]:
    """Whether each value that both have agrees. One of other axes but as many numbers is not comparable."""
    agrees: dict[str, bool] = {}
    for name, reference in expected.items():
        other = got.get(name)
        if other is None or (other.shape != reference.shape and other.numel() == reference.numel()):
            continue
        agrees[name] = difference(reference, other).relative <= limits[name].limit
    return agrees


def _blame_values(
    graph: OnnxGraph,
    inputs: Inputs,
    expected: Mapping[str, Tensor],
    limits: Mapping[str, Limit],
    stage: str,
    own: Trace | None = None,
    named: Mapping[str, str] | None = None,
) -> Found | None:
    got = _run(graph, graph.prefix(len(graph.steps), list(expected)), inputs)
    agrees = _judge(expected, got, limits)
    fault = first_fault(graph.steps, agrees, graph.outputs)
    if fault is None:
        return None
    step, value = fault
    # The cut starts at what agrees, and is fed what the reference has there.
    cut = graph.between([name for name, same in agrees.items() if same], value)
    fed = graph.fed(inputs)
    known = (
        {v: own.values[n] for v, n in named.items()} if own is not None and named is not None else expected
    )
    feeds = {name: fed[name] if name in fed else known[name] for name in cut.inputs}
    cut = cut.typed(feeds)
    reference = known.get(value, expected[value])
    blame = _blame(stage, step, value, expected[value], got[value], limits[value])
    blame = dataclasses.replace(blame, nodes=len(cut.model.graph.node))
    return Found(blame, feeds, reference, cut=cut)


def _run(
    graph: OnnxGraph, cut: Cut, inputs: Inputs, *, device: str = "cpu", optimize: bool | str = False
) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory(prefix="bntool.") as folder:
        path = Path(folder) / "cut.onnx"
        cut.typed(graph.fed(inputs)).write(path)
        return OrtRunner(path, device, optimize=optimize).run(Inputs((), graph.fed(inputs)))


def _walk(tensor: Tensor, nodes: int) -> Limit:
    """A walk of one rounding for each node, and what a candidate may draw of it."""
    return walk(torch.finfo(tensor.dtype).eps, nodes) if tensor.is_floating_point() else EXACT


def _blame(stage: str, step: Step, value: str, expected: Tensor, got: Tensor, limit: Limit) -> Blame:
    found = difference(expected, got)
    inside = expected.shape == got.shape and expected.numel() > 0
    return Blame(
        stage=stage,
        name=step.name,
        kind=step.kind,
        value=value,
        shape=tuple(got.shape),
        index=found.index,
        expected=float(expected[found.index]) if inside else float("nan"),
        got=float(got[found.index]) if inside else float("nan"),
        max_abs=found.max_abs,
        relative=found.relative,
        limit=limit.limit,
        problem=found.problem,
    )


def _plain(step: Step) -> str:
    return step.name.partition("#")[0]
