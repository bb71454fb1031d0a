"""One pass through the flow for a source file: read, plan the edits, prove them, show them."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from bntool.core.errors import LoadError
from bntool.core.plan import Plan
from bntool.core.verdicts import Check
from bntool.files.scripts import import_script
from bntool.observe.eager import Observation
from bntool.source.planning import Refusal, plan_source
from bntool.source.proof import make_task, prove_apart
from bntool.source.reading import SourceFile


@dataclasses.dataclass(frozen=True)
class Rewritten:
    """What became of a source file: the new text with its proof, or what stood against it.

    `plan` names the sites as the new text does; `lines` is the line of the old text for each site's layer.
    `before` and `after` are the bytes of the file; they are equal where anything was refused.
    """

    path: Path
    before: bytes
    after: bytes
    diff: str
    plan: Plan
    lines: Mapping[str, int]
    refusals: tuple[Refusal, ...]
    check: Check | None

    def to_dict(self) -> dict[str, Any]:
        """The part of the document that `--json` prints."""
        sites = [
            {"conv": s.conv, "bn": s.bn, "line": self.lines[s.conv], "verdict": "edited", "detail": ""}
            for s in self.plan.insert_sites
            if s.conv in self.lines
        ]
        sites += [
            {"conv": r.conv, "bn": None, "line": r.line, "verdict": "unsafe", "detail": r.why}
            for r in self.refusals
        ]
        return {"file": str(self.path), "diff": self.diff, "sites": sites}


def rewrite(
    reference: str, model: nn.Module, observation: Observation, plan: Plan, *, full: bool, output: str = ""
) -> Rewritten:
    """Put the BatchNorms of an insertion plan into the file of `reference` (`path/file.py:NAME`).

    Nothing is written. Where one site is not safe to edit, or the result does not stand the proof, there
    is no new text: the refusals say why. `output` is the file's new name, for the diff.
    """
    where, _, attribute = reference.rpartition(":")
    path = Path(where)
    module = import_script(path)
    try:
        file = SourceFile(path, module)
    except LoadError as error:
        refused = Refusal("(all)", 1, error.what)
        return Rewritten(path, b"", b"", "", plan, {}, (refused,), None)
    edits = plan_source(file, attribute, model, plan)
    unchanged = Rewritten(path, file.raw, file.raw, "", plan, {}, edits.refusals, None)
    if edits.refusals:
        return unchanged
    after = file.encoded(edits.text)
    task = make_task(reference, module, path.resolve(), after, edits.plan, model, observation, full=full)
    why, check = prove_apart(task)
    if why:
        line = min(edits.lines.values())
        return dataclasses.replace(unchanged, refusals=(Refusal("(all)", line, f"not proved: {why}"),))
    diff = "".join(unified_diff(file.text, edits.text, where, output or where))
    return Rewritten(path, file.raw, after, diff, edits.plan, edits.lines, (), check)


def unified_diff(before: str, after: str, old_name: str, new_name: str) -> Iterator[str]:
    """The lines of a diff that `patch` takes, a missing newline at the end included."""
    old, new = (re.findall(r"[^\n]*\n|[^\n]+", text) for text in (before, after))
    for line in difflib.unified_diff(old, new, old_name, new_name):
        yield line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n"
