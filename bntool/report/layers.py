"""One row of a summary."""

from __future__ import annotations

import dataclasses
from typing import Any

from bntool.report.counting import Counts
from bntool.report.tables import count, shape_text


@dataclasses.dataclass(frozen=True)
class Layer:
    """A module that has no children or holds tensors of its own.

    Shapes are those of the first tensor of the first call, with the batch; None where not seen.
    `counts` and `own_shapes` cover only the tensors that this module is the first to hold.
    """

    number: int
    name: str
    type: str
    input_shape: tuple[int, ...] | None
    output_shape: tuple[int, ...] | None
    counts: Counts
    own_shapes: tuple[tuple[int, ...], ...] = ()
    more_inputs: int = 0
    more_outputs: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "type": self.type,
            "input_shape": None if self.input_shape is None else list(self.input_shape),
            "output_shape": None if self.output_shape is None else list(self.output_shape),
            "trainable": self.counts.trainable,
            "frozen": self.counts.frozen,
            "buffers": self.counts.buffers,
        }

    def cells(self) -> list[str]:
        """Layer, name, input, output, trainable, frozen, buffers."""
        return [
            f"{self.type}-{self.number}",
            self.name,
            shape_text(self.input_shape) + (f" +{self.more_inputs}" if self.more_inputs else ""),
            shape_text(self.output_shape) + (f" +{self.more_outputs}" if self.more_outputs else ""),
            count(self.counts.trainable),
            count(self.counts.frozen),
            count(self.counts.buffers),
        ]
