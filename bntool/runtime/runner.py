"""One way to run a model, whatever executes it, with the device read back from what really ran."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from bntool.graph.inputs import Inputs


class Runner(Protocol):
    """Something that runs a model: `run` returns every output by name, on the CPU.

    `device` and `provider` are read back from what executes the model, never from what was asked for. What a
    runner raises where the model does not run is its own.
    """

    @property
    def label(self) -> str:
        """What runs, in words."""

    @property
    def device(self) -> str:
        """`cpu`, or `cuda:0 (name of the card)`."""

    @property
    def provider(self) -> str:
        """`torch`, or an execution provider of ONNX Runtime."""

    def run(self, inputs: Inputs) -> dict[str, Tensor]: ...


def fits(axes: Sequence[int | str | None], shape: Sequence[int]) -> bool:
    """Whether every fixed axis has its length; ONNX Runtime tells an unknown rank as no axes."""
    fixed = [not isinstance(n, int) or n == m for n, m in zip(axes, shape, strict=False)]
    return not axes or (len(axes) == len(shape) and all(fixed))


class FileRunner(Runner, Protocol):
    """A runner of an ONNX file, which says what it takes."""

    @property
    def signature(self) -> list[tuple[str, str, list[int | str | None]]]:
        """Name, type and axes of every input; an axis that the file leaves open is a name or None."""

    @property
    def input_names(self) -> tuple[str, ...]: ...

    def accepts(self, inputs: Inputs) -> bool:
        """Whether the file takes these: their names, types and shapes."""
