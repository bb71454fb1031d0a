"""Time models beside each other: the same inputs, the same device, in turn, so that a drift slows all."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bntool.core.errors import BntoolError, ExportError, UsageError
from bntool.core.latencies import LEAST_ROUNDS, Benchmark, Cost, Latency
from bntool.files.onnx_files import open_onnx
from bntool.graph.inputs import Inputs
from bntool.observe.isolation import Isolation, fresh
from bntool.runtime.libraries import first_line
from bntool.runtime.onnx_flops import onnx_flops
from bntool.runtime.ready import Ready, onnx_ready, torch_ready, torch_threads

WARM_UP = 3
_LEAST_SAMPLE = 2e-3
"""Seconds: a shorter run is repeated within one sample, which the clock and the scheduler blur otherwise."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A torch model, or the path of an ONNX file, and what it is called in the report."""

    name: str
    what: nn.Module | Path


@dataclasses.dataclass(frozen=True)
class On:
    """Where candidates run.

    Args:
        device: of torch, and of ONNX Runtime too, unless `onnx_device` names another.
        tf32: whether both may use TF32 on CUDA.
    """

    device: str = "cpu"
    onnx_device: str | None = None
    tf32: bool = False

    def ready(self, stack: contextlib.ExitStack, candidate: Candidate, inputs: Inputs) -> Ready:
        """A candidate made ready to run on these inputs. Raises `ExportError` where it does not take them."""
        if isinstance(candidate.what, Path):
            device = self.onnx_device or self.device
            opened = onnx_ready(candidate.what, device, inputs, torch_threads(), tf32=self.tf32)
            return stack.enter_context(opened)
        try:
            return stack.enter_context(torch_ready(candidate.what, self.device, inputs, tf32=self.tf32))
        except BntoolError:
            raise
        except Exception as error:  # whatever a model's forward raises
            raise ExportError(
                f"{candidate.name} does not run on {inputs.shapes()}: {first_line(error)}"
            ) from error


def benchmark(
    candidates: Sequence[Candidate],
    inputs_of: Callable[[int], Inputs | None],
    *,
    batches: Sequence[int] = (1, 8),
    rounds: int = 30,
    seconds: float = 20.0,
    on: On | None = None,
    pairs: Sequence[tuple[str, str]] | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Benchmark:
    """Latency of every candidate at every batch size, each compared with the first unless `pairs` says which.

    `inputs_of` makes the inputs of a batch size, or None where there are none. `rounds` samples are taken of
    each, fewer (never under 11) where a batch size takes longer than `seconds`. Torch runs eager, ONNX files
    in ONNX Runtime with as many threads. A batch size that a candidate does not take is left out and noted.

    Raises `UsageError` for no batch size that all take, or fewer than 11 rounds, and `DeviceError` where
    the device is not honoured.
    """
    on = on or On()
    if rounds < LEAST_ROUNDS:
        what = f"{rounds} round(s) tell no difference from noise"
        raise UsageError(what, next_step=f"take {LEAST_ROUNDS} or more")
    rows: list[Latency] = []
    notes: list[str] = []
    for batch in batches:
        inputs = inputs_of(batch)
        if inputs is None:
            notes.append(f"batch {batch} is left out: the inputs are nested, so no axis is surely the batch")
            continue
        progress(f"timing batch {batch}")
        with contextlib.ExitStack() as stack:
            try:
                ready = [on.ready(stack, candidate, inputs) for candidate in candidates]
            except ExportError as error:
                notes.append(f"batch {batch} is left out: {error.what}")
                continue
            samples = _interleaved([one.run for one in ready], rounds, seconds)
            rows += [
                Latency(c.name, batch, r.device, r.provider, tuple(s), r.memory, r.note)
                for c, r, s in zip(candidates, ready, samples, strict=True)
            ]
    if not rows:
        raise UsageError(
            "no batch size runs", where="; ".join(notes), next_step="name others with --batch-sizes"
        )
    costs = tuple(_cost(candidate, inputs_of(1)) for candidate in candidates)
    compared = pairs if pairs is not None else [(candidates[0].name, c.name) for c in candidates[1:]]
    return Benchmark(tuple(rows), costs, tuple(compared), torch_threads(), tuple(notes), on.tf32)


def _interleaved(runs: Sequence[Callable[[], None]], rounds: int, seconds: float) -> list[list[float]]:
    """Samples of each, in turn, every second round backwards; garbage of one is not paid by another."""
    repeats = []
    for run in runs:
        for _ in range(WARM_UP):
            run()
        repeats.append(max(1, math.ceil(_LEAST_SAMPLE / max(_timed(run, 1), 1e-9))))
    samples: list[list[float]] = [[] for _ in runs]
    end = time.perf_counter() + seconds
    for turn in range(rounds):
        if turn >= LEAST_ROUNDS and time.perf_counter() > end:
            break
        order = range(len(runs)) if turn % 2 == 0 else reversed(range(len(runs)))
        for i in order:
            samples[i].append(_timed(runs[i], repeats[i]))
    return samples


def _timed(run: Callable[[], None], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def _cost(candidate: Candidate, inputs: Inputs | None) -> Cost:
    if isinstance(candidate.what, Path):
        flops = onnx_flops(candidate.what, inputs) if inputs is not None else None
        return Cost(candidate.name, _numbers_in(candidate.what), flops)
    model = candidate.what
    parameters = sum(p.numel() for p in model.parameters())
    return Cost(candidate.name, parameters, _flops(model, inputs) if inputs is not None else None)


def _numbers_in(path: Path) -> int:
    """Floating numbers in the initializers of an ONNX file."""
    held = [value.const_value for value in open_onnx(path).model.graph.initializers.values()]
    return sum(int(t.size) for t in held if t is not None and t.dtype.is_floating_point())


def _flops(model: nn.Module, inputs: Inputs) -> int | None:
    """Two for each multiply-add of convolutions and matrix products, counted while the model runs."""
    placed = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    given = fresh(inputs.to(device=placed))
    try:
        with Isolation(model).run() as run, torch.no_grad(), FlopCounterMode(display=False) as counter:
            run(*given.args, **dict(given.kwargs))
    except Exception:  # noqa: BLE001 - a count that cannot be had is left out
        return None
    return int(counter.get_total_flops())
