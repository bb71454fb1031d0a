"""docs/benchmarks.md, from what `make bench` measured."""

from __future__ import annotations

import contextlib
import os
import platform
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnx
import torch
import torchvision
from bench_calls import CALLS, PEERS
from bench_nets import NETS

LARGE = 10_000_000
"""Parameters from which a net counts as large."""

SCALED = ("image, side", "batch", "depth")
"""What is made larger."""

PAGE = """\
# Benchmarks

Written by `make bench`. {machine}.
The load average lay between {least} and {most} while it ran: where that is not near 0, other work moved the
figures. Both sides of a ratio are measured in one run, in turn; a ratio is the median of the ratios round by
round. {clock}; commands are
measured by the clock.{missing}

## bntool's calls

Each to one forward plus one copy of the weights, the least that a new model which was run once can cost, on
one input of the usual size: `fold` with `check="none"`, as it is by default (proved), and with
`check="full"`; `insert` into the folded model; `summary`; `calibrate` on one batch; `verify` of the folded
model; `export_onnx`. {limits}

{calls}

{summary}

## Other tools on the same nets

In the same rounds and the same unit. They do less, or other things: `torch.fx`'s `fuse` folds what stands
right behind a convolution and looks at nothing else; `jit.freeze` traces, inlines and folds; OpenVINO,
onnxsim and onnxslim get an ONNX file that was exported before, which is not counted. None of them checks.

{peers}

## Growth

A fold with the size of the image, with the batch and with the depth. The proof runs on small inputs whatever
the example is, so that it grows with the example as one observed forward and one of the candidate do.

{scaled}

With the number of ops, on nets of four channels made to measure: microseconds of processor time per op, and
the exponent of the time to plan over the number of ops (1 is linear).

{growth}

## Memory

The most that a process of its own holds beyond the model, in multiples of the weights: the limit is the new
weights themselves, and what the candidate's forward takes. A proof makes no copy in float64: each number is
widened when an op reads it. With the original's own weights, 1 more, it is to stay within 2.5 and a forward.

{memory}

## Commands

By the clock, on resnet50. Beside `bntool fold --export onnx` a bare script: load, `torch.fx` fuse, export,
one comparison in ONNX Runtime. What bounds them is torch: its import, and its exporter. A command also reads
and judges the pickle, writes the folded model and its side file, and exports with an open batch axis; its
full check runs batches of 1, 2 and 3 in torch, in float64 and in two sessions of ONNX Runtime.

{commands}
"""

LIMITS = """What bounds them:

- unchecked: one observed forward, Python's work for each module and op, and the new weights;
- proved: that, one forward of the candidate, and three runs on a small input, two of them in float64, where
  every weight is widened once; a model that goes by size runs twice more, on a longer input. Of a net of few
  parameters and many layers it is Python's part of five runs that counts, some 25 µs for each op and module;
- full: seven forwards more on each side for the batches of 1, 2 and 3, in place of one;
- insert: two observed forwards, four runs on a small input, and a copy of the weights;
- summary: an observed forward, and the layer walk of `torchinfo`;
- calibrate: a forward that is watched, and one before it;
- verify: forwards of batches of 1, 2 and 3 on both sides, and in float64 at full size;
- export: torch's own capture and conversion."""


def _clock(threads: int) -> str:
    if threads > 1:
        return f"Calls and forwards run on {threads} threads and are measured by the clock"
    return (
        "Calls and forwards run on one thread and are measured in processor time, which other work on the\n"
        "machine moves less than the clock"
    )


def page(kept: dict[str, Any]) -> str:
    """The page of the rows that were measured."""
    loads = kept.get("loads") or [0.0]
    rows = sorted(kept.get("calls", {}).items(), key=lambda item: -item[1]["parameters"])
    return PAGE.format(
        machine=_machine(),
        clock=_clock(kept.get("threads", 1)),
        missing=_missing(kept),
        least=min(loads),
        most=max(loads),
        limits=LIMITS,
        calls=_table(
            ("net", "parameters", "modules", "forward + copy, ms", *CALLS),
            (_called(n, r, CALLS) for n, r in rows),
        ),
        summary="\n".join(_summary([row for _, row in rows])),
        peers=_table(
            ("net", "parameters", "modules", "forward + copy, ms", *PEERS),
            (_called(n, r, PEERS) for n, r in rows),
        ),
        scaled=_table(
            ("larger by", "net", "input", "forward, ms", "copy, ms", "unchecked", "proved"),
            (_scaled(part, row) for part, found in kept.items() if part in SCALED for row in found.values()),
        ),
        growth=_table(
            ("net", "ops", "observe", "plan", "apply", "exponent"),
            (line for row in kept.get("growth", {}).get("all", ()) for line in _growth(row)),
        ),
        memory=_table(
            ("net", "weights, MB", "forward", "fold, unchecked", "fold, proved"),
            (_memory(name, row) for name, row in kept.get("memory", {}).items()),
        ),
        commands=_table(
            ("", "seconds", "yardstick", "seconds", "ratio"),
            (_command(name, row) for name, row in kept.get("commands", {}).get("all", {}).items()),
        ),
    )


def _missing(kept: dict[str, Any]) -> str:
    """What is still to be measured."""
    parts = [part for part in (*SCALED, "memory", "growth", "commands") if part not in kept]
    left = [*(name for name in NETS if name not in kept.get("calls", {})), *parts]
    return f" Not measured yet, and next in `make bench`: {', '.join(left)}." if left else ""


def _called(name: str, row: dict[str, Any], keys: Iterable[str]) -> list[str]:
    unit = f"{1000 * (row['forward'] + row['copy']):.0f}"
    figures = (row.get(key, "") for key in keys)
    shown = (figure if isinstance(figure, str) else f"{figure:.2f}" for figure in figures)
    return [name, f"{row['parameters'] / 1e6:.1f} M", f"{row['modules']:,}", unit, *shown]


def _summary(rows: list[dict[str, Any]]) -> Iterable[str]:
    for what, chosen in (
        ("above 10 M parameters", [row for row in rows if row["parameters"] > LARGE]),
        ("up to 10 M parameters", [row for row in rows if row["parameters"] <= LARGE]),
        ("all", rows),
    ):
        if chosen:
            figures = {key: [row[key] for row in chosen if not isinstance(row[key], str)] for key in CALLS}
            medians = (f"{key} {statistics.median(found):.2f}" for key, found in figures.items() if found)
            worst = max(row["proved"] for row in chosen)
            yield f"- {what}: medians {', '.join(medians)}; proved at most {worst:.2f}."


def _scaled(part: str, row: dict[str, Any]) -> list[str]:
    times = (f"{1000 * row[key]:.0f}" for key in ("forward", "copy"))
    ratios = (f"{row['ratios'][key]:.2f}" for key in ("unchecked", "proved"))
    return [part, row["net"], row["shape"], *times, *ratios]


def _growth(row: dict[str, Any]) -> Iterable[list[str]]:
    figures = zip(row["ops"], row["observe"], row["plan"], row["apply"], strict=True)
    for ops, *seconds in figures:
        last = f"{row['exponent']:.2f}" if ops == row["ops"][-1] else ""
        yield [row["net"], f"{ops:,}", *(f"{1e6 * s / ops:.0f}" for s in seconds), last]


def _memory(name: str, row: dict[str, Any]) -> list[str]:
    parts = (f"{row[key] / row['weights']:.2f}" for key in ("forward", "unchecked", "proved"))
    return [name, f"{row['weights'] / 1e6:.0f}", *parts]


def _command(name: str, row: dict[str, float]) -> list[str]:
    ours = "`bntool --help`" if name == "help" else f"`bntool fold --export onnx`, {name}"
    yardstick = "`import torch`" if name == "help" else "the bare script"
    return [ours, f"{row['seconds']:.2f}", yardstick, f"{row['yardstick']:.2f}", f"{row['ratio']:.2f}"]


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def _machine() -> str:
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                processor = line.partition(":")[2].strip()
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, onnx {onnx.__version__}"
    return f"{processor}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}"
