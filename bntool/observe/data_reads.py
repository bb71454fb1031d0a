"""What hands numbers or sizes of a tensor to Python, which may decide by them: a branch, a size, a factor."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

_NUMBERS = frozenset(
    {"item", "_local_scalar_dense", "resolve_neg", "is_nonzero", "equal", "allclose", "while_loop"}
)
"""`if tensor` is an `is_nonzero`; `tolist` and `numpy` show themselves by `resolve_neg` alone."""

_LENGTHS = frozenset(
    """argwhere bincount coalesce masked_select nms nonzero nonzero_numpy repeat_interleave to_sparse
    to_sparse_bsc to_sparse_bsr to_sparse_csc to_sparse_csr unique_consecutive unique_dim
    unique_dim_consecutive _pack_padded_sequence _to_sparse _unique _unique2""".split()
)
"""What makes a tensor whose length depends on numbers."""


def numbers_read(name: str, operands: dict[str, Tensor], bound: dict[str, Any]) -> Iterator[str]:
    """The operands whose numbers an operator hands to Python, themselves or by the length of its result."""
    if name in _NUMBERS or name in _LENGTHS:
        # what a mask chooses among does not tell how much it chooses
        yield from ("mask",) if name == "masked_select" else operands
    elif name in ("index", "index_put", "index_put_"):
        yield from (role for role, t in operands.items() if "indices" in role and t.dtype is torch.bool)
    elif name == "where" and len(operands) == 1:
        yield from operands  # `where(condition)` is a `nonzero`
    elif name == "one_hot" and bound.get("num_classes", -1) == -1:
        yield from operands  # as many classes as the largest number says
    elif name in ("tensor_split", "narrow"):
        yield from (role for role in operands if role != "input")  # the places to cut at


_STORAGE_READS = ("__getitem__", "__iter__", "tolist")


@contextlib.contextmanager
def unseen_reads(notice: Callable[[Tensor | None], None]) -> Iterator[None]:
    """Meanwhile `notice` is told of the reads that no operator shows: as text, by DLPack, by a function of
    Python for each number, by an address, and from a storage, which does not tell whose it is (None).
    """

    def noticed(read: Callable[..., Any], *, addresses: bool = False) -> Callable[..., Any]:
        def reading(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not addresses or _asked_by_the_model():
                notice(tensor)
            return read(tensor, *args, **kwargs)

        return reading

    def unobserved(read: Callable[..., Any]) -> Callable[..., Any]:
        # a storage reads each of its bytes by operators of its own
        def reading(storage: Any, *args: Any, **kwargs: Any) -> Any:
            if _asked_by_the_model():
                notice(None)
            with _disable_current_modes():
                numbers = read(storage, *args, **kwargs)
                return iter(list(numbers)) if isinstance(numbers, Iterator) else numbers

        return reading

    with contextlib.ExitStack() as stack:

        def patch(owner: Any, name: str, new: Callable[..., Any]) -> None:
            stack.enter_context(mock.patch.object(owner, name, new))

        patch(torch._tensor_str, "_str", noticed(torch._tensor_str._str))
        for name in ("__dlpack__", "map_", "map2_", "apply_"):
            patch(Tensor, name, noticed(getattr(Tensor, name)))
        patch(Tensor, "data_ptr", noticed(Tensor.data_ptr, addresses=True))
        for owner in (torch.UntypedStorage, torch.TypedStorage):
            for name in _STORAGE_READS:
                patch(owner, name, unobserved(getattr(owner, name)))
        yield


def _asked_by_the_model() -> bool:
    """Not by PyTorch or bntool, which ask about the arguments of one op."""
    caller = sys._getframe(2).f_globals.get("__name__", "")
    return caller.partition(".")[0] not in ("torch", "bntool")


_SIZES = ("size", "numel", "nelement", "__len__")


@contextlib.contextmanager
def size_reads(notice: Callable[[], None]) -> Iterator[None]:
    """Meanwhile `notice` is told whenever Python code asks a tensor how long it is.

    Not what asks for it inside PyTorch or bntool: that is about the arguments of one op.
    """

    def noticed(read: Callable[..., Any]) -> Callable[..., Any]:
        def reading(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if _asked_by_the_model():
                notice()
            return read(tensor, *args, **kwargs)

        return reading

    with contextlib.ExitStack() as stack:
        for name in _SIZES:
            stack.enter_context(mock.patch.object(Tensor, name, noticed(getattr(Tensor, name))))
        slot: Any = torch._C.TensorBase.shape
        shape = noticed(slot.__get__)
        stack.enter_context(mock.patch.object(Tensor, "shape", property(shape)))
        yield
