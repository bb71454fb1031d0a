"""Runners: one way to run a model, whatever executes it, with the device read back from what really ran."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from bntool.graph.inputs import Inputs
from bntool.runtime.ort_runner import OrtRunner
from bntool.runtime.torch_runner import TorchRunner

__all__ = ["OrtRunner", "Runner", "TorchRunner"]


class Runner(Protocol):
    """Something that runs a model: `run` returns every output by name, on the CPU.

    `device` and `provider` are read back from what executes the model, never from what was asked for.
    """

    @property
    def label(self) -> str: ...

    @property
    def device(self) -> str: ...

    @property
    def provider(self) -> str: ...

    def run(self, inputs: Inputs) -> dict[str, Tensor]: ...
