"""The verdict on every BatchNorm, and the marks that these verdicts leave in the diagram."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from bntool.core.errors import UsageError
from bntool.core.explanations import explain
from bntool.report.trees import Mark

_AT_ONCE = ("conv", "linear", "matmul", "batch_norm", "reparameterize")
"""Laws of layers that take in at once: not worth a word."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of one BatchNorm, or of one place for one."""

    name: str
    tone: str
    word: str
    text: str
    code: str = ""
    title: str = ""


def verdicts_of(command: str, data: Mapping[str, Any]) -> list[Verdict]:
    """One for each BatchNorm of a fold; of an insertion one for each place that was looked at."""
    plan = data.get("plan")
    held = plan if isinstance(plan, dict) else data
    is_fold = any("into" in site for site in held.get("sites") or ()) or command == "fold"
    sites = [_folded(site) if is_fold else _inserted(site) for site in held.get("sites") or ()]
    skips = [_skipped(skip, is_fold) for skip in held.get("skips") or ()]
    return [*sites, *skips]


def _folded(site: Mapping[str, Any]) -> Verdict:
    into = ", ".join(str(layer) for layer in site["into"])
    laws = [str(law) for law in site["laws"] if law not in _AT_ONCE]
    way = f" through {', '.join(laws)}" if laws else ""
    why = str(site.get("untrained") or "")
    now = f"; once trained it would stay: {why}" if why else ""
    return Verdict(str(site["bn"]) or "(root)", "folded", "folded", f"folded into {into}{way}{now}")


def _inserted(site: Mapping[str, Any]) -> Verdict:
    kind = f"{site['activation_kind']} " if site.get("activation_kind") else ""
    place = f"between {site['conv'] or '(root)'} and {kind}{site.get('activation') or ''}".rstrip()
    calls = int(site.get("calls") or 1)
    each = f", one for each of {calls} calls" if calls > 1 else ""
    return Verdict(
        str(site["bn"]), "inserted", "inserted", f"{place}, {int(site['channels']):,} channels{each}"
    )


def _skipped(skip: Mapping[str, Any], is_fold: bool) -> Verdict:
    code, detail = str(skip["reason"]), str(skip.get("detail") or "")
    try:
        title = explain(code).title
    except UsageError:
        title = ""  # a code of another version
    name = str(skip.get("bn", skip.get("name"))) or "(root)"
    tone, word = ("kept", "kept") if is_fold else ("skipped", "not cut")
    return Verdict(name, tone, word, detail or title, code, title)


def marks_before(verdicts: list[Verdict]) -> dict[str, Mark]:
    """By name of a layer in the model as it was."""
    return {
        v.name: Mark(v.tone, v.word, f"{v.code}: {v.text}" if v.code else v.text)
        for v in verdicts
        if v.tone != "inserted"
    }


def marks_after(verdicts: list[Verdict], data: Mapping[str, Any]) -> dict[str, Mark]:
    """By name of a layer in the model as it is now: the newcomers, what stayed, what took something in."""
    plan = data.get("plan")
    held = plan if isinstance(plan, dict) else data
    marks = {v.name: Mark(v.tone, v.word, f"{v.code}: {v.text}") for v in verdicts if v.tone == "kept"}
    taken: dict[str, list[str]] = {}
    for site in held.get("sites") or ():
        for layer in site.get("into") or ():
            taken.setdefault(str(layer), []).append(str(site["bn"]))
    for layer, norms in taken.items():
        marks[layer] = Mark("holds", "took in", f"holds {', '.join(norms)}")
    for site, verdict in zip(held.get("sites") or (), verdicts, strict=False):
        calls = int(site.get("calls") or 1)
        for name in [verdict.name] if calls == 1 else [f"{verdict.name}.{i}" for i in range(calls)]:
            if verdict.tone == "inserted":
                marks[name] = Mark("inserted", "inserted", verdict.text)
    return marks
