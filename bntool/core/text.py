"""Text for a terminal or a page. Whatever a file, a model or a library says passes through here first."""

from __future__ import annotations

import html
import re
from contextvars import ContextVar

asked_width: ContextVar[int | None] = ContextVar("asked_width", default=None)
"""How wide the text of a command is to be, where that was asked for."""

_MEANING = r"\`*_[]()#|~!"
_LINKING = re.compile(r"(?i)@|:(?=//)|www(?=\.)")
"""Where GitHub makes a link, or calls somebody, even of text: a comment parts it from what follows."""


class Lines(str):
    """Text of which every line is fit to be shown. Only `as_lines`, and what draws tables, makes it."""

    __slots__ = ()


def visible(text: str) -> str:
    r"""`text` on one line: whatever moves the cursor, hides, or turns the direction of text, as an escape.

    A line end becomes `\n`, an escape character `\x1b`, an override of direction `\u202e`, half of a
    surrogate pair `\udc80`. Text that went through stays as it is when it goes through again.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shown(name: str, longest: int = 100) -> str:
    """A name from a file, visible, and not longer than `longest` characters."""
    clean = visible(name[: longest + 1])
    return clean if len(clean) <= longest else clean[: longest - 3] + "..."


def as_lines(*parts: str) -> Lines:
    """The parts one below the other. A line end within a part is made visible, unless the part is `Lines`."""
    return Lines("\n".join(part if isinstance(part, Lines) else visible(part) for part in parts))


def escaped(value: object) -> str:
    """Text on one line in which no character means anything to Markdown or HTML."""
    text = html.escape(visible(" ".join(str(value).split())), quote=False)
    return _LINKING.sub(r"\g<0><!-- -->", "".join(f"\\{c}" if c in _MEANING else c for c in text))
