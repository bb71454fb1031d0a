"""A document as a chapter of a report: what is told, in words and charts, whatever it is drawn as."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from bntool.report import charts, drawing, training_charts
from bntool.report.reading import Document, damaged
from bntool.report.trees import Mark, Tree, grown
from bntool.report.verdicts import Verdict, marks_after, marks_before, verdicts_of

_TITLES = {
    "insert": "BatchNorm inserted",
    "fold": "BatchNorm folded",
    "verify": "Verification",
    "export": "Export",
    "compare": "Training with and without BatchNorm",
    "bench": "Latency",
    "summary": "Summary",
    "calibrate": "Statistics recomputed",
}


_UNTRAINED = {
    "random weights": "The weights are random: no value here says anything of a trained model.",
    "no weights were loaded": "No weights were loaded: unless the model's own code loads some they are "
    "random, and no value here says anything of a trained model.",
}
"""What a reader must know before any figure, by how the note of `files.references` begins."""


@dataclasses.dataclass(frozen=True)
class Chart:
    """A chart, what it shows in one sentence, and its figures as a table."""

    name: str
    title: str
    told: str
    spec: drawing.Spec


@dataclasses.dataclass(frozen=True)
class Chapter:
    """What one document tells."""

    id: str
    document: Document
    title: str
    status: str
    tiles: tuple[tuple[str, str, str], ...]
    verdicts: tuple[Verdict, ...]
    trees: tuple[Tree, ...]
    charts: Mapping[str, Chart]

    @property
    def data(self) -> dict[str, Any]:
        return self.document.data

    @property
    def subject(self) -> str:
        """The model that it is about."""
        model, source = self.data.get("model"), self.data.get("source")
        named = model.get("reference") if isinstance(model, dict) else None
        named = named or (source.get("reference") if isinstance(source, dict) else None)
        return str(named or self.data.get("data") or self.document.name)

    @property
    def passed(self) -> bool:
        return self.status == "ok"

    @property
    def by_reason(self) -> list[tuple[str, str, int]]:
        """Reason codes of what is kept or was not cut, each with its meaning and how often."""
        found = Counter((v.code, v.title) for v in self.verdicts if v.code)
        return [(code, title, number) for (code, title), number in found.most_common()]

    @property
    def checks(self) -> list[dict[str, Any]]:
        single = self.data.get("check")
        return list(self.data.get("checks") or ([single] if single else ()))

    @property
    def warnings(self) -> list[str]:
        """What a reader must know before any figure."""
        if "arms" in self.data:  # a training begins with random weights
            return []
        notes = [note for note in self.data.get("notes") or () if isinstance(note, str)]
        return [told for begins, told in _UNTRAINED.items() if any(note.startswith(begins) for note in notes)]

    @property
    def norms(self) -> list[dict[str, Any]]:
        model = self.data.get("model")
        return list(model.get("norms") or ()) if isinstance(model, dict) else []

    @property
    def rows_watched(self) -> list[dict[str, Any]]:
        return training_charts.watched_rows(self.data) if "watched" in self.data else []


def chapters_of(documents: Sequence[Document]) -> list[Chapter]:
    """A chapter for each document; `LoadError` for one whose parts are not what their names promise."""
    return [
        guarded(document, partial(_chapter, document, f"c{i}")) for i, document in enumerate(documents, 1)
    ]


def guarded(document: Document, make: Callable[[], Any]) -> Any:
    """What `make` makes of a document; the document is at fault for whatever does not fit."""
    try:
        return make()
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        IndexError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise damaged(document.name, error) from error


def _chapter(document: Document, chapter_id: str) -> Chapter:
    data = document.data
    verdicts = verdicts_of(document.command, data)
    model = data.get("model") or {}
    trees = []
    if model.get("before"):
        marks = {**marks_before(verdicts), **_blamed(data)}
        trees.append(grown("before" if model.get("after") else "model", model["before"], marks))
    if model.get("after"):
        trees.append(grown("after", model["after"], marks_after(verdicts, data)))
    checks = list(data.get("checks") or ([data["check"]] if data.get("check") else ()))
    failed = any(not check["passed"] and not check.get("undecided") for check in checks)
    undecided = bool(checks) and all(check.get("undecided") for check in checks)
    status = str(data.get("status") or ("check-failed" if failed else "undecided" if undecided else "ok"))
    chapter = Chapter(
        id=chapter_id,
        document=document,
        title=_TITLES.get(document.command, document.command),
        status=status,
        tiles=tuple(_tiles(data, verdicts, checks)),
        verdicts=tuple(verdicts),
        trees=tuple(trees),
        charts={},
    )
    return dataclasses.replace(chapter, charts={c.name: c for c in _charts(chapter, model)})


def _held(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """Where sites and skips stand: in the plan of a side file, else in the document itself."""
    plan = data.get("plan")
    return plan if isinstance(plan, dict) else data


def _blamed(data: Mapping[str, Any]) -> dict[str, Mark]:
    blame = data.get("blame")
    if not isinstance(blame, dict):
        return {}
    known = (blame.get("relative"), blame.get("limit"))
    figures = ("not finite" if value is None else f"{value:.2g}" for value in known)
    text = "first differs here: relative {}, allowed {}".format(*figures)
    return {str(blame["name"]): Mark("failed", "differs", text)}


def _tiles(
    data: Mapping[str, Any], verdicts: Sequence[Verdict], checks: Sequence[Mapping[str, Any]]
) -> list[tuple[str, str, str]]:
    """Figure, what it counts, and its tone."""
    count = Counter(v.tone for v in verdicts)
    tiles = [
        (f"{count[tone]:,}", word, tone)
        for tone, word in (
            ("inserted", "BatchNorms inserted"),
            ("folded", "BatchNorms folded"),
            ("kept", "BatchNorms kept"),
            ("skipped", "places not cut"),
        )
        if count[tone]
    ]
    if verdicts and not count["folded"] and not count["inserted"]:
        tiles.insert(0, ("0", "BatchNorms changed", ""))
    parameters = data.get("parameters")
    if isinstance(parameters, dict) and isinstance(parameters.get("delta"), dict):
        changed = parameters["delta"]["trainable"] + parameters["delta"]["frozen"]
        for number, what in ((changed, "parameters"), (parameters["delta"]["buffers"], "buffers")):
            tiles.append((f"{number:+,}" if number else "±0", what, ""))
    if checks:
        passed = sum(bool(check["passed"]) for check in checks)
        undecided = sum(bool(check.get("undecided")) for check in checks)
        tone = (
            "passed" if passed == len(checks) else "kept" if passed + undecided == len(checks) else "failed"
        )
        tiles.append((f"{passed} of {len(checks)}", "checks passed", tone))
    totals = data.get("totals")
    if isinstance(totals, dict):
        tiles.append((f"{totals['parameters']:,}", "parameters", ""))
        tiles.append((f"{totals['buffers']:,}", "buffers", ""))
    for arm, title in training_charts.ARMS.items() if "arms" in data else ():
        best = [r for r in data["arms"][arm]["rates"] if r["lr"] == data["arms"][arm]["best_rate"]]
        if best and best[0].get("test_accuracy"):
            tiles.append((f"{best[0]['test_accuracy']['mean']:.2%}", f"test accuracy {title}", ""))
    return tiles


def _charts(chapter: Chapter, model: Mapping[str, Any]) -> list[Chart]:
    data = chapter.data
    made: list[tuple[str, str, str, drawing.Spec | None]] = []
    counts = data.get("parameters")
    if isinstance(counts, dict) and isinstance(counts.get("delta"), dict):
        made.append(
            ("delta", "What changed", "Change in trainable, frozen and buffer numbers.", charts.delta(counts))
        )
        made.append(
            ("parameters", "Before and after", "Numbers held before and after.", charts.parameters(counts))
        )
    if model.get("before") and model.get("after"):
        spec = charts.delta_by_layer(model["before"], model["after"], _held(data).get("key_map") or {})
        made.append(("layers", "Layer by layer", "The layers whose parameters changed most.", spec))
    if chapter.norms:
        told = "For every BatchNorm the range of its scales, the middle half and the median."
        made.append(("norms", "Scales of every BatchNorm", told, charts.norms(chapter.norms)))
    if chapter.checks:
        told = "For every check the error, the noise floor and the limit, on a logarithmic axis."
        made.append(("checks", "Error, noise floor and limit", told, charts.checks(chapter.checks)))
    if data.get("latency"):
        told = "Median time of a run for every model and batch size."
        made.append(("latency", "Time of a run", told, charts.latency(data["latency"])))
    if "runs" in data and "arms" in data:
        for quantity in ("loss", "accuracy"):
            told = f"{quantity.capitalize()} by epoch with and without BatchNorm; test full, training dashed."
            made.append(
                (quantity, f"{quantity.capitalize()} by epoch", told, training_charts.curves(data, quantity))
            )
    rows = chapter.rows_watched
    if rows:
        told = "What every activation reads at one step of the training."
        made.append(
            (
                "distributions",
                "Inputs of the activations",
                told,
                training_charts.distributions(rows, rows[0]["step"]),
            )
        )
        told = "What one activation reads, over the whole training."
        made.append(
            (
                "over-training",
                "One layer over the training",
                told,
                training_charts.over_training(rows, rows[-1]["layer"]),
            )
        )
    return [Chart(name, title, told, spec) for name, title, told, spec in made if spec is not None]
