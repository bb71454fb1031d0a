"""What a result shows of itself, as data: tables and lines, drawn as HTML and Markdown here.

Text for a terminal is drawn from the same parts by `report.tables`. No torch here.
"""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Iterable, Iterator, Sequence

from bntool.core.text import escaped, visible


@dataclasses.dataclass(frozen=True)
class Column:
    """A column title; `number` aligns right; `flexible` is of names, which a narrow terminal shortens.

    Of several flexible columns the rightmost gives way first. A `spare` one is left out, and said to be,
    where nothing else helps: the one with the highest figure first.
    """

    title: str
    number: bool = False
    flexible: bool = False
    spare: int = 0


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of text under columns. `footer` is one last row below a rule."""

    columns: tuple[Column, ...]
    rows: Sequence[Sequence[str]]
    title: str = ""
    footer: Sequence[str] = ()

    def without(self, gone: Iterable[int]) -> Table:
        """The same table less some columns."""
        kept = [i for i in range(len(self.columns)) if i not in set(gone)]
        return dataclasses.replace(
            self,
            columns=tuple(self.columns[i] for i in kept),
            rows=[[row[i] for i in kept] for row in self.rows],
            footer=[self.footer[i] for i in kept] if self.footer else (),
        )


@dataclasses.dataclass(frozen=True)
class Said:
    """A sentence, which is wrapped where a page ends; its further lines are indented."""

    text: str
    indent: str = "  "


Part = Table | Said | str
"""A plain string is one line that is not wrapped; an empty one parts what stands around it."""


WARNING = "warning: "
"""How a remark begins that is more than a note."""


def noted(text: str) -> str:
    """A remark as it is shown: as a note, unless it is a warning."""
    return text if text.startswith(WARNING) else f"note: {text}"


class Shown:
    """A result that shows itself in a notebook. A subclass says in `parts` what there is to see."""

    def parts(self) -> Sequence[Part]:
        raise NotImplementedError

    def _repr_html_(self) -> str:
        return html_of(self.parts())

    def _repr_markdown_(self) -> str:
        return markdown_of(self.parts())


# -- drawn ------------------------------------------------------------------------------------------------

_LINE = "font-family:monospace;white-space:pre-wrap;overflow-wrap:anywhere"
_CELL = "text-align:{};white-space:nowrap;padding:2px 8px;font-variant-numeric:tabular-nums"


def html_of(parts: Iterable[Part]) -> str:
    """The parts as HTML that fits a light page and a dark one: it sets no colours."""
    drawn = []
    for block in _blocks(parts):
        if isinstance(block, Table):
            drawn.append(_html_table(block))
        else:
            lines = "\n".join(html.escape(visible(line)) for line in block)
            drawn.append(f'<div style="{_LINE};margin:.4em 0">{lines}</div>')
    return f'<div class="bntool">{"".join(drawn)}</div>'


def _html_table(table: Table) -> str:
    sides = ["right" if column.number else "left" for column in table.columns]

    def row(cells: Sequence[str], tag: str) -> str:
        told = (
            f'<{tag} style="{_CELL.format(side)}">{html.escape(visible(cell))}</{tag}>'
            for cell, side in zip(cells, sides, strict=True)
        )
        return f"<tr>{''.join(told)}</tr>"

    head = row([column.title for column in table.columns], "th")
    body = "".join(row(cells, "td") for cells in table.rows)
    foot = f"<tfoot>{row(table.footer, 'th')}</tfoot>" if table.footer else ""
    title = html.escape(visible(table.title))
    caption = f'<caption style="text-align:left;font-weight:600">{title}</caption>' if title else ""
    made = f"<table>{caption}<thead>{head}</thead><tbody>{body}</tbody>{foot}</table>"
    return f'<div style="overflow-x:auto;max-height:40em;overflow-y:auto">{made}</div>'


def markdown_of(parts: Iterable[Part]) -> str:
    """The parts as Markdown, in which no name means anything but itself."""
    drawn = []
    for block in _blocks(parts):
        if isinstance(block, Table):
            drawn.append("\n".join(_markdown_table(block)))
        else:
            drawn.append("  \n".join(map(escaped, block)))
    return "\n\n".join(drawn) + "\n"


def _markdown_table(table: Table) -> Iterator[str]:
    if table.title:
        yield f"**{escaped(table.title)}**\n"
    yield _markdown_row(column.title for column in table.columns)
    yield _markdown_row("---:" if column.number else "---" for column in table.columns).replace("\\", "")
    for cells in table.rows:
        yield _markdown_row(cells)
    if table.footer:
        yield _markdown_row(table.footer)


def _markdown_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(map(escaped, cells))} |"


def _blocks(parts: Iterable[Part]) -> Iterator[Table | list[str]]:
    """Tables, and the lines that stand together."""
    lines: list[str] = []
    for part in parts:
        text = part.text if isinstance(part, Said) else part
        if isinstance(text, str) and text:
            lines.append(text)
            continue
        if lines:
            yield lines
            lines = []
        if isinstance(text, Table):
            yield text
    if lines:
        yield lines


# -- numbers ----------------------------------------------------------------------------------------------


def count(number: int) -> str:
    """A count with thousands separators: `48,884`."""
    return f"{number:,}"


def counted(number: int, what: str) -> str:
    """A count and what is counted: `1 layer`, `52 layers`."""
    return f"{number:,} {what}{'s' * (number != 1)}"


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


def megabytes(byte_count: int) -> str:
    """Bytes in millions, as torchinfo tells them: `46.76 MB`, `0.00314 MB`."""
    amount = byte_count / 1e6
    digits = 2 if amount >= 1 or not amount else 2 - math.floor(math.log10(amount))
    return f"{amount:,.{digits}f} MB"


def shape_text(shape: Sequence[int] | None) -> str:
    """`1x3x224x224`; `scalar` for no axes; empty for no shape."""
    if shape is None:
        return ""
    return "x".join(map(str, shape)) or "scalar"
