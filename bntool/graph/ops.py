"""The vocabulary of the graph: every kind of op that a law reads, its roles and its attributes.

All front ends speak it: what an eager forward, an exported program and an ONNX file have in common has one
kind, under the name of PyTorch's functional form. An op that is in none of these words keeps the name that
its own library gives it, and no law passes it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from bntool.graph.affine import Affine

NoneType = type(None)
Types = tuple[type, ...]


@dataclasses.dataclass(frozen=True)
class Word:
    """One kind of op.

    Args:
        reads: roles that its operands have; a role that ends in `_` stands for a numbered row of them.
        attrs: attributes and their types; not every front end gives each of them.
    """

    reads: frozenset[str]
    attrs: Mapping[str, Types] = dataclasses.field(default_factory=dict)

    def takes(self, role: str) -> bool:
        """Whether an operand may have this role."""
        return role in self.reads or any(one.endswith("_") and role.startswith(one) for one in self.reads)

    def faults(self, roles: Mapping[str, Any], attrs: Mapping[str, Any]) -> list[str]:
        """What is not as the vocabulary has it."""
        found = [f"reads {role}" for role in roles if not self.takes(role)]
        found += [f"has {name}" for name in attrs if name not in self.attrs]
        found += [
            f"{name} is a {type(value).__name__}"
            for name, value in attrs.items()
            if name in self.attrs and not isinstance(value, self.attrs[name])
        ]
        return found


_INT: Types = (int,)
_INTS: Types = (tuple, list)
_BOOL: Types = (bool,)
_FLOAT: Types = (float, int)


def _word(reads: str = "input", /, **attrs: Types) -> Word:
    return Word(frozenset(reads.split()), attrs)


_LAYER = "input weight bias"
_REDUCTION = {"axes": (NoneType, tuple, list), "keepdim": _BOOL}
_ARITHMETIC = _word("input other out", number=(NoneType, float, int), alpha=(NoneType, float, int))
_POOL = {
    "dims": _INT,
    "padding": _INTS,
    "ceil_mode": _BOOL,
    "count_include_pad": _BOOL,
    "divisor_override": (NoneType, int),
    "single": _BOOL,
}

OPS: Mapping[str, Word] = {
    # layers
    "conv": _word(
        _LAYER,
        dims=_INT,
        transposed=_BOOL,
        stride=_INTS,
        padding=(tuple, list, str),
        dilation=_INTS,
        groups=_INT,
        output_padding=_INTS,
    ),
    "linear": _word(_LAYER),
    "matmul": _word(_LAYER),
    "batch_norm": _word(
        "input weight bias running_mean running_var stored_",
        eps=_FLOAT,
        training=_BOOL,
        axis=_INT,
        frozen=_BOOL,
        map=(Affine,),
    ),
    "prelu": _word("input weight", axis=_INT),
    "scaled_dot_product_attention": _word("query key value attn_mask", dropout=(bool, float)),
    # arithmetic
    **dict.fromkeys(("add", "sub", "rsub", "mul", "div"), _ARITHMETIC),
    "product": _word("input other"),
    "relu": _word(),
    "leaky_relu": _word(slope=_FLOAT),
    "identity": _word(),
    "clamp": _word("input min max", low=(NoneType, float, int), high=(NoneType, float, int)),
    "absorbed": _ARITHMETIC,  # arithmetic that a BatchNorm written out was made of
    # over axes
    **dict.fromkeys(("mean", "sum", "amax", "amin", "order_statistic"), _word("input out", **_REDUCTION)),
    **dict.fromkeys(("std", "var", "std_mean", "var_mean"), _word("input out", **_REDUCTION)),
    "vector_norm": _word("input out", **_REDUCTION),
    **dict.fromkeys(
        ("scatter_sum", "scatter_mean", "scatter_extreme"),
        _word("input index src source", axis=_INT, source=(str,), elementwise=_BOOL),
    ),
    "max_pool": _word("input", **_POOL),
    "avg_pool": _word("input", **_POOL),
    "adaptive_avg_pool": _word(dims=_INT),
    "upsample": _word(dims=_INT),
    "grid_sample": _word("input other", zeros=_BOOL),
    "unfold": _word(padding=_INTS, dims=_INT),
    # places
    "concat": _word("input_ tensors_ out", axis=_INT),
    "stack": _word("input_ tensors_ out", axis=_INT),
    "split": _word(axis=_INT),
    "unbind": _word(axis=_INT),
    "slice": _word(axis=_INT, start=_INT, stop=_INT, step=_INT),
    "select": _word(axis=_INT, index=_INT),
    "index_select": _word("input index indices_", axis=_INT, indices=_INTS),
    "flip": _word(axes=_INTS),
    "roll": _word(axes=_INTS, shifts=_INTS, move=_INTS),
    "pad": _word(mode=(str,), pads=_INTS, value=_FLOAT),
    "permute": _word(dims=_INTS, swap=_INTS, move=_INTS),
    "reshape": _word(),
    "flatten": _word(),
    "squeeze": _word(axes=(NoneType, tuple, list, int)),
    "unsqueeze": _word(axes=_INTS, axis=_INT),
    "expand": _word(),
    "repeat": _word(repeats=_INTS),
    "pixel_shuffle": _word(factor=_INT),
    "pixel_unshuffle": _word(factor=_INT),
    "channel_shuffle": _word(groups=_INT),
}
"""Every word. Where a front end cannot tell an attribute, it leaves it out, and the law gives a reason."""


def permuted_axes(attrs: Mapping[str, Any], rank: int) -> tuple[int, ...]:
    """The order of axes of a `permute`: `dims` in full, `swap` of two, or `move` of some to new places."""
    if "swap" in attrs:
        dims = list(range(rank))
        if rank > 1:
            a, b = (axis % rank for axis in attrs["swap"])
            dims[a], dims[b] = dims[b], dims[a]
        return tuple(dims)
    if "move" in attrs:
        moved = {to % rank: axis % rank for axis, to in zip(*attrs["move"], strict=True)}
        rest = iter(axis for axis in range(rank) if axis not in moved.values())
        return tuple(moved[place] if place in moved else next(rest) for place in range(rank))
    return tuple(axis % rank for axis in attrs["dims"])
