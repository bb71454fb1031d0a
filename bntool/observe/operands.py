"""The tensors among the arguments and the results of one call of an operator."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from bntool.observe.side_effects import storage_of


def operands_of(bound: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors among the arguments by role; those of a list are numbered."""
    found: dict[str, Tensor] = {}
    for name, item in bound.items():
        role = "input" if name == "self" else name
        if isinstance(item, Tensor):
            found[role] = item
        elif isinstance(item, list | tuple):
            for i, entry in enumerate(item):
                if isinstance(entry, Tensor):
                    found[f"{role}_{i}"] = entry
    return found


def is_written(role: str, written: frozenset[str]) -> bool:
    """Whether the operator writes to this operand, or to the list it stands in (`input_0`, `out_1`)."""
    stem, _, index = role.rpartition("_")
    name = stem if index.isdigit() else role
    return name in written or (name == "input" and "self" in written)


def is_one_of(tensor: Tensor, targets: list[Tensor]) -> bool:
    """Whether a result is what was written to, or shares its memory."""
    memory = storage_of(tensor)
    return any(
        tensor is target or (memory is not None and memory == storage_of(target)) for target in targets
    )


def is_handed_on(tensor: Tensor, operands: dict[str, Tensor]) -> bool:
    """`contiguous`, `to` and eval dropout return their input itself."""
    return any(tensor is source for source in operands.values())


def seen_through(made: list[Tensor], operands: dict[str, Tensor]) -> tuple[str, ...]:
    """The operands whose memory a result shares: those that were written to, and those it is a view of."""
    storages = {storage_of(tensor) for tensor in made} - {None}
    return tuple(role for role, tensor in operands.items() if storage_of(tensor) in storages)


def tensors_in(out: Any) -> Iterator[Tensor]:
    if isinstance(out, Tensor):
        yield out
    elif isinstance(out, list | tuple):
        for item in out:
            yield from tensors_in(item)
