"""What a proved fold of each model of other libraries costs, in forwards: `make prices`.

Each model runs in a process of its own on one thread, on the input that it is made for, and is measured in
processor time. Results are appended to `docs/prices.jsonl` as they come; `docs/prices.md` is written from
them.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools.sweeps.elsewhere import every_model
from tools.sweeps.libraries import Make, Shapes, entries, inputs_like
from tools.sweeps.sweeping import Row, arguments, sweep
from tools.sweeps.zoo import randomise

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "prices.jsonl"
ROUNDS = 3
PAGE = """\
---
orphan: true
---

# The price of a fold, in other libraries' models

Written by `make prices` from `prices.jsonl`, one line a model. The unit is one forward plus one copy of the
weights, the least that a new model which was run once can cost; medians of {rounds} rounds in processor time
on one thread, on the input that each model is made for. *Unchecked* is `fold` with `check="none"`, *proved*
is `fold` as it is by default.

|  | models | median | nine tenths below | most |
| --- | --- | --- | --- | --- |
| unchecked | {count} | {unchecked} |
| proved | {count} | {proved} |
| proved, above 10 M parameters | {large_count} | {large} |
| proved, up to 10 M parameters | {small_count} | {small} |

A forward of few milliseconds is soon outweighed by Python's part: some tens of microseconds for each op and
module in each of the five runs of a proof. The dearest, each with its forward in milliseconds:

| model | parameters | modules | forward, ms | unchecked | proved |
| --- | --- | --- | --- | --- | --- |
{dearest}
"""


def measured(make: Make, shapes: Shapes) -> Row:
    """The seconds of one forward and one copy of the weights, and what folds take of them."""
    import torch

    import bntool
    from bntool.graph.inputs import Inputs
    from bntool.observe.inference import observe_inferred

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = make().eval()
    randomise(model)
    inputs: Inputs = inputs_like(shapes) if shapes is not None else observe_inferred(model).inputs

    def forward() -> None:
        with torch.no_grad():
            model(*inputs.args, **inputs.kwargs)

    calls: dict[str, Callable[[], Any]] = {
        "forward": forward,
        "copy": lambda: [tensor.detach().clone() for tensor in (*model.parameters(), *model.buffers())],
        "unchecked": lambda: bntool.fold(model, inputs, check="none"),
        "proved": lambda: bntool.fold(model, inputs),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(ROUNDS + 1):  # the first warms up
        for name, call in calls.items():
            start = time.process_time()
            call()
            if round_:
                times[name].append(time.process_time() - start)
    unit = [sum(both) for both in zip(times["forward"], times["copy"], strict=True)]
    prices = {
        name: round(statistics.median(a / b for a, b in zip(times[name], unit, strict=True)), 2)
        for name in ("unchecked", "proved")
    }
    return {
        "status": "ok",
        "parameters": sum(p.numel() for p in model.parameters()),
        "modules": sum(1 for _ in model.modules()),
        "forward_ms": round(1000 * statistics.median(times["forward"]), 2),
        **prices,
    }


def page(rows: dict[str, Row]) -> str:
    """The document, from the rows by model."""
    found = [row for row in rows.values() if row["status"] == "ok"]
    large = [row for row in found if row["parameters"] > 10_000_000]
    small = [row for row in found if row["parameters"] <= 10_000_000]
    dearest = sorted(found, key=lambda row: -row["proved"])[:20]
    return PAGE.format(
        rounds=ROUNDS,
        count=len(found),
        unchecked=_spread(found, "unchecked"),
        proved=_spread(found, "proved"),
        large_count=len(large),
        large=_spread(large, "proved"),
        small_count=len(small),
        small=_spread(small, "proved"),
        dearest="\n".join(
            f"| {row['model']} | {row['parameters'] / 1e6:.1f} M | {row['modules']} | {row['forward_ms']} "
            f"| {row['unchecked']} | {row['proved']} |"
            for row in dearest
        ),
    )


def _spread(rows: list[Row], what: str) -> str:
    """Median, the value that nine tenths lie below, and the most."""
    values = sorted(row[what] for row in rows)
    if not values:
        return "– | – | –"
    return f"{statistics.median(values):.1f} | {values[int(0.9 * len(values))]:.1f} | {values[-1]:.1f}"


def main() -> None:
    chosen = arguments(__doc__, RESULTS, limit=120).parse_args()
    models: dict[str, tuple[Make, Shapes]] = {name: (make, shapes) for name, make, shapes in entries()}
    with contextlib.suppress(ModuleNotFoundError):
        models |= {name: (make, None) for name, make in every_model()}
    sweep(
        chosen,
        models,
        lambda name: measured(*models[name]),
        page,
        lambda row: f"{row['unchecked']} {row['proved']}" if row["status"] == "ok" else "",
    )


if __name__ == "__main__":
    main()
