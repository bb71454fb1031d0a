"""Write a report: as a page, as Markdown, or one of its figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bntool.core.errors import UsageError
from bntool.files.regular import open_regular, unreadable
from bntool.files.targets import Target
from bntool.report import drawing
from bntool.report.chapters import chapters_of
from bntool.report.markdown import markdown
from bntool.report.page import html_page, require_libraries
from bntool.report.reading import Document

_OURS = b'<meta name="generator" content="bntool '
_HEAD = 2048


def claim_report(path: Path, target: Target, kind: str = "html") -> Path:
    """Before any work: reports can be made here, and `path` may be written. A report replaces a report."""
    require_libraries(drawing=kind != "md")
    return target.claim(path, force=target.force or _is_report(path))


def write_page(documents: Sequence[Document], draft: Path, kind: str = "html") -> None:
    """Write the report as `html` or `md` into a draft."""
    text = html_page(documents) if kind == "html" else report_text(documents)
    draft.write_bytes(text.encode("utf-8"))


def report_text(documents: Sequence[Document]) -> str:
    """The report as Markdown, for a pull request; it draws nothing."""
    require_libraries(drawing=False)
    return markdown(documents)


def write_figure(documents: Sequence[Document], name: str | None, draft: Path, kind: str) -> None:
    """Write one chart as `png` or `svg` into a draft; `UsageError` lists the names there are."""
    import vl_convert

    found = {
        key: chart
        for chapter in chapters_of(documents)
        for key, chart in _named(chapter.id, chapter.charts, several=len(documents) > 1)
    }
    if name is None and len(found) == 1:
        name = next(iter(found))
    if name not in found:
        there = f"the figures are {', '.join(found)}" if found else "these documents hold no figure"
        what = f"there is no figure {name}" if name else "a picture holds one figure"
        raise UsageError(what, where=there, next_step="bntool report FILE.json --figure NAME -o FIGURE.svg")
    spec = {**found[name].spec, "width": 640, "title": found[name].title, "config": drawing.theme(dark=False)}
    spec["autosize"] = {"type": "pad"}
    if kind == "svg":
        content = vl_convert.vegalite_to_svg(spec, vl_version=drawing.VEGALITE).encode("utf-8")
    else:
        content = vl_convert.vegalite_to_png(spec, vl_version=drawing.VEGALITE, scale=2)
    draft.write_bytes(content)


def _named(chapter: str, found: Any, *, several: bool) -> Iterable[tuple[str, Any]]:
    """`checks`, or `c2-checks` where there are several documents."""
    return ((f"{chapter}-{name}" if several else name, chart) for name, chart in found.items())


def _is_report(path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        with open_regular(path) as file:
            return _OURS in file.read(_HEAD)
    except OSError as error:
        raise unreadable(path, error) from error
