"""Latency of models and files beside each other, for the commands that time what they made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bntool.cli.devices import Devices, torch_device
from bntool.cli.session import Voice
from bntool.core.options import BenchOptions

if TYPE_CHECKING:
    from torch import nn

    from bntool.benchmarking import Candidate
    from bntool.inputs import Inputs
    from bntool.latencies import Benchmark


def timed(
    voice: Voice,
    candidates: Sequence[Candidate],
    inputs_of: Callable[[int], Inputs | None],
    bench: BenchOptions,
    devices: Devices,
    pairs: Sequence[tuple[str, str]] | None = None,
) -> Benchmark:
    """Time the candidates beside each other."""
    from bntool.benchmarking import benchmark

    with voice.progress("timing") as step:
        return benchmark(
            candidates,
            inputs_of,
            batches=bench.batch_sizes,
            rounds=bench.rounds,
            device=torch_device(devices.torch),
            onnx_device=devices.onnx if devices.named else None,
            pairs=pairs,
            progress=step,
        )


def timed_pair(
    voice: Voice,
    pair: tuple[nn.Module | Path, nn.Module | Path],
    inputs_of: Callable[[int], Inputs | None],
    bench: BenchOptions,
    devices: Devices,
) -> dict[str, Any]:
    """Time what was folded before and after, say it, and return the document's part about it."""
    from bntool.benchmarking import Candidate
    from bntool.report.latency import latency_text

    candidates = [Candidate(name, what) for name, what in zip(("before", "folded"), pair, strict=True)]
    found = timed(voice, candidates, inputs_of, bench, devices)
    voice.say()
    voice.say(latency_text(found))
    return {"latency": found.to_dict()}
