"""A report as Markdown. What a document names is shown as text, never as markup."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from bntool.core.text import escaped
from bntool.report.chapters import Chapter, chapters_of, guarded
from bntool.report.page import environment
from bntool.report.reading import Document
from bntool.report.training_charts import ARMS


def markdown(documents: Sequence[Document]) -> str:
    """All chapters, one after the other. Raises `LoadError` for a document that is damaged."""
    parts = [guarded(c.document, partial(_chapter, c)) for c in chapters_of(documents)]
    return "\n".join(parts) if parts else "There is nothing to report.\n"


def _chapter(chapter: Chapter) -> str:
    text = environment(finalize=escaped).get_template("report.md.j2").render(chapter=chapter, arms=ARMS)
    return text.strip() + "\n"
