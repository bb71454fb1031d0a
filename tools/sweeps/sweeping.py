"""Going through many models, one line of results each, so that a sweep can be stopped and gone on with."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from bntool.files.atomic import write_atomically
from tools.sweeps.processes import in_own_process

Row = dict[str, Any]

MEMORY = 24_000_000_000
"""Bytes for one model."""


class Results:
    """Rows by model, kept in a file with one JSON object a line, to which each is appended as it comes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        whole, _, torn = (path.read_text(encoding="utf-8") if path.is_file() else "").rpartition("\n")
        self.rows: dict[str, Row] = {
            row["model"]: row for row in map(json.loads, filter(None, whole.split("\n")))
        }
        if torn:  # by a kill in the middle of a line
            self.forget(lambda _: False)

    def add(self, row: Row) -> None:
        self.rows[row["model"]] = row
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(row))

    def forget(self, unwanted: Callable[[Row], bool]) -> None:
        """Drop rows, so that their models are run again."""
        self.rows = {name: row for name, row in self.rows.items() if not unwanted(row)}
        text = "".join(map(_line, self.rows.values()))
        write_atomically(self.path, lambda draft: put(draft, text), force=True)

    def missing(self, names: Iterable[str], minutes: float) -> Iterator[str]:
        """The names without a row, one after another until the time is up."""
        end = time.monotonic() + 60 * minutes
        waiting = [name for name in dict.fromkeys(names) if name not in self.rows]
        for done, name in enumerate(waiting):
            if time.monotonic() > end:
                print(f"time is up: {len(waiting) - done} models are left; run it again to go on")
                return
            yield name


def sweep(
    chosen: argparse.Namespace,
    every: Iterable[str],
    examine: Callable[[str], Row],
    page: Callable[[dict[str, Row]], str],
    told: Callable[[Row], str],
) -> None:
    """Examine each model in a process of its own, as far as the time goes; write the page beside the results.

    `told` is what a line on the screen says of a row.
    """
    # imported once, before the forks
    import timm  # noqa: F401
    import torchvision  # noqa: F401

    import bntool.api  # noqa: F401

    results = Results(chosen.results)
    if chosen.again:
        results.forget(not_ok)
    for name in results.missing(chosen.names or every, chosen.minutes):
        row = {"model": name, **in_own_process(lambda name=name: examine(name), chosen.limit, MEMORY)}  # type: ignore[misc]
        results.add(row)
        print(f"{len(results.rows):5} {row['status']:10} {name} {told(row)}".rstrip(), flush=True)
    put(results.path.with_suffix(".md"), page(results.rows))


def put(draft: Path, text: str) -> None:
    draft.write_text(text, encoding="utf-8")


def not_ok(row: Row) -> bool:
    return bool(row["status"] != "ok")


def arguments(description: str | None, results: Path, limit: float | None = None) -> argparse.ArgumentParser:
    """The options that every sweep has; `limit` is the usual one for a model, in processor seconds."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("names", nargs="*", help="models (default: all)")
    parser.add_argument("--minutes", type=float, default=600, help="stop after this long")
    parser.add_argument("--again", action="store_true", help="redo the models that did not come through")
    parser.add_argument(
        "--results", type=Path, default=results, help="the file of results; the page goes beside it"
    )
    if limit is not None:
        parser.add_argument("--limit", type=float, default=limit, help="processor seconds for one model")
    return parser


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
