"""Folding inside a TorchScript module: by torch's own pass in float64, then proved by running both.

The pass, `torch._C._jit_pass_fold_convbn`, takes a BatchNorm into the convolution right before it, in the
graph of each submodule; what stands otherwise stays.
"""

from __future__ import annotations

import dataclasses
import io
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bntool.core.errors import CheckFailed, ExportError, StateError
from bntool.core.reasons import Reason
from bntool.core.sites import Skip
from bntool.core.tolerances import ALGEBRA
from bntool.core.verdicts import Check
from bntool.files.security.scripted import script_bytes
from bntool.graph.inputs import Inputs, named_tensors
from bntool.observe.isolation import fresh
from bntool.precision.casting import is_finite
from bntool.subjects.script_calls import Calls, is_norm
from bntool.subjects.script_norms import kept_norms
from bntool.verifying.comparing import compare

_HIDDEN = "forward_that_stays"


@dataclasses.dataclass(frozen=True)
class FoldedScript:
    """A new module, the BatchNorms that went and those that stay; and both modules in float64."""

    model: torch.jit.ScriptModule
    folded: tuple[str, ...]
    skips: tuple[Skip, ...]
    wide: torch.jit.ScriptModule
    wide_folded: torch.jit.ScriptModule
    branches: bool
    """Whether the code branches, so that a run may leave some of it out."""
    untrained: tuple[str, ...]
    """Those that went and had seen no batch."""


def fold_script(script: torch.jit.ScriptModule) -> FoldedScript:
    """Fold a copy of `script` in float64, rounded once, in eval mode but for layers that were left in train
    mode in a model in eval mode.

    Torch's pass looks at one pair of layers and not at who else calls them, so it is shown those alone that
    `kept_norms` lets go. Raises `StateError` for statistics or weights that are not finite.
    """
    original = _copy(script)
    if getattr(script, "training", True):  # a frozen one has no mode
        original.eval()
    types = {p.dtype for p in (*script.parameters(), *script.buffers()) if p.is_floating_point()}
    # The pass computes in the type of the weights; those of one type are folded in float64.
    exact = original.double() if len(types) == 1 else original
    calls = Calls(exact)
    kept = kept_norms(calls)
    norms = [name for name in calls.to if is_norm(calls.modules[name])]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wide = _copy(exact).double()
        stay = [call.node for name in kept for call in calls.to.get(name, ())]
        folded, wide_folded, failed = _passed(exact, stay)
        result = folded.to(types.pop()) if len(types) == 1 else folded
    for name, tensor in result.state_dict().items():
        if not is_finite(tensor):
            raise StateError(
                f"{name} is not finite after the fold", next_step="train or calibrate the model again"
            )
    left = set(Calls(folded).to)
    for name in norms:
        if name in left and name not in kept:
            kept[name] = Skip(name, Reason.SCRIPTED, failed or "torch's pass does not take it in")
    gone = tuple(sorted(set(norms) - left))
    counts = {name: getattr(calls.modules[name], "num_batches_tracked", None) for name in gone}
    untrained = tuple(name for name, count in counts.items() if count is not None and not bool(count.any()))
    return FoldedScript(result, gone, tuple(kept.values()), wide, wide_folded, calls.branches, untrained)


def converted(script: torch.jit.ScriptModule, inputs: Inputs) -> nn.Module:
    """The module as one that torch.export takes, by torch's converter: it computes the same or is refused.

    Raises `ExportError` where the converter gives up, `CheckFailed` where the outputs differ.
    """
    # torch has no public way; the converter is the one that torch.export's own error names.
    from torch._export.converter import TS2EPConverter

    original = _copy(script).eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            program = TS2EPConverter(original, inputs.args, dict(inputs.kwargs)).convert()
            module: nn.Module = program.module()
            if any(node.target is torch.ops.higher_order.cond for node in program.graph.nodes):
                raise ExportError(
                    "this TorchScript branches on its inputs, and a file would take one side for all",
                    next_step="export the nn.Module that it was made from",
                )
            given, found = (dict(named_tensors(m(*inputs.args, **inputs.kwargs))) for m in (original, module))
        except ExportError:
            raise
        except Exception as error:
            raise ExportError(
                f"torch's converter cannot take this TorchScript: {str(error).strip().splitlines()[0]}",
                next_step="export the nn.Module that it was made from",
            ) from error
    if given.keys() != found.keys() or any(not torch.equal(given[n], found[n]) for n in given):
        raise CheckFailed(
            "what torch's converter made of the TorchScript does not compute the same",
            next_step="export the nn.Module that it was made from",
        )
    return module


def _passed(
    script: torch.jit.ScriptModule, stay: Sequence[Any]
) -> tuple[torch.jit.ScriptModule, torch.jit.ScriptModule, str]:
    """What torch's pass makes of a script with some calls out of its sight, in float64 too, and why it made
    nothing.
    """
    _rename(stay, "forward", _HIDDEN)
    try:
        folded = torch.jit._recursive.wrap_cpp_module(torch._C._jit_pass_fold_convbn(script._c))
        _rename(_calls_in(folded), _HIDDEN, "forward")
        return folded, _copy(folded).double(), ""
    except RuntimeError:  # the pass copies the code for classes of other names, which hooks do not take
        _rename(stay, _HIDDEN, "forward")
        return script, _copy(script).double(), "torch's pass makes code of it that does not run"


def _calls_in(script: torch.jit.ScriptModule) -> Iterator[Any]:
    for code in (getattr(module, "_c") for module in script.modules()):  # noqa: B009 - not in torch's stubs
        for method in code._method_names():
            yield from code._get_method(method).graph.findAllNodes("prim::CallMethod")


def _rename(calls: Iterable[Any], old: str, new: str) -> None:
    """Call another method of the same module; modules of one class share the call."""
    for node in calls:
        if node.s("name") == old:
            node.s_("name", new)


def _copy(script: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        copied: torch.jit.ScriptModule = torch.jit.load(io.BytesIO(script_bytes(script)), map_location="cpu")
        return copied


def check_script(folded: FoldedScript, inputs: Inputs, real: Sequence[Inputs] = ()) -> Check:
    """Both modules in float64, over two draws of inputs: far apart by less than rounding, or failed.

    With `real` inputs over those instead.

    Exported methods are run too, where they take the same inputs; what was not run is said.
    Raises `CheckFailed` where forward cannot be run so.
    """
    given = [one.to(dtype=torch.float64) for one in real] or [
        inputs.redrawn(seed).to(dtype=torch.float64) for seed in (0, 1)
    ]
    before: list[dict[str, Tensor]] = [{} for _ in given]
    after: list[dict[str, Tensor]] = [{} for _ in given]
    others = [name for name in folded.wide._c._method_names() if name != "forward"]
    left = []
    for method in ("forward", *others):
        try:
            expected = _run(folded.wide, method, given)
        except Exception as error:
            if method == "forward":
                raise _does_not_run(error) from error
            left.append(method)
            continue
        try:
            got = _run(folded.wide_folded, method, given)
        except Exception as error:
            raise _does_not_run(error) from error
        for one, all_of_them in ((expected, before), (got, after)):
            for outputs, into in zip(one, all_of_them, strict=True):
                into |= outputs
    limits = {name: ALGEBRA for outputs in before for name in outputs}
    detail = "; ".join(
        [
            *([f"not run: its methods {', '.join(left)}, which take other inputs"] if left else []),
            *(["it branches on its inputs: only the branches that they take were run"] * folded.branches),
        ]
    )
    row = compare(before, after, limits, stage="fold", device="cpu", provider="torch", detail=detail)
    return dataclasses.replace(row, precision="float64")


def _run(script: torch.jit.ScriptModule, method: str, given: Sequence[Inputs]) -> list[dict[str, Tensor]]:
    """The outputs of a method, those of another than forward under its name."""
    prefix = "" if method == "forward" else f"{method}."
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = [getattr(script, method)(*one.args, **one.kwargs) for one in map(fresh, given)]
        return [{f"{prefix}{name}": tensor for name, tensor in named_tensors(r)} for r in results]


def _does_not_run(error: Exception) -> CheckFailed:
    return CheckFailed(
        f"the module cannot be run in float64 ({type(error).__name__}), so no fold can be checked",
        next_step="name its input with --input, or fold the nn.Module it was made from",
    )
