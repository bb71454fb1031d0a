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
from bench_planning import Growth

LARGE = 10_000_000
"""Parameters from which a net counts as large."""

CALLS = ("unchecked", "proved", "full", "insert", "summary", "fx fuse")
"""The calls that are timed, as the page heads them."""

PAGE = """\
# Benchmarks

Written by `make bench`. {machine}.
The load average was {load:.1f} when it began: where that is not near 0, other work moved the figures.
Both sides of a ratio are measured in one run, in turn; times are medians, and a ratio is the median of the
ratios round by round. Folds and forwards run on one thread and are measured in processor time, which other
work on the machine moves less than the clock; commands are measured by the clock. A copy costs about four
times as much where its memory comes fresh from the system, so `copy` is not in proportion to the parameters.

## Fold, without verification

`bntool.fold(model, check="none")`: observe, plan, apply, a new model returned. The yardstick is what its user
runs, one forward of the model on one image of its usual size, and one copy of all its weights. Where no
example input is given and the model records none, bntool chooses a small image to observe on. Where folds
lead through a reshape to given sizes it observes twice, on two sizes. Beside it the `fuse` of `torch.fx`,
which copies the model too, folds what stands right behind a convolution, and looks at nothing else.

{folds}

{summary}

The aims are 1.3 above 10 M parameters and 2 up to that. Most of what a fold of a small net costs is Python's
work for each module and op, which does not shrink with the layers. repvgg_a2 merges branches by the blocks'
own method, in float64; `timm.utils.reparameterize_model` is that method in the model's own precision.

{calls}## Growth with the number of ops

Nets of four channels, made to measure: microseconds of processor time per op, and the exponent of the time to
plan over the number of ops (1 is linear).

{growth}

## Commands

{commands}
"""


def page(
    load: float,
    rows: list[dict[str, Any]],
    called: list[dict[str, Any]],
    grown: list[Growth],
    help_: dict[str, float],
    whole: dict[str, float],
) -> str:
    return PAGE.format(
        machine=_machine(),
        load=load,
        folds=_table(
            (
                "net",
                "parameters",
                "fold, ms",
                "forward, ms",
                "on",
                "copy, ms",
                "ratio",
                "fx fuse, ms",
                "to fx",
            ),
            (_fold_row(row) for row in sorted(rows, key=lambda row: -row["parameters"])),
        ),
        summary="\n".join(_summary(rows)),
        calls=_called(called),
        growth=_table(
            ("net", "ops", "observe", "plan", "apply", "exponent"),
            (line for growth in grown for line in _growth_rows(growth)),
        ),
        commands=_table(
            ("", "seconds", "yardstick", "seconds", "ratio"),
            [
                _command_row("`bntool --help`", "`import torch`", help_),
                _command_row(
                    "`bntool fold --export onnx` on resnet50, every check included",
                    "a bare script: load, `torch.fx` fuse, export, one ONNX Runtime comparison",
                    whole,
                ),
            ],
        ),
    )


CALLED_INTRO = """\
Each call to one forward plus one copy of the weights, in processor time on one thread, on the example input
that is given: `fold` with `check="none"`, as it is by default (proved) and with `check="full"`, `insert`,
`summary`, and the `fuse` of `torch.fx`. What bounds them:

- unchecked: one observed forward, Python's work for each module and op, and the new weights;
- proved: that, one forward of the candidate, and three runs on a small input, two of them in float64, where
  every weight is widened once; a model that goes by size runs twice more, on a longer input;
- full: seven forwards more on each side for the batches of 1, 2 and 3, in place of one;
- insert: two observed forwards, and a copy of the weights;
- summary: an observed forward, and the layer walk of `torchinfo`."""


def with_calls(text: str, rows: list[dict[str, Any]]) -> str:
    """The page with these whole calls in the place of those that it has."""
    before, _, rest = text.partition("## As they are called")
    head, mark, after = (rest or before).partition("## Growth")
    return (before if rest else head) + _called(rows) + mark + after


def _called(rows: list[dict[str, Any]]) -> str:
    """The part of the page about whole calls."""
    lines = []
    for row in sorted(rows, key=lambda row: -row["parameters"]):
        unit = f"{1000 * (row['forward'] + row['copy']):.0f}"
        ratios = (f"{row[key]:.2f}" if key in row else "cannot trace" for key in CALLS)
        lines.append([row["net"], f"{row['parameters'] / 1e6:.1f} M", unit, *ratios])
    told = []
    for what, chosen in (
        ("above 10 M parameters", [row for row in rows if row["parameters"] > LARGE]),
        ("up to 10 M parameters", [row for row in rows if row["parameters"] <= LARGE]),
        ("all", rows),
    ):
        medians = (f"{key} {statistics.median(r[key] for r in chosen if key in r):.2f}" for key in CALLS)
        worst = max(row["proved"] for row in chosen)
        told.append(f"- {what}: medians {', '.join(medians)}; proved at most {worst:.2f}.")
    head = ("net", "parameters", "forward + copy, ms", *CALLS)
    parts = ("## As they are called", CALLED_INTRO, _table(head, lines), "\n".join(told))
    return "\n\n".join(parts) + "\n\n"


def _machine() -> str:
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                processor = line.partition(":")[2].strip()
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, onnx {onnx.__version__}"
    return f"{processor}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def _fold_row(row: dict[str, Any]) -> list[str]:
    fold, forward, copy = (f"{1000 * row[key]:.0f}" for key in ("fold", "forward", "copy"))
    million = f"{row['parameters'] / 1e6:.1f} M"
    fx = [f"{1000 * row['fx']:.0f}", f"{row['to_fx']:.2f}"] if "fx" in row else ["cannot trace", ""]
    return [row["net"], million, fold, forward, row["size"], copy, f"{row['ratio']:.2f}", *fx]


def _summary(rows: list[dict[str, Any]]) -> Iterable[str]:
    large = [row["ratio"] for row in rows if row["parameters"] > LARGE]
    small = [row["ratio"] for row in rows if row["parameters"] <= LARGE]
    for ratios, what, limit in ((large, "above", 1.3), (small, "up to", 2.0)):
        within = sum(ratio <= limit for ratio in ratios)
        median, most = statistics.median(ratios), max(ratios)
        yield (
            f"- {len(ratios)} nets {what} 10 M parameters: median {median:.2f}, largest {most:.2f};"
            f" {within} within {limit}."
        )
    beside = [row["to_fx"] for row in rows if "fx" in row]
    faster, median = sum(ratio < 1 for ratio in beside), statistics.median(beside)
    yield f"- beside `torch.fx` where it traces: faster on {faster} of {len(beside)}, median {median:.2f}."
    for row in (row for row in rows if "own" in row):
        yield (
            f"- {row['net']}: `timm.utils.reparameterize_model` alone takes {1000 * row['own']:.0f} ms,"
            f" {row['own_ratio']:.2f} of the yardstick."
        )


def _growth_rows(growth: Growth) -> Iterable[list[str]]:
    figures = zip(growth.ops, growth.observe, growth.plan, growth.apply, strict=True)
    for ops, *seconds in figures:
        last = f"{growth.exponent:.2f}" if ops == growth.ops[-1] else ""
        yield [growth.net, f"{ops:,}", *(f"{1e6 * s / ops:.0f}" for s in seconds), last]


def _command_row(ours: str, yardstick: str, found: dict[str, float]) -> list[str]:
    seconds = f"{found['bntool']:.2f}", f"{found['yardstick']:.2f}"
    return [ours, seconds[0], yardstick, seconds[1], f"{found['ratio']:.2f}"]
