"""What hands numbers or sizes of a tensor to Python, which may decide by them: a branch, a size, a factor."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

_NUMBERS = frozenset({"item", "_local_scalar_dense", "resolve_neg", "is_nonzero", "equal", "allclose"})
"""`if tensor` is an `is_nonzero`; `tolist` and `numpy` show themselves by `resolve_neg` alone."""

_LENGTHS = frozenset(
    """argwhere bincount masked_select nonzero nonzero_numpy repeat_interleave unique_consecutive unique_dim
    unique_dim_consecutive _unique _unique2""".split()
)
"""What makes a tensor whose length depends on numbers."""


def told(name: str, operands: dict[str, Tensor]) -> Iterator[str]:
    """The operands whose numbers an operator hands to Python, themselves or by the length of its result."""
    if name in _NUMBERS or name in _LENGTHS:
        # what a mask chooses among does not tell how much it chooses
        yield from ("mask",) if name == "masked_select" else operands
    elif name in ("index", "index_put", "index_put_"):
        yield from (role for role, t in operands.items() if "indices" in role and t.dtype is torch.bool)


@contextlib.contextmanager
def unseen_reads(notice: Callable[[Tensor], None]) -> Iterator[None]:
    """Meanwhile `notice` is told of the reads that no operator shows: as text, and by DLPack."""
    as_text, by_dlpack = torch._tensor_str._str, Tensor.__dlpack__

    def noticed(read: Callable[..., Any]) -> Callable[..., Any]:
        def reading(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            notice(tensor)
            return read(tensor, *args, **kwargs)

        return reading

    with (
        mock.patch.object(torch._tensor_str, "_str", noticed(as_text)),
        mock.patch.object(Tensor, "__dlpack__", noticed(by_dlpack)),
    ):
        yield


_SIZES = ("size", "numel", "nelement", "__len__")


@contextlib.contextmanager
def size_reads(notice: Callable[[], None]) -> Iterator[None]:
    """Meanwhile `notice` is told whenever Python code asks a tensor how long it is.

    Not what asks for it inside PyTorch or bntool: that is about the arguments of one op.
    """

    def told_of() -> None:
        if sys._getframe(2).f_globals.get("__name__", "").partition(".")[0] not in ("torch", "bntool"):
            notice()

    def noticed(read: Callable[..., Any]) -> Callable[..., Any]:
        def reading(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            told_of()
            return read(tensor, *args, **kwargs)

        return reading

    with contextlib.ExitStack() as stack:
        for name in _SIZES:
            stack.enter_context(mock.patch.object(Tensor, name, noticed(getattr(Tensor, name))))
        slot: Any = torch._C.TensorBase.shape
        shape = noticed(slot.__get__)
        stack.enter_context(mock.patch.object(Tensor, "shape", property(shape)))
        yield
