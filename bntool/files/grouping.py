"""What belongs together among the tensors of a file: weights, averaged copies, an optimizer's state."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from bntool.files.looking import TensorRow

_STATE = re.compile(r"(?P<optimizer>.+)\.state\.[^.]+\.(?P<what>[^.]+)")
_USUAL = frozenset(
    "step exp_avg exp_avg_sq max_exp_avg_sq momentum_buffer square_avg acc_delta grad_avg sum exp_inf".split()
)
_AVERAGED = re.compile(r"(?i)(^|[_.])(ema|swa|averaged?|shadow|teacher|momentum_encoder)([_.]|$)")
_WRAPPERS = ("module.", "_orig_mod.")


@dataclasses.dataclass(frozen=True)
class Group:
    """Tensors under one name; `of` is the group whose tensors these are once more, name by name."""

    name: str
    what: str
    tensors: tuple[TensorRow, ...]
    of: str = ""

    @property
    def nbytes(self) -> int:
        return sum(row.nbytes for row in self.tensors)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "what": self.what,
            "tensors": len(self.tensors),
            "bytes": self.nbytes,
            "copy_of": self.of,
        }


def grouped(tensors: Sequence[TensorRow], *, keyed: bool) -> list[Group]:
    """The tensors in groups, in the order of their first ones; a file of weights alone is one group.

    `keyed` says that the file is a dict, of weights and other things.
    """
    names = [row.name for row in tensors]
    depth = _depth([name for name in names if not _state_of(name)], keyed=keyed)
    held: dict[tuple[str, str], list[TensorRow]] = {}
    for row in tensors:
        state = _state_of(row.name)
        key = (state, "optimizer state") if state else (".".join(row.name.split(".")[:depth]), "weights")
        held.setdefault(key, []).append(row)
    groups: list[Group] = []
    for (name, what), rows in held.items():
        copied = _copied(name, rows, groups) if what == "weights" else ""
        averaged = what == "weights" and _AVERAGED.search(name) is not None
        groups.append(Group(name, "averaged weights" if averaged else what, tuple(rows), copied))
    return groups


def _state_of(name: str) -> str:
    """`optimizer.state.*.exp_avg` for a part of an optimizer's state."""
    found = _STATE.fullmatch(name)
    if found is None or ("optim" not in found["optimizer"].lower() and found["what"] not in _USUAL):
        return ""
    return f"{found['optimizer']}.state.*.{found['what']}"


def _depth(names: Sequence[str], *, keyed: bool) -> int:
    """How many parts of a name tell models apart: those up to an averaged copy, or the file's own keys.

    The layers of one model repeat their names too, and are no groups.
    """
    for depth in range(1, 4):
        heads = {".".join(name.split(".")[:depth]) for name in names}
        if len(heads) > 1:
            return depth if any(map(_AVERAGED.search, heads)) or (keyed and depth == 1) else 0
    return 0


def _bare(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.removeprefix(wrapper)
    return name


def _copied(name: str, rows: Sequence[TensorRow], earlier: Sequence[Group]) -> str:
    def held(head: str, tensors: Sequence[TensorRow]) -> set[tuple[str, tuple[int, ...]]]:
        return {(_bare(row.name[len(head) :].lstrip(".")), tuple(row.shape)) for row in tensors}

    own = held(name, rows)
    alike = (g.name for g in earlier if g.what == "weights" and held(g.name, g.tensors) <= own)
    return next(alike, "")
