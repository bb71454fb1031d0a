"""How fast models and files run, beside each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bntool.api.asked import Model
from bntool.core.errors import UsageError
from bntool.core.latencies import Benchmark
from bntool.results.latency import latency_text
from bntool.runtime.benchmarking import Candidate, On, benchmark
from bntool.runtime.torch_runner import require_torch_device
from bntool.subjects import subject_of


@dataclasses.dataclass(frozen=True)
class Timed(Benchmark):
    """A benchmark that prints itself as its table."""

    def __str__(self) -> str:
        return latency_text(self)


def bench(
    *models: Model,
    example_inputs: Any = None,
    names: Sequence[str] = (),
    batch_sizes: Sequence[int] = (1, 8),
    rounds: int = 30,
    device: str = "cpu",
    seed: int = 0,
) -> Timed:
    """Time models in eval mode on the same inputs and device, in turn, each beside the first.

    Args:
        models: two or more: modules, exported programs, TorchScript, ONNX files, or paths and references of
            them. Torch runs eager, ONNX files run in ONNX Runtime with as many threads.
        example_inputs: inputs of the first; inferred, or taken from its file, where they are not given.
        names: what the models are called; their classes or files where it is not given.
        batch_sizes: batch sizes to time; one that a model does not take is left out and noted.
        rounds: samples of each; fewer where a batch size takes over 20 s.
        device: `cpu`, or `cuda`, which must be there.
        seed: of the inputs.

    Raises:
        UsageError: fewer than two models, no batch size that all take, or fewer than 11 rounds.
        DeviceError: the device is not there, or not honoured.
    """
    if len(models) < 2 or (names and len(names) != len(models)):
        raise UsageError(
            f"there are {len(models)} models" + (f" and {len(names)} names" if names else ""),
            next_step="give two models or more, and a name for each or none",
        )
    require_torch_device(device)
    subjects = [subject_of(model, example_inputs if i == 0 else None) for i, model in enumerate(models)]
    told = list(names) or [
        subject.name or type(model).__name__ for subject, model in zip(subjects, models, strict=True)
    ]
    if len(set(told)) < len(told):
        told = [f"{name} ({letter})" for name, letter in zip(told, "ABCDEFGHIJKLMNOP", strict=False)]
    candidates = [
        Candidate(name, subject.runnable if subject.runnable is not None else Path(subject.model))
        for name, subject in zip(told, subjects, strict=True)
    ]
    found = benchmark(
        candidates,
        subjects[0].batched(seed),
        batches=batch_sizes,
        rounds=rounds,
        on=On(device),
    )
    return Timed(**{field.name: getattr(found, field.name) for field in dataclasses.fields(found)})
