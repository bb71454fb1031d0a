"""What is found in a file on looking at it: facts, classes, tensors, and what is suspicious."""

from __future__ import annotations

import dataclasses
import math
from typing import Any


@dataclasses.dataclass(frozen=True)
class TensorRow:
    """One tensor: qualified name, dtype as torch or ONNX names it, shape, bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, name: str, dtype: str, shape: tuple[int, ...], item_bytes: int) -> TensorRow:
        return cls(name, dtype, shape, math.prod(shape) * item_bytes)

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape), "bytes": self.nbytes}


@dataclasses.dataclass
class Found:
    """`classes` maps the names that pickles refer to, to what becomes of them (`pickles.standing`).

    `suspicious` holds what no honest file does, in words that follow `it`.
    """

    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    classes: dict[str, str] = dataclasses.field(default_factory=dict)
    tensors: list[TensorRow] = dataclasses.field(default_factory=list)
    suspicious: list[str] = dataclasses.field(default_factory=list)

    def suspect(self, why: str) -> None:
        if why not in self.suspicious:
            self.suspicious.append(why)
