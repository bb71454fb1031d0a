"""Plain-text tables in one house style: ASCII, numbers never cut, long names shortened in the middle."""

from __future__ import annotations

import dataclasses
import io
import shutil
import sys
import textwrap
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from bntool.core.text import Lines, as_lines, visible

PLAIN_WIDTH = 80
_NARROWEST = 10
_ELLIPSIS = ".."

# ASCII only: a report must survive a log file and a console of any encoding.
_RULED = box.Box("    \n    \n--- \n    \n    \n--- \n    \n    \n", ascii=True)


@dataclasses.dataclass(frozen=True)
class Column:
    """A column title; `number` aligns right; `flexible` may be shortened in the middle to fit.

    Of several flexible columns the rightmost gives way first.
    """

    title: str
    number: bool = False
    flexible: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of text under columns. `footer` is one last row below a rule."""

    columns: tuple[Column, ...]
    rows: Sequence[Sequence[str]]
    title: str = ""
    footer: Sequence[str] = ()


def render(table: Table, width: int | None = None) -> Lines:
    """The table as plain text, at most `width` columns wide as far as its flexible columns allow.

    Default width: the terminal's, or 80 where standard output is not a terminal.
    """
    table = dataclasses.replace(
        table,
        rows=[list(map(visible, row)) for row in table.rows],
        footer=list(map(visible, table.footer)),
    )
    lines = [*table.rows, table.footer] if table.footer else list(table.rows)
    widths, gap = _fit(table.columns, lines, terminal_width() if width is None else width)
    drawn = RichTable(box=_RULED, show_edge=False, pad_edge=False, padding=(0, gap - 1, 0, 0))
    drawn.show_footer = bool(table.footer)
    tails = [_telling_tail({row[i] for row in table.rows}, fitted) for i, fitted in enumerate(widths)]
    for i, (column, fitted) in enumerate(zip(table.columns, widths, strict=True)):
        drawn.add_column(
            Text(column.title),
            Text(shorten_middle(table.footer[i], fitted)) if table.footer else "",
            justify="right" if column.number else "left",
            width=fitted,
            no_wrap=True,
        )
    for row in table.rows:
        drawn.add_row(*map(Text, map(shorten_middle, row, widths, tails)))
    body = _plain(drawn, sum(widths) + gap * len(widths))
    return as_lines(table.title, body) if table.title else body


def wrapped(text: str, width: int | None = None, indent: str = "  ") -> Lines:
    """`text` broken at spaces to lines of at most `width`; lines after the first are indented."""
    room = terminal_width() if width is None else width
    lines = textwrap.wrap(
        visible(text), room, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return Lines("\n".join(lines))


def terminal_width() -> int:
    """Columns of the terminal on standard output; 80 where there is none."""
    if not sys.stdout.isatty():
        return PLAIN_WIDTH
    return shutil.get_terminal_size((PLAIN_WIDTH, 24)).columns


def shorten_middle(text: str, width: int, tail: int | None = None) -> str:
    """`text` in at most `width` characters; what goes is taken from before its last `tail`, its middle."""
    if len(text) <= width:
        return text
    kept = max(width - len(_ELLIPSIS), 0)
    tail = (kept + 1) // 2 if tail is None else tail
    return text[: kept - tail] + _ELLIPSIS[: width - kept] + (text[-tail:] if tail else "")


def _telling_tail(texts: set[str], width: int) -> int | None:
    """The tail nearest to a half that keeps different texts different; None where none does, or any."""
    long = {text for text in texts if len(text) > width}
    kept = max(width - len(_ELLIPSIS), 0)
    half = (kept + 1) // 2
    for tail in sorted(range(kept + 1), key=lambda tail: abs(tail - half)):
        if len({shorten_middle(text, width, tail) for text in long}) == len(long):
            return tail
    return None


def count(number: int) -> str:
    """A count with thousands separators: `48,884`."""
    return f"{number:,}"


def signed(number: int) -> str:
    """A difference with its sign and thousands separators: `+1,280`, `-64`, `0`."""
    return f"{number:+,}" if number else "0"


def size(byte_count: int) -> str:
    """A size in binary units, exact below 1 KiB: `512 B`, `191.0 KiB`, `527.8 MiB`."""
    amount = float(byte_count)
    if abs(amount) < 1024:
        return f"{byte_count} B"
    for unit in ("KiB", "MiB", "GiB"):
        amount /= 1024
        if abs(amount) < 1024:
            return f"{amount:.1f} {unit}"
    return f"{amount / 1024:.1f} TiB"


def shape_text(shape: Sequence[int] | None) -> str:
    """`1x3x224x224`; `scalar` for no axes; empty for no shape."""
    if shape is None:
        return ""
    return "x".join(map(str, shape)) or "scalar"


def _fit(columns: Sequence[Column], lines: Sequence[Sequence[str]], width: int) -> tuple[list[int], int]:
    """Column widths and the gap between them: first the gap gives way, then the flexible columns."""
    widths = [max([len(column.title), *(len(line[i]) for line in lines)]) for i, column in enumerate(columns)]
    gaps = len(columns) - 1
    if sum(widths) + 2 * gaps <= width:
        return widths, 2
    excess = sum(widths) + gaps - width
    for i in reversed(range(len(columns))):
        if columns[i].flexible and excess > 0:
            given = min(excess, max(widths[i] - _NARROWEST, 0))
            widths[i] -= given
            excess -= given
    return widths, 1


def _plain(renderable: RichTable, width: int) -> Lines:
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False, markup=False)
    with console.capture() as capture:
        console.print(renderable)
    return Lines("\n".join(line.rstrip() for line in capture.get().rstrip("\n").split("\n")))
