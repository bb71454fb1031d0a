"""Plain-text tables in one house style: ASCII; names are whole wherever nobody can widen the window."""

from __future__ import annotations

import dataclasses
import io
import os
import shutil
import sys
import textwrap
from collections.abc import Iterable

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from bntool.core.showing import Column, Part, Said, Table, count, counted, shape_text, signed, size
from bntool.core.text import Lines, as_lines, asked_width, visible

__all__ = [
    "PLAIN_WIDTH",
    "Column",
    "Said",
    "Table",
    "count",
    "counted",
    "render",
    "shape_text",
    "shorten",
    "shorten_middle",
    "signed",
    "size",
    "terminal_width",
    "text_of",
    "wrapped",
]

PLAIN_WIDTH = 80
_NARROWEST = 10
_ELLIPSIS = ".."

# ASCII only: a report must survive a log file and a console of any encoding.
_RULED = box.Box("    \n    \n--- \n    \n    \n--- \n    \n    \n", ascii=True)


@dataclasses.dataclass(frozen=True)
class Room:
    """How wide a table may be: beyond `width` it gets closer, and names are `cut` only in a real window."""

    width: int | None
    cut: bool = False

    @classmethod
    def of(cls, width: int | None) -> Room:
        """What was asked for; else what the window has. A pipe, a file and a log are as wide as need be."""
        if width is not None:
            return cls(width, cut=True)
        asked = _asked()
        if asked is not None:
            return cls(asked)
        return cls(terminal_width(), cut=True) if sys.stdout.isatty() else cls(None)


def text_of(parts: Iterable[Part], width: int | None = None) -> Lines:
    """Tables and lines as plain text; `width` as of `render`."""
    drawn = []
    for part in parts:
        if isinstance(part, Table):
            part = render(part, width)
        elif isinstance(part, Said):
            part = wrapped(part.text, width, part.indent)
        drawn.append(part)
    return as_lines(*drawn)


def render(table: Table, width: int | None = None) -> Lines:
    """The table as plain text.

    With a `width`, or in a terminal, it is made to fit as far as its names allow: columns of nothing but
    zeros go, then the gaps get smaller, then names lose their beginning. Numbers are never cut. In a pipe, a
    file, with COLUMNS set or with --width, names are whole whatever that takes.
    """
    table = dataclasses.replace(
        table,
        rows=[list(map(visible, row)) for row in table.rows],
        footer=list(map(visible, table.footer)),
    )
    room = Room.of(width)
    table = _without_zeros(table, room.width)
    table, left_out = _without_spares(table, room)
    widths, gap = _fit(table, room)
    drawn = RichTable(box=_RULED, show_edge=False, pad_edge=False, padding=(0, gap - 1, 0, 0))
    drawn.show_footer = bool(table.footer)
    heads = [_telling_head({row[i] for row in table.rows}, fitted) for i, fitted in enumerate(widths)]
    for i, (column, fitted) in enumerate(zip(table.columns, widths, strict=True)):
        drawn.add_column(
            Text(column.title),
            Text(shorten(table.footer[i], fitted)) if table.footer else "",
            justify="right" if column.number else "left",
            width=fitted,
            no_wrap=True,
        )
    for row in table.rows:
        drawn.add_row(*map(Text, map(shorten, row, widths, heads)))
    body = _plain(drawn, sum(widths) + gap * len(widths))
    told = [wrapped(f"no room for: {', '.join(left_out)}", width)] if left_out else []
    return as_lines(*([table.title] if table.title else []), body, *told)


def wrapped(text: str, width: int | None = None, indent: str = "  ") -> Lines:
    """`text` broken at spaces to lines of at most `width`; lines after the first are indented."""
    room = width or _asked() or terminal_width()
    lines = textwrap.wrap(
        visible(text), room, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return Lines("\n".join(lines))


def terminal_width() -> int:
    """Columns of the terminal on standard output; 80 where there is none."""
    if not sys.stdout.isatty():
        return PLAIN_WIDTH
    return shutil.get_terminal_size((PLAIN_WIDTH, 24)).columns


def _asked() -> int | None:
    """The width that --width names, else COLUMNS."""
    asked = asked_width.get()
    if asked is not None:
        return asked
    told = os.environ.get("COLUMNS", "")
    return int(told) if told.isdecimal() and int(told) else None


def shorten(text: str, width: int, head: int = 0) -> str:
    """`text` in at most `width` characters: its end, which tells it apart, after `head` of its beginning."""
    return shorten_middle(text, width, max(width - len(_ELLIPSIS) - head, 0))


def shorten_middle(text: str, width: int, tail: int | None = None) -> str:
    """`text` in at most `width` characters; what goes is taken from before its last `tail`, its middle."""
    if len(text) <= width:
        return text
    kept = max(width - len(_ELLIPSIS), 0)
    tail = (kept + 1) // 2 if tail is None else tail
    return text[: kept - tail] + _ELLIPSIS[: width - kept] + (text[-tail:] if tail else "")


def _telling_head(texts: set[str], width: int) -> int:
    """The least of the beginnings that keeps different texts different; 0 where none does."""
    long = {text for text in texts if len(text) > width}
    for head in range(max(width - len(_ELLIPSIS), 0) + 1):
        if len({shorten(text, width, head) for text in long}) == len(long):
            return head
    return 0


def _widths(table: Table) -> list[int]:
    lines = [*table.rows, table.footer] if table.footer else table.rows
    return [max([len(c.title), *(len(line[i]) for line in lines)]) for i, c in enumerate(table.columns)]


def _without_zeros(table: Table, width: int | None) -> Table:
    """Where the table is too wide, columns of nothing but zeros go first, from the right."""
    zeros = [
        i for i, column in enumerate(table.columns) if column.number and table.rows and _is_zero(table, i)
    ]
    while zeros and width is not None and sum(_widths(table)) + 2 * (len(table.columns) - 1) > width:
        table = table.without([zeros.pop()])
    return table


def _without_spares(table: Table, room: Room) -> tuple[Table, list[str]]:
    """In a window in which not even shortened names fit, the table less columns that it can spare."""
    left_out: list[str] = []
    while room.cut and room.width is not None:
        least = [
            min(w, _NARROWEST) if c.flexible else w
            for w, c in zip(_widths(table), table.columns, strict=True)
        ]
        spare = max(range(len(least)), key=lambda i: (table.columns[i].spare, i))
        if sum(least) + len(least) - 1 <= room.width or not table.columns[spare].spare:
            break
        left_out.insert(0, table.columns[spare].title)
        table = table.without([spare])
    return table, left_out


def _is_zero(table: Table, column: int) -> bool:
    return {row[column] for row in (*table.rows, *([table.footer] if table.footer else []))} <= {"0", "", "-"}


def _fit(table: Table, room: Room) -> tuple[list[int], int]:
    """Column widths and the gap between them: first the gap gives way, then the names."""
    widths = _widths(table)
    gaps = len(widths) - 1
    if room.width is None or sum(widths) + 2 * gaps <= room.width:
        return widths, 2
    excess = sum(widths) + gaps - room.width
    for i in reversed(range(len(widths))):
        if room.cut and table.columns[i].flexible and excess > 0:
            given = min(excess, max(widths[i] - _NARROWEST, 0))
            widths[i] -= given
            excess -= given
    return widths, 1


def _plain(renderable: RichTable, width: int) -> Lines:
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False, markup=False)
    with console.capture() as capture:
        console.print(renderable)
    return Lines("\n".join(line.rstrip() for line in capture.get().rstrip("\n").split("\n")))
