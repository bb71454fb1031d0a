"""A report as Markdown. What a document names is shown as text, never as markup."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from bntool.core.text import visible
from bntool.pages.chapters import Chapter, chapters_of, guarded
from bntool.pages.charts import ARMS
from bntool.pages.page import environment
from bntool.pages.reading import Document

_MEANING = r"\`*_[]()#|~!"
_LINKING = re.compile(r"(?i)@|:(?=//)|www(?=\.)")
"""Where GitHub makes a link, or calls somebody, even of text: a comment parts it from what follows."""


def markdown(documents: Sequence[Document]) -> str:
    """All chapters, one after the other. Raises `LoadError` for a document that is damaged."""
    parts = [guarded(c.document, partial(_chapter, c)) for c in chapters_of(documents)]
    return "\n".join(parts) if parts else "There is nothing to report.\n"


def _chapter(chapter: Chapter) -> str:
    text = environment(finalize=escaped).get_template("report.md.j2").render(chapter=chapter, arms=ARMS)
    return text.strip() + "\n"


def escaped(value: Any) -> str:
    """Text on one line in which no character means anything to Markdown or HTML."""
    text = html.escape(visible(" ".join(str(value).split())), quote=False)
    return _LINKING.sub(r"\g<0><!-- -->", "".join(f"\\{c}" if c in _MEANING else c for c in text))
