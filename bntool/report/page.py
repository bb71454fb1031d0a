"""A report as one HTML file that loads nothing: the charts' library, the data and the script are inside."""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib.metadata
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bntool.core.errors import LoadError
from bntool.report import charts, drawing
from bntool.report.chapters import Chapter, chapters_of, guarded
from bntool.report.reading import Document
from bntool.report.training_charts import ARMS
from bntool.report.trees import TONES

if TYPE_CHECKING:
    from jinja2 import Environment

_TEMPLATES = Path(__file__).with_name("templates")
_LEGEND = {
    "inserted": ("inserted", "a new BatchNorm"),
    "folded": ("folded", "a BatchNorm that went into another layer"),
    "kept": ("kept", "a BatchNorm that stays, with its reason"),
    "failed": ("differs", "the first layer that differs"),
    "holds": ("took in", "a layer that took a BatchNorm in"),
    "skipped": ("not cut", "a place that got none, with its reason"),
}


def require_libraries(*, drawing: bool = True) -> None:
    """Raise `LoadError` where jinja2 or, for drawings, vl-convert is not installed: better now than late."""
    try:
        import jinja2  # noqa: F401 - whether it is there

        if drawing:
            import vl_convert  # noqa: F401
    except ImportError as error:
        raise LoadError(
            f"reports need {error.name}, which is not installed", next_step="pip install 'bntool[report]'"
        ) from error


def html_page(documents: Sequence[Document]) -> str:
    """The whole page. Names in the documents are shown as text; none of them is run.

    Raises `LoadError` for a document whose parts are not what their names promise.
    """
    from markupsafe import Markup

    chapters = chapters_of(documents)
    for chapter in chapters:  # each by itself, so that the one at fault is named
        guarded(chapter.document, functools.partial(_render, [chapter], "", "", ""))
    vega = _vega()
    script = (_TEMPLATES / "report.js").read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src {_hash(vega)} {_hash(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    return _render(chapters, Markup(vega), Markup(script), policy)  # noqa: S704 - our own scripts


def _render(chapters: Sequence[Chapter], vega: str, script: str, policy: str) -> str:
    from markupsafe import Markup

    css = (_TEMPLATES / "report.css").read_text(encoding="utf-8")
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            title=_title(chapters),
            version=importlib.metadata.version("bntool"),
            chapters=chapters,
            arms=ARMS,
            legend=_legend,
            css=Markup(css),  # noqa: S704 - our own
            policy=policy,
            vega=vega,
            script=script,
            data=_embedded(_data(chapters)),
        )
    )


@functools.cache
def _vega() -> str:
    """Vega, Vega-Lite and vega-embed as one script."""
    import vl_convert

    bundle: str = vl_convert.javascript_bundle(vl_version=drawing.VEGALITE)
    return bundle


@functools.cache
def environment(finalize: Callable[[Any], str] | None = None) -> Environment:
    """The templates, and how they show figures. HTML is escaped, unless `finalize` does so to every value."""
    from jinja2 import Environment, FileSystemLoader

    made = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=finalize is None,  # noqa: S701 - Markdown has an escaping of its own
        finalize=finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["figure"] = figure
    made.filters["spread"] = spread
    made.filters["signed"] = signed
    return made


def figure(value: float | None, digits: int = 3) -> str:
    """As many digits; what was not finite says so."""
    if value is None:
        return "not finite"
    return f"{value:.{digits - 1}e}" if 0 < abs(value) < 0.01 else f"{value:.{digits}g}"


def signed(number: int) -> str:
    """A change, with its sign."""
    return f"{number:+,}" if number else "0"


def spread(value: dict[str, float | None] | None, scale: float) -> str:
    """Mean, and standard deviation where there is one; a share as per cent."""
    if not value or value["mean"] is None:
        return "–"
    digits, sign = (2, " %") if scale == 100 else (4, "")
    about = f" ± {scale * value['spread']:.{digits}f}" if value["spread"] is not None else ""
    return f"{scale * value['mean']:.{digits}f}{about}{sign}"


def _title(chapters: Sequence[Chapter]) -> str:
    subjects = list(dict.fromkeys(chapter.subject for chapter in chapters))
    return f"BatchNorm report: {', '.join(subjects[:3])}" if subjects else "BatchNorm report"


def _legend(chapter: Chapter) -> list[tuple[str, tuple[str, str]]]:
    """The marks that the diagram of a chapter really has."""
    used = {tone for tree in chapter.trees for tone, _ in tree.root.tones}
    return [(tone, _LEGEND[tone]) for tone in TONES if tone in used]


def _data(chapters: Sequence[Chapter]) -> dict[str, Any]:
    return {
        "charts": {f"{c.id}-{name}": chart.spec for c in chapters for name, chart in c.charts.items()},
        "channels": {quantity: charts.channels(quantity) for quantity in ("scale", "shift", "variance")},
        "norms": {c.id: c.norms for c in chapters if c.norms},
        "least": charts.LEAST_VARIANCE,
        "themes": {"light": drawing.theme(False), "dark": drawing.theme(True)},
    }


def _embedded(data: Any) -> Any:
    """JSON that no text in it can close, open or leave."""
    from markupsafe import Markup

    text = json.dumps(_finite(data), ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    for character in "<>&'":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)  # noqa: S704 - nothing is left in it that means anything in HTML


def _finite(data: Any) -> Any:
    """The same without what JSON does not know (`1e999` reads as infinity)."""
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
