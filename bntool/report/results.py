"""What a surgery returns: the new model, the plan, the parameter delta and the checks. Prints itself."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bntool.core.plan import ByPlan, Plan
from bntool.core.sites import FoldSite, InsertSite, Skip, Unshared
from bntool.core.text import Lines, as_lines
from bntool.core.verdicts import Check, first_failed, nothing_shown
from bntool.report.tables import Column, Table, count, render, signed, size, wrapped

if TYPE_CHECKING:
    from bntool.export.exporting import ExportResult


@dataclasses.dataclass(frozen=True)
class SurgeryResult(ByPlan):
    """A new model and how it came about, whatever its kind; the model that was given is untouched.

    `model` is an `nn.Module`, an `ExportedProgram`, a TorchScript module or, for an ONNX file, the path of
    the new one. `parameters` holds `before`, `after` and `delta`, recounted from the tensors of both.
    `data_path` is the file beside a new ONNX file that holds its numbers, where there is one. `export` is
    what was written as ONNX.
    """

    model: Any
    plan: Plan
    parameters: dict[str, dict[str, int]]
    checks: tuple[Check, ...] = ()
    kind: str = "module"
    data_path: Path | None = None
    export: ExportResult | None = None

    @property
    def program(self) -> Any:
        """The model, where it is an exported program."""
        return self.model

    @property
    def path(self) -> Path | None:
        """Where the new ONNX file is; None where there is none."""
        return self.model if isinstance(self.model, Path) else None

    @property
    def status(self) -> str:
        if first_failed(self.checks) is not None:
            return "check-failed"
        if nothing_shown(self.checks) is not None:
            return "undecided"
        return "ok" if self.modified else "nothing-to-do"

    def to_dict(self) -> dict[str, Any]:
        """The document that `--json` prints, less what only a command knows: the same keys for every kind."""
        checks = [check.to_dict() for check in self.checks]
        found = verdicts(self.plan)
        document: dict[str, Any] = {"status": self.status, "kind": self.kind, "parameters": self.parameters}
        document |= {**found, "checks": checks, "export": self.export.to_dict() if self.export else None}
        document["notes"] = list(self.plan.notes)
        return (
            document if self.plan.action == "fold" else {**document, "check": checks[0] if checks else None}
        )

    def __str__(self) -> str:
        return as_lines(self.render(), *(wrapped(f"note: {note}") for note in self.plan.notes))

    def render(self, width: int | None = None, *, verbose: bool = True) -> Lines:
        """The verdicts as a table, then the totals and the parameter delta."""
        draw = insert_lines if self.plan.action == "insert" else fold_lines
        told = draw(self.plan, width, verbose)
        # a blank line parts the totals from a table, where there is one
        return as_lines(*told[told[0] == "" :], "", *delta_lines(self.parameters))


def verdicts(plan: Plan) -> dict[str, Any]:
    """What was decided for each place, as the document that `--json` prints; edits stay in the plan."""
    data = plan.to_dict()
    if plan.action == "insert":
        return {key: data[key] for key in ("sites", "skips", "key_map", "dropped_biases")}
    return {
        "sites": [{key: value for key, value in site.items() if key != "edits"} for site in data["sites"]],
        "skips": data["skips"],
        "bn_total": len(plan.sites) + len(plan.skips),
        "bn_folded": len(plan.sites),
        "unshared": plan.unshared.to_dict(),
        "merges": merges_of(plan),
    }


def insert_lines(plan: Plan, width: int | None, verbose: bool) -> list[str]:
    """A line for each new BatchNorm, then the layers that were not cut, and the totals."""
    columns = (
        Column("Layer", flexible=True),
        Column("Activation", flexible=True),
        Column("New BatchNorm", flexible=True),
        Column("Channels", number=True),
        Column("Form"),
    )
    rows = [
        [s.conv or "(root)", s.activation_kind, _newcomers(s), count(s.channels), s.form]
        for s in plan.insert_sites
    ]
    lines: list[str] = [render(Table(columns, rows), width)] if rows and verbose else []
    lines += _skip_lines(plan.skips, width, "not cut", verbose)
    number = sum(s.calls for s in plan.insert_sites)
    channels = sum(s.channels * s.calls for s in plan.insert_sites)
    lines += ["", f"{number} BatchNorm layer{'s' * (number != 1)} inserted over {count(channels)} channels"]
    if plan.dropped:
        moved = ", ".join(dropped.bias for dropped in plan.dropped)
        lines.append(wrapped(f"{len(plan.dropped)} biases moved into running means: {moved}", width))
    return lines


def _newcomers(site: InsertSite) -> str:
    return site.bn if site.calls == 1 else f"{site.bn}.0-{site.calls - 1}"


def fold_lines(plan: Plan, width: int | None, verbose: bool) -> list[str]:
    """A line for each BatchNorm, then what is kept by reason, each with its first layer as an example."""
    columns = (Column("BatchNorm", flexible=True), Column("Verdict", flexible=True))
    rows = [[site.bn or "(root)", _verdict(site)] for site in plan.fold_sites]
    rows += [[skip.name, f"kept: {skip.reason}"] for skip in plan.skips]
    lines: list[str] = [render(Table(columns, rows), width)] if rows and verbose else []
    lines += ["", f"{len(plan.sites)} of {len(rows)} BatchNorm layers folded"]
    if plan.merges:
        first = plan.merges[0]
        lines.append(
            f"{len(plan.merges)} sums of parallel branches merged, the first: "
            f"{len(first.branches)} branches into {first.layer}"
        )
    if plan.unshared.layers:
        lines.append(unshared_text(plan.unshared))
    for reason, number in Counter(skip.reason for skip in plan.skips).most_common():
        example = next(skip for skip in plan.skips if skip.reason is reason)
        also = ", the first" if number > 1 else ""
        lines.append(
            wrapped(f"kept {number} {reason}{also}: {example.name}: {example.detail}", width, indent="    ")
        )
    return lines


def merges_of(plan: Plan) -> list[dict[str, Any]]:
    """What merged into which convolution, as the document that `--json` prints."""
    return [
        {"into": merge.layer, "branches": [branch.layer or "identity" for branch in merge.branches]}
        for merge in plan.merges
    ]


def unshared_text(unshared: Unshared) -> str:
    """What the clones of shared layers add, on one line."""
    layers = "1 layer" if len(unshared.layers) == 1 else f"{count(len(unshared.layers))} layers"
    return f"unshared {layers}: {signed(unshared.parameters)} parameters, +{size(unshared.bytes)}"


def _verdict(site: FoldSite) -> str:
    """Into what, and through which ops: a layer that takes in at once is not worth a word, nor a module."""
    way = [
        law for law in site.laws if law not in ("conv", "linear", "matmul", "batch_norm", "reparameterize")
    ]
    through = f" through {', '.join(way)}" if way else ""
    where = " in the graph" if site.level == "graph" else ""
    code, _, _ = site.untrained.partition(":")
    now = f"; once trained it would stay: {code}" if code else ""
    return f"folded into {', '.join(site.into)}{through}{where}{now}"


def _skip_lines(skips: tuple[Skip, ...], width: int | None, verb: str, verbose: bool) -> list[str]:
    lines: list[str] = []
    shown = skips if verbose else skips[:10]
    for skip in shown:
        lines.append(wrapped(f"{verb}: {skip.name} [{skip.reason}] {skip.detail}", width, indent="    "))
    if len(shown) < len(skips):
        lines.append(f"{verb}: {len(skips) - len(shown)} more (-v lists them)")
    return ["", *lines] if lines else []


def delta_lines(parameters: dict[str, dict[str, int]]) -> list[str]:
    """Parameters and buffers before and after, in plain words."""
    before, after, delta = (parameters[k] for k in ("before", "after", "delta"))

    def total(counts: dict[str, int]) -> int:
        return counts["trainable"] + counts["frozen"]

    change = f"{signed(delta['trainable'])} trainable, {signed(delta['frozen'])} frozen"
    if delta["conv_bias"]:
        change += f", of these {signed(delta['conv_bias'])} biases"
    buffers = f"{count(before['buffers'])} -> {count(after['buffers'])} ({signed(delta['buffers'])})"
    return [
        f"parameters  {count(total(before))} -> {count(total(after))} ({change})",
        f"buffers     {buffers}",
    ]
