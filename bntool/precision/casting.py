"""Coarser arithmetic: a model cast to a narrower type, and a run that rounds as one does, or as TF32."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bntool.core.errors import ExportError
from bntool.observe.stand_in import cast, own_copy
from bntool.observe.watching import OpMode

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
_PRODUCTS = frozenset(
    """convolution _convolution cudnn_convolution conv1d conv2d conv3d conv_transpose1d conv_transpose2d
    conv_transpose3d mm addmm bmm baddbmm addbmm matmul linear einsum mv addmv scaled_dot_product_attention
    _scaled_dot_product_flash_attention_for_cpu""".split()
)
"""The ops whose factors TF32 rounds; both the whole ones and what `no_grad` makes of them."""


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """Arithmetic coarser than float32, emulated in torch: `copy` makes a model that computes with it.

    `eps` is the distance from 1 to the next number of its factors; `stored` the type that weights and inputs
    are stored in, None where they stay float32.
    """

    name: str
    eps: float
    copy: Callable[[nn.Module], nn.Module]
    stored: torch.dtype | None = None


def stored_as(dtype: torch.dtype) -> Arithmetic:
    """Numbers of a narrower type, every op rounded to it."""
    eps = float(torch.finfo(dtype).eps)
    return Arithmetic(_name(dtype), eps, lambda model: rounded_copy(model, dtype), dtype)


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
    return cast(own_copy(model), dtype)


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    # torch has no such test for float8.
    narrow = tensor.is_floating_point() and tensor.itemsize == 1
    return bool(torch.isfinite(tensor.float() if narrow else tensor).all())


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
    return _running_in(cast(cast(own_copy(model), dtype), torch.float32), lambda: _Rounding(dtype))


def tf32_copy(model: nn.Module) -> nn.Module:
    """A copy of a float32 model that rounds both factors of every convolution and matrix product to TF32.

    TF32 keeps the range of float32 and 10 bits of fraction; products are exact, and summed in float32.
    """
    return _running_in(own_copy(model), _RoundingFactors)


TF32 = Arithmetic("TF32", 2.0**-10, tf32_copy)


def round_to_tf32(tensor: Tensor) -> Tensor:
    """Each float32 number to the nearest with 10 bits of fraction, ties away from zero, as NVIDIA's do."""
    bits = tensor.contiguous().view(torch.int32)
    rounded = ((bits + 0x1000) & ~0x1FFF).view(torch.float32)
    return torch.where(tensor.isfinite(), rounded.view(tensor.shape), tensor)


def _running_in(model: nn.Module, mode: Callable[[], OpMode]) -> nn.Module:
    forward = model.forward

    @functools.wraps(forward)
    def inside(*args: Any, **kwargs: Any) -> Any:
        with mode():
            return forward(*args, **kwargs)

    model.forward = inside
    return model


class _Rounding(OpMode):
    """Rounds every new floating tensor to a narrower type, in place, so that aliases stay aliases."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def operator(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        result = func(*args, **kwargs)
        # A view shows numbers that are rounded already.
        made = [r.alias_info is None or r.alias_info.is_write for r in func._schema.returns]
        leaves = result if isinstance(result, tuple | list) else (result,)
        if all(made):
            for leaf in leaves:
                if isinstance(leaf, Tensor) and leaf.is_floating_point():
                    leaf.copy_(leaf.to(self._dtype))
        return result


class _RoundingFactors(OpMode):
    """Hands convolutions and matrix products their tensors rounded to TF32.

    A bias is added after the product, in float32, so it is left as it is: the third tensor of a convolution
    or a linear layer, and the first of an `addmm`.
    """

    def operator(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name not in _PRODUCTS:
            return func(*args, **kwargs)
        added = {0} if name in ("addmm", "baddbmm", "addbmm", "addmv") else set()
        if "conv" in name or name == "linear":
            added = {2}
        rounded = [arg if i in added else _factor(arg) for i, arg in enumerate(args)]
        return func(*rounded, **kwargs)


def _factor(arg: Any) -> Any:
    if isinstance(arg, list | tuple):
        return type(arg)(_factor(each) for each in arg)
    return round_to_tf32(arg) if isinstance(arg, Tensor) and arg.dtype == torch.float32 else arg
