"""What a surgery returns: the new model, the plan, the parameter delta and the checks. Prints itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bntool.core.plan import ByPlan, Plan
from bntool.core.plan_parts import plan_parts
from bntool.core.showing import Part, Said, Shown, count, noted, signed
from bntool.core.text import Lines
from bntool.core.verdicts import Check, first_failed, nothing_shown
from bntool.results.tables import text_of

if TYPE_CHECKING:
    from bntool.export.exporting import ExportResult


@dataclasses.dataclass(frozen=True)
class SurgeryResult(ByPlan, Shown):
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
        told = (Said(noted(note)) for note in self.plan.notes)
        return text_of([*self.parts(), *told])

    def render(self, width: int | None = None, *, verbose: bool = True) -> Lines:
        """The verdicts as a table, then the totals and the parameter delta."""
        return text_of(self.parts(verbose=verbose), width)

    def parts(self, *, verbose: bool = True) -> Sequence[Part]:
        return [*plan_parts(self.plan, verbose=verbose), "", *delta_lines(self.parameters)]


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


def merges_of(plan: Plan) -> list[dict[str, Any]]:
    """What merged into which convolution, as the document that `--json` prints."""
    return [
        {"into": merge.layer, "branches": [branch.layer or "identity" for branch in merge.branches]}
        for merge in plan.merges
    ]


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
