"""Latency of models and files beside each other, for the commands that time what they made."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bntool.cli.devices import Devices, torch_device
from bntool.cli.session import Voice
from bntool.core.command_options import BenchOptions
from bntool.core.options import ExportOptions

if TYPE_CHECKING:
    from bntool.cli.opening import Opened
    from bntool.cli.writing import Places
    from bntool.core.latencies import Benchmark
    from bntool.graph.inputs import Inputs
    from bntool.results.results import SurgeryResult
    from bntool.runtime.benchmarking import Candidate


def timed(
    voice: Voice,
    candidates: Sequence[Candidate],
    inputs_of: Callable[[int], Inputs | None],
    bench: BenchOptions,
    devices: Devices,
    pairs: Sequence[tuple[str, str]] | None = None,
) -> Benchmark:
    """Time the candidates beside each other."""
    from bntool.runtime.benchmarking import On, benchmark

    with voice.progress("timing") as step:
        return benchmark(
            candidates,
            inputs_of,
            batches=bench.batch_sizes,
            rounds=bench.rounds,
            on=On(torch_device(devices.torch), devices.onnx if devices.named else None),
            pairs=pairs,
            progress=step,
        )


def timed_fold(
    voice: Voice,
    opened: Opened,
    done: tuple[SurgeryResult, Any],
    places: Places,
    bench: BenchOptions,
    devices: Devices,
    export: ExportOptions,
    seed: int,
) -> Benchmark:
    """The model before and after; with an ONNX file, that one too, beside that of the model before."""
    from bntool.runtime.benchmarking import Candidate

    subject, (_, after) = opened.subject, done
    if not subject.on_torch:
        new = places.model.model if places.model is not None else after.model
        pair = [Candidate("before", subject.model), Candidate("folded", new)]
        return timed(voice, pair, subject.batched(seed), bench, devices)
    inputs_of = subject.batched(seed)
    candidates = [Candidate("torch before", subject.runnable), Candidate("torch folded", after.runnable)]
    pairs = [("torch before", "torch folded")]
    if places.onnx is None:
        return timed(voice, candidates, inputs_of, bench, devices, pairs)
    from bntool.pipeline.serving import Serving, exported
    from bntool.pipeline.surgeries import unchanged

    with tempfile.TemporaryDirectory(prefix="bntool.bench.") as folder:
        plain = Path(folder) / "before.onnx"
        before = exported(subject, unchanged(subject), plain, Serving(export), voice)
        candidates += [Candidate("ONNX before", before.path), Candidate("ONNX folded", places.onnx.path)]
        pairs += [("ONNX before", "ONNX folded"), ("torch folded", "ONNX folded")]
        return timed(voice, candidates, inputs_of, bench, devices, pairs)
