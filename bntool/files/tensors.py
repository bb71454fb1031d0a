"""Tensors that bntool does not work on: sparse, nested, quantized, meta, of a type that torch only stores.

They are told by their names in a pickle before it is loaded, and by themselves afterwards.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Collection, Iterable
from pathlib import Path

import torch
from torch import Tensor

from bntool.core.errors import LoadError
from bntool.files.security.pickled_calls import shown


@dataclasses.dataclass(frozen=True)
class OtherTensor:
    """A kind of tensor in words that follow `holds`, and what to save in its place."""

    what: str
    instead: str

    def error(self, path: Path, name: str = "") -> LoadError:
        """Why the file is not read; `name` is the tensor's, where it is known."""
        named = f" ({shown(name)})" if name else ""
        return LoadError(
            f"{path.name} holds {self.what}{named}; bntool reads dense tensors alone",
            where=str(path),
            next_step=self.instead,
        )


_SPARSE = OtherTensor("a sparse tensor", "save it dense: tensor.to_dense()")
_NESTED = OtherTensor("a nested tensor", "save the tensors that it is made of: tensor.unbind()")
_META = OtherTensor(
    "a meta tensor, which has no numbers", "load the weights into the model, and save it then"
)
_QUANTIZED = OtherTensor(
    "a quantized tensor", "save the model as it was before it was quantized, or tensor.dequantize()"
)
_SUBCLASS = OtherTensor(
    "a tensor of a device or class of its own", "save a plain tensor on the CPU: tensor.detach().cpu()"
)
_REBUILT = {
    "torch._utils._rebuild_sparse_tensor": _SPARSE,
    "torch._utils._rebuild_nested_tensor": _NESTED,
    "torch.nested._internal.nested_tensor._rebuild_njt": _NESTED,
    "torch._utils._rebuild_meta_tensor_no_storage": _META,
    "torch._utils._rebuild_qtensor": _QUANTIZED,
    "torch._utils._rebuild_wrapper_subclass": _SUBCLASS,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _SUBCLASS,
    "torch._utils._rebuild_device_tensor_from_numpy": _SUBCLASS,
}
_BESIDE = re.compile(
    r"torch\.(Q\w+Storage|per_(tensor|channel)_affine(_float_qparams)?|_dynamo\.decorators\._DimRange"
    r"|nested\._internal\.nested_tensor\.NestedTensor)"
)
"""What those functions are given, and nothing else refers to."""


def told_by(names: Collection[str], refused: Collection[str]) -> OtherTensor | None:
    """The kind of tensor that a pickle makes by these names; None where a refused one does anything else."""
    kinds = [_REBUILT[name] for name in sorted(names) if name in _REBUILT]
    only = all(name in _REBUILT or _BESIDE.fullmatch(name) for name in refused)
    return kinds[0] if kinds and only else None


def require_dense(tensors: Iterable[tuple[str, object]], path: Path) -> None:
    """Raise `LoadError` for a tensor of another kind; what is no tensor is let pass."""
    for name, tensor in tensors:
        kind = _kind_of(tensor) if isinstance(tensor, Tensor) else None
        if kind is not None:
            raise kind.error(path, name)


def _kind_of(tensor: Tensor) -> OtherTensor | None:
    if tensor.is_nested:
        return _NESTED
    if tensor.is_meta:
        return _META
    if tensor.layout is not torch.strided:
        return _SPARSE
    if tensor.is_quantized:
        return _QUANTIZED
    if not _computes(tensor.dtype):
        kind = str(tensor.dtype).removeprefix("torch.")
        return OtherTensor(f"a tensor of type {kind}", "save it in a type that torch computes in: float32")
    return None


@functools.cache
def _computes(dtype: torch.dtype) -> bool:
    """Some types, such as float4, are only stored: torch converts them to no other."""
    try:
        torch.empty(1, dtype=dtype).double()
    except RuntimeError:
        return False
    return True
