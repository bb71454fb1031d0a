"""Folding inside a TorchScript module: by torch's own pass in float64, then proved by running both.

The pass, `torch._C._jit_pass_fold_convbn`, takes a BatchNorm into the convolution right before it, in the
graph of each submodule; what stands otherwise stays.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bntool.core.errors import CheckFailed, ExportError, StateError
from bntool.core.reasons import Reason
from bntool.core.sites import Skip
from bntool.core.verdicts import Check
from bntool.files.security.scripted import script_bytes
from bntool.graph.inputs import Inputs, named_tensors
from bntool.models.casting import is_finite
from bntool.verifying.algebra import ALGEBRA_LIMIT
from bntool.verifying.comparing import Limit, compare


@dataclasses.dataclass(frozen=True)
class FoldedScript:
    """A new module, the BatchNorms that went and those that stay; and both modules in float64."""

    model: torch.jit.ScriptModule
    folded: tuple[str, ...]
    skips: tuple[Skip, ...]
    wide: torch.jit.ScriptModule
    wide_folded: torch.jit.ScriptModule


def fold_script(script: torch.jit.ScriptModule) -> FoldedScript:
    """Fold a copy of `script` in eval mode, in float64 and rounded once.

    Raises `StateError` for statistics or weights that are not finite.
    """
    before = set(called_norms(script))
    original = _copy(script).eval()
    types = {p.dtype for p in (*script.parameters(), *script.buffers()) if p.is_floating_point()}
    # The pass computes in the type of the weights; those of one type are folded in float64.
    exact = original.double() if len(types) == 1 else original
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folded = torch.jit._recursive.wrap_cpp_module(torch._C._jit_pass_fold_convbn(exact._c))
        kept = set(called_norms(folded))
        wide, wide_folded = _copy(exact).double(), _copy(folded).double()
        result = folded.to(types.pop()) if len(types) == 1 else folded
    for name, tensor in result.state_dict().items():
        if not is_finite(tensor):
            raise StateError(
                f"{name} is not finite after the fold", next_step="train or calibrate the model again"
            )
    skips = tuple(
        Skip(n, Reason.SCRIPTED, "no convolution right before it in its graph") for n in sorted(kept)
    )
    return FoldedScript(result, tuple(sorted(before - kept)), skips, wide, wide_folded)


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
            given, found = (dict(named_tensors(m(*inputs.args, **inputs.kwargs))) for m in (original, module))
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


def called_norms(script: torch.jit.ScriptModule) -> Iterator[str]:
    """The qualified names of the BatchNorms that forward calls, by the graphs of the submodules."""
    yield from _called(script, "forward", "")


def _called(module: Any, method: str, place: str) -> Iterator[str]:
    graph = module._c._get_method(method).graph
    for node in graph.findAllNodes("prim::CallMethod"):
        path = _path_of(next(iter(node.inputs())))
        if path is None:
            continue
        called = dict(module.named_modules())[path]
        name = ".".join(filter(None, (place, path)))
        if called.original_name.startswith(("BatchNorm", "SyncBatchNorm")):
            yield name
        elif path or node.s("name") != method:
            yield from _called(called, node.s("name"), name)


def _path_of(value: Any) -> str | None:
    """`layer1.0` for a value that `self.layer1.0` gives; None for what is no submodule."""
    names: list[str] = []
    node = value.node()
    while node.kind() == "prim::GetAttr":
        names.insert(0, node.s("name"))
        node = next(iter(node.inputs())).node()
    return ".".join(names) if node.kind() == "prim::Param" else None


def _copy(script: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        copied: torch.jit.ScriptModule = torch.jit.load(io.BytesIO(script_bytes(script)), map_location="cpu")
        return copied


def check_script(folded: FoldedScript, inputs: Inputs) -> Check:
    """Both modules in float64, over two draws of inputs: far apart by less than rounding, or failed.

    Raises `CheckFailed` where they cannot be run so.
    """
    given = [inputs.map(functools.partial(_drawn, torch.Generator().manual_seed(seed))) for seed in (0, 1)]
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            before, after = (
                [dict(named_tensors(module(*one.args, **one.kwargs))) for one in given]
                for module in (folded.wide, folded.wide_folded)
            )
    except Exception as error:
        raise CheckFailed(
            f"the module cannot be run in float64 ({type(error).__name__}), so no fold can be checked",
            next_step="name its input with --input, or fold the nn.Module it was made from",
        ) from error
    noise = torch.finfo(torch.float64).eps / 2
    limits = {name: Limit(noise, ALGEBRA_LIMIT) for outputs in before for name in outputs}
    row = compare(before, after, limits, stage="fold", device="cpu", provider="torch")
    return dataclasses.replace(row, precision="float64")


def _drawn(generator: torch.Generator, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    return torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
