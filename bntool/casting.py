"""Narrower floating types: a model cast to one, and a run that rounds as one does."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bntool.errors import ExportError

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def cast_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of the model whose floating tensors are of `dtype`.

    Raises `ExportError`, naming the first, when a finite number becomes infinite.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    over = [(name, t) for name, t in tensors if _overflows(t, dtype)]
    if over:
        name, tensor = over[0]
        more = f" (and {len(over) - 1} more tensors)" if len(over) > 1 else ""
        raise ExportError(
            f"{name} does not fit {_name(dtype)}: it holds {float(tensor.detach().abs().max()):.3g}, "
            f"the largest number is {torch.finfo(dtype).max:.3g}{more}",
            where=name,
            next_step="use --dtype bf16, which has the range of float32, or leave --dtype out",
        )
    return copy.deepcopy(model).to(dtype)


def _overflows(tensor: Tensor, dtype: torch.dtype) -> bool:
    if not tensor.is_floating_point():
        return False
    narrow = tensor.detach().to(dtype)
    return bool((tensor.isfinite() & ~narrow.isfinite()).any())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def rounded_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A float32 copy of the model that holds numbers of `dtype`, and rounds what every op returns to it.

    So does a kernel of `dtype` that sums in float32, as ONNX Runtime's do on a GPU and, by casts, on the CPU.
    Emulated, because torch has no fast float16 convolution on most CPUs.
    """
    rounded = copy.deepcopy(model).to(dtype).to(torch.float32)
    forward = rounded.forward

    @functools.wraps(forward)
    def rounding(*args: Any, **kwargs: Any) -> Any:
        with _Rounding(dtype):
            return forward(*args, **kwargs)

    rounded.forward = rounding
    return rounded


class _Rounding(TorchDispatchMode):
    """Rounds every new floating tensor to a narrower type, in place, so that aliases stay aliases."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._dtype = dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # A view shows numbers that are rounded already.
        made = [r.alias_info is None or r.alias_info.is_write for r in func._schema.returns]
        leaves = result if isinstance(result, tuple | list) else (result,)
        if all(made):
            for leaf in leaves:
                if isinstance(leaf, Tensor) and leaf.is_floating_point():
                    leaf.copy_(leaf.to(self._dtype))
        return result
