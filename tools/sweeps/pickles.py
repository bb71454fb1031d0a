"""Load the whole-module pickle of every torchvision builder and of a timm model per family: `make pickles`.

The models are saved by one process and loaded, without --trust-pickle, by another that has imported neither
library. Results are appended to `docs/pickles.jsonl` as they come, so that the run can be stopped and gone on
with; `docs/pickles.md` is written from them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from tools.sweeps.sweeping import Results, arguments, not_ok

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "pickles.jsonl"
COVERAGE = ROOT / "docs" / "coverage.jsonl"
BATCH = 12
MAX_PARAMETERS = 1_000_000_000


def names_to_try() -> list[str]:
    """Every torchvision builder, and of each of timm's families the smallest model whose size is known."""
    import timm
    import torchvision

    sizes = {}
    for line in COVERAGE.read_text().splitlines():
        row = json.loads(line)
        sizes[row["model"]] = row.get("parameters") or float("inf")
    names = [f"torchvision:{name}" for name in torchvision.models.list_models()]
    for family in timm.list_modules():
        members = [f"timm:{name}" for name in timm.list_models(module=family)]
        if members:
            names.append(min(members, key=lambda name: sizes.get(name, 1e18)))
    return names


def save_batch(names: list[str], folder: Path) -> dict[str, dict[str, Any]]:
    """Save each model whole; what could not be saved is a row already."""
    import torch

    from bntool.files.references import build

    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        try:
            model = build(name).model
            if sum(p.numel() for p in model.parameters()) > MAX_PARAMETERS:
                rows[name] = {"status": "too large"}
            else:
                torch.save(model, folder / f"{name.replace(':', '-')}.pt")
        except Exception as error:  # noqa: BLE001 - the row is the report
            rows[name] = {"status": "cannot be made or saved", "error": f"{type(error).__name__}: {error}"}
    return rows


def load_batch(names: list[str], folder: Path) -> dict[str, dict[str, Any]]:
    from torch import nn

    from bntool.api import load
    from bntool.core.errors import LoadError

    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        path = folder / f"{name.replace(':', '-')}.pt"
        if not path.exists():
            continue
        start = time.perf_counter()
        try:
            model = load(path).model
        except LoadError as error:
            rows[name] = {"status": "refused", "error": error.what}
        else:
            assert isinstance(model, nn.Module)
            seconds = round(time.perf_counter() - start, 2)
            rows[name] = {"status": "ok", "layers": sum(1 for _ in model.modules()), "seconds": seconds}
        path.unlink()
    return rows


def _elsewhere(work: str, names: list[str], folder: Path) -> dict[str, dict[str, Any]]:
    ran = subprocess.run(
        [sys.executable, "-m", "tools.sweeps.pickles", "--work", work, "--folder", str(folder), *names],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if ran.returncode:
        error = ran.stderr.strip().splitlines()[-1:] or [""]
        return {n: {"status": f"{work} died ({ran.returncode})", "error": error[0]} for n in names}
    found: dict[str, dict[str, Any]] = json.loads(ran.stdout.splitlines()[-1])
    return found


def page(results: dict[str, dict[str, Any]]) -> str:
    lines = [
        "# Whole models as pickles",
        "",
        "A file of `torch.save(model, ...)` names every class in it. bntool loads it without --trust-pickle",
        "when they are layers of PyTorch, torchvision or timm, put together as `torch.save` does. Written by",
        "`make pickles` from `pickles.jsonl`; saved by one process and loaded by another.",
        "",
        "| library | models tried | loaded | median seconds |",
        "|---|---|---|---|",
    ]
    for library in ("torchvision", "timm"):
        rows = [row for row in results.values() if row["model"].startswith(f"{library}:")]
        times = sorted(row["seconds"] for row in rows if row["status"] == "ok")
        middle = times[len(times) // 2] if times else ""
        lines.append(f"| {library} | {len(rows)} | {len(times)} | {middle} |")
    rest = sorted((row for row in results.values() if row["status"] != "ok"), key=lambda row: row["model"])
    lines += ["", "Not loaded:" if rest else "All were loaded.", ""]
    lines += [f"- {row['model']}: {row['status']}. {row.get('error', '')}".rstrip(" .") for row in rest]
    lines += ["", "Loaded:", ""] if rest else []
    lines.append(", ".join(sorted(name for name, row in results.items() if row["status"] == "ok")))
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = arguments(__doc__, RESULTS)
    parser.add_argument("--work", choices=("save", "load"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.work:
        warnings.simplefilter("ignore")
        work = save_batch if chosen.work == "save" else load_batch
        print(json.dumps(work(chosen.names, chosen.folder)))
        return
    results = Results(chosen.results)
    if chosen.again:
        results.forget(not_ok)
    missing = results.missing(chosen.names or names_to_try(), chosen.minutes)
    while batch := list(itertools.islice(missing, BATCH)):
        with tempfile.TemporaryDirectory() as folder:
            rows = _elsewhere("save", batch, Path(folder))
            rows |= _elsewhere("load", batch, Path(folder))
        for name in batch:
            results.add({"model": name, **rows.get(name, {"status": "no answer"})})
        print(f"{len(results.rows)} done", flush=True)
    results.path.with_suffix(".md").write_text(page(results.rows), encoding="utf-8")


if __name__ == "__main__":
    main()
