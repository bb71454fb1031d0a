"""Models made ready to run again and again on the same inputs, for timing."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from bntool.core.errors import BntoolError
from bntool.graph.inputs import Inputs
from bntool.runtime.libraries import CUDA
from bntool.runtime.memory import PeakMemory
from bntool.runtime.naming import named_providers, torch_device_of
from bntool.runtime.ort_runner import OrtRunner
from bntool.runtime.providers import onnxruntime
from bntool.runtime.torch_runner import TorchRunner


@dataclasses.dataclass(frozen=True)
class Ready:
    """`run` computes once, results dropped, and comes back when the device is done.

    It has run once already; `memory` is what that took at its peak, weights included.
    """

    run: Callable[[], None]
    device: str
    provider: str
    memory: int | None
    note: str = ""


@contextlib.contextmanager
def torch_ready(model: nn.Module, device: str, inputs: Inputs, *, tf32: bool = False) -> Iterator[Ready]:
    """A torch model, eager, in eval mode without gradients, TF32 off unless asked for."""
    on_cpu = device == "cpu"
    watch = PeakMemory(device)
    runner = TorchRunner(model, device, tf32=tf32)
    with runner.ready(inputs) as run:
        run()
        grown = watch.grown()
        # On the CPU the weights were held before; a GPU gets them now.
        weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers())) if on_cpu else 0
        yield Ready(run, runner.device, runner.provider, None if grown is None else grown + weights)


@contextlib.contextmanager
def onnx_ready(
    path: Path, device: str, inputs: Inputs, threads: int, *, tf32: bool = False
) -> Iterator[Ready]:
    """An ONNX file in ONNX Runtime, optimisations on, its inputs and outputs bound to the device.

    On CUDA the kernels are captured in a CUDA graph where every node is on the device. Raises
    `ExportError` and `DeviceError` as `OrtRunner`.
    """
    onnxruntime()  # the library itself is not the model's memory
    watch = PeakMemory(_memory_of(device), whole_device=True)
    runner, run, note = _bound(path, device, inputs, threads, tf32)
    run()
    yield Ready(run, runner.device, runner.provider, watch.grown(), note)


def _bound(
    path: Path, device: str, inputs: Inputs, threads: int, tf32: bool
) -> tuple[OrtRunner, Callable[[], None], str]:
    plain = OrtRunner(path, device, threads=threads, tf32=tf32)
    if plain.provider != CUDA:
        return plain, plain.bound(inputs), ""
    why = "some nodes stay on the CPU"
    if not plain.cpu_nodes:
        try:
            graph = OrtRunner(path, device, threads=threads, tf32=tf32, cuda_graph=True)
            run = graph.bound(inputs, fixed_outputs=True)
            run()
            return graph, run, "CUDA graph"
        except BntoolError as error:
            why = error.what
    return plain, plain.bound(inputs), f"no CUDA graph: {why}"


def _memory_of(device: str) -> str:
    """Whose memory a run on this device, or on these providers, takes."""
    names = named_providers(device)
    return torch_device_of(names) if names else device.partition(":")[0]


def torch_threads() -> int:
    """How many threads torch computes with on the CPU; ONNX Runtime is given as many."""
    return torch.get_num_threads()
