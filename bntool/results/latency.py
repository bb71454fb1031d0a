"""A benchmark as text."""

from __future__ import annotations

from bntool.core.latencies import Benchmark, Latency
from bntool.core.showing import Column, Said, Table, count, size
from bntool.core.text import Lines
from bntool.results.tables import text_of


def latency_text(found: Benchmark, width: int | None = None) -> Lines:
    """Costs, latencies, and what may be said of them; names give way in a narrow window alone."""
    costs = Table(
        (Column("Model", flexible=True), Column("Parameters", number=True), Column("FLOPs", number=True)),
        [[c.name, count(c.parameters), "-" if c.flops is None else count(c.flops)] for c in found.costs],
    )
    columns = (
        Column("Model", flexible=True),
        Column("Ran on", flexible=True),
        Column("Batch", number=True),
        Column("Median ms", number=True),
        Column("Middle half", number=True),
        Column("Samples/s", number=True),
        Column("Memory", number=True),
    )
    table = Table(columns, [_cells(row) for row in found.rows])
    verdicts = [versus.verdict for versus in found.versus]
    special = dict.fromkeys(f"{row.name}: {row.note}" for row in found.rows if row.note)
    rounds = min(len(row.seconds) for row in found.rows)
    threads = "1 thread" if found.threads == 1 else f"{found.threads} threads"
    how = f"{rounds} rounds in turn, {threads}, TF32 {'on' if found.tf32 else 'off'}"
    told = [Said(line) for line in (*verdicts, *special, *found.notes, how)]
    return text_of([costs, "", table, "", *told], width)


def _cells(row: Latency) -> list[str]:
    low, high = row.middle
    provider = row.provider.removesuffix("ExecutionProvider")
    ran_on = f"torch {row.device}" if row.provider == "torch" else f"ORT {provider}"
    return [
        row.name,
        ran_on if row.device == "cpu" or row.provider == "torch" else f"{ran_on} on {row.device}",
        str(row.batch),
        _milliseconds(row.median),
        f"{_milliseconds(low)} - {_milliseconds(high)}",
        f"{row.throughput:,.1f}",
        "-" if row.memory is None else size(row.memory),
    ]


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:,.0f}"
