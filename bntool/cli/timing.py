"""Latency of models and files beside each other, for the commands that time what they made."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bntool.cli import devices, serving
from bntool.cli.session import Session, Voice

if TYPE_CHECKING:
    from torch import nn

    from bntool.benchmarking import Candidate
    from bntool.inputs import Inputs
    from bntool.latencies import Benchmark
    from bntool.results import SurgeryResult


def timed(
    voice: Voice,
    candidates: Sequence[Candidate],
    inputs_of: Callable[[int], Inputs | None],
    options: dict[str, Any],
    pairs: Sequence[tuple[str, str]] | None = None,
) -> Benchmark:
    """Time the candidates beside each other."""
    from bntool.benchmarking import benchmark

    with voice.progress("timing") as step:
        return benchmark(
            candidates,
            inputs_of,
            batches=options["batch_sizes"],
            rounds=options["rounds"],
            device=devices.torch_device(options["device"]),
            onnx_device=options["onnx_device"] if options.get("providers") else None,
            pairs=pairs,
            progress=step,
        )


def timed_pair(
    voice: Voice,
    pair: tuple[nn.Module | Path, nn.Module | Path],
    inputs_of: Callable[[int], Inputs | None],
    options: dict[str, Any],
) -> dict[str, Any]:
    """Time what was folded before and after, say it, and return the document's part about it."""
    from bntool.benchmarking import Candidate
    from bntool.report.latency import latency_text

    candidates = [Candidate(name, what) for name, what in zip(("before", "folded"), pair, strict=True)]
    found = timed(voice, candidates, inputs_of, options)
    voice.say()
    voice.say(latency_text(found))
    return {"latency": found.to_dict()}


def timed_fold(
    session: Session, result: SurgeryResult, onnx: Path | None, options: dict[str, Any]
) -> Benchmark:
    """The model before and after in torch; with `onnx`, its file too, beside that of the model before."""
    from bntool.benchmarking import Candidate, rebatching

    inputs_of = rebatching(session.example, session.seed)
    candidates = [Candidate("torch before", session.model), Candidate("torch folded", result.model)]
    pairs = [("torch before", "torch folded")]
    if onnx is None:
        return timed(session.voice, candidates, inputs_of, options, pairs)
    from bntool.surgeries import unchanged

    with tempfile.TemporaryDirectory(prefix="bntool.bench.") as folder:
        plain = {**options, "export_to": None}
        original, path = unchanged(session.model), Path(folder) / "before.onnx"
        before = serving.exported_file(session, original, path, plain, merge=False)
        candidates += [Candidate("ONNX before", before.path), Candidate("ONNX folded", onnx)]
        pairs += [("ONNX before", "ONNX folded"), ("torch folded", "ONNX folded")]
        return timed(session.voice, candidates, inputs_of, options, pairs)
