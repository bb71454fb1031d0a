"""The GPU record as a page."""

from __future__ import annotations

from typing import Any

HEAD = (
    "| network | precision | runtime | verdict | nodes on | error | x noise | limit "
    "| ms before → after, batch 1 | ms before → after, batch 32 | peak MiB before → after |"
)


def page(record: dict[str, Any]) -> str:
    tests, rows = record["tests"], record["rows"]
    title = "Rehearsal on the CPU: no figure here is of a GPU" if record["rehearsal"] else "Measured on a GPU"
    ran = f"{tests['tests']} ran, {len(tests['failed'])} failed, {len(tests['skipped'])} were skipped"
    lines = [
        f"# {title}",
        "",
        f"Written by `make gpu-check` on {record['date']}. Random seeded weights and running statistics;",
        "errors on batches of 1, 2 and 3, relative to the peak of the float64 output; `x noise` is the error",
        "in units of what the precision itself does to the model (fp32: the model's own run; TF32 and fp16:",
        "emulated). Latency is the median, before and after the fold, on bound inputs; ONNX Runtime folds by",
        "itself what follows a convolution, so its two figures may be alike.",
        "",
        *(f"- {name}: {detail}" for name, detail in record["facts"].items()),
        f"- gpu-marked tests: {tests['why'] or ran}",
        "",
        HEAD,
        "|---|---|---|---|---|--:|--:|--:|--:|--:|--:|",
        *map(_line, rows),
    ]
    wrong = [row for row in rows if row["status"] not in ("passed", "rehearsed")]
    if wrong:
        lines += ["", "Not passed:", ""]
        lines += [
            f"- {row['net']} {row['precision']} on {row['runtime']}, {row['status']}: {row['why']}"
            for row in wrong
        ]
    return "\n".join([*lines, ""])


def _line(row: dict[str, Any]) -> str:
    cells = [row["net"], row["precision"], row["runtime"], row["status"]]
    check = row.get("check")
    if check is None:
        return f"| {' | '.join(cells)} |" + " |" * 7
    nodes = ", ".join(f"{n} {name.removesuffix('ExecutionProvider')}" for name, n in row["nodes"].items())
    return "| " + " | ".join([
        *cells, nodes or f"torch on {check['device']}", _figure(check["relative"]), _figure(check["ratio"]),
        _figure(check["limit"]), _pair(row, 1, "median_seconds", 1e3), _pair(row, 32, "median_seconds", 1e3),
        _pair(row, max(r["batch"] for r in row["latency"]), "memory_bytes", 2.0**-20),
    ]) + " |"  # fmt: skip


def _figure(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.2g}"


def _pair(row: dict[str, Any], batch: int, key: str, unit: float) -> str:
    found = {r["name"]: r[key] for r in row["latency"] if r["batch"] == batch}
    if any(found.get(name) is None for name in ("before", "after")):
        return ""
    return " → ".join(f"{found[name] * unit:.3g}" for name in ("before", "after"))
