"""Draw each law of docs/algebra.md as an SVG: `python tools/docs/draw_laws.py`.

Every drawing has two lines of equal output. Above, the map stands where the BatchNorm was; below, where the
law has moved it. A map is a pill with one stripe for each channel, so that the stripes show where each
channel's numbers go.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "laws"

_HUES = ("#d9485f", "#e8912d", "#2f9e6e", "#3b7dd8", "#8b5cc7", "#5c6b7a")
_NOBODY = "#ffffff"
_INK, _PAPER, _LINE, _BOX = "#1f2733", "#f7f8fa", "#8792a2", "#e4e9f0"
_FONT = "font-family='system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif'"
_GAP, _HEIGHT, _LANE = 22, 34, 48


@dataclasses.dataclass(frozen=True)
class Box:
    """An op of the model; `changed` where the law has changed its numbers."""

    text: str
    changed: bool = False

    @property
    def width(self) -> int:
        return 20 + round(7.4 * len(self.text))


@dataclasses.dataclass(frozen=True)
class Pill:
    """An affine map: what it does, and a stripe for each channel (None: nobody asks)."""

    text: str
    stripes: Sequence[int | None] = (0, 1, 2)

    @property
    def width(self) -> int:
        return 26 + round(7.4 * len(self.text)) + 7 * len(self.stripes)


@dataclasses.dataclass(frozen=True)
class Label:
    """The name of a value."""

    text: str

    @property
    def width(self) -> int:
        return round(8 * len(self.text)) + 4


Node = Box | Pill | Label
Chain = Sequence[Node]


@dataclasses.dataclass(frozen=True)
class Line:
    """Branches that meet in the trunk, or (`forks`) a trunk that parts into them; or one plain chain."""

    branches: Sequence[Chain]
    trunk: Chain = ()
    forks: bool = False


@dataclasses.dataclass(frozen=True)
class Drawing:
    """The same output twice: with the map where it was, and where it is now; `sign` is ≠ where it is not."""

    title: str
    before: Line
    after: Line
    sign: str = "="


def _line(*nodes: Node) -> Line:
    return Line((nodes,))


X, Y = Label("x"), Label("y")
_S, _T, _ST = Pill("s·"), Pill("+ t"), Pill("s· + t")


def _st(*stripes: int | None) -> Pill:
    return Pill("s· + t", stripes)


def _through(op: str, after: Pill = _ST, before: Pill = _ST) -> tuple[Line, Line]:
    """The map behind an op, and before it."""
    return _line(X, Box(op), after, Y), _line(X, before, Box(op), Y)


DRAWINGS: dict[str, Drawing] = {
    "take-output": Drawing(
        "A layer takes the map in at its output",
        _line(X, Box("W· + b"), _ST, Y),
        _line(X, Box("(s·W)· + (s·b + t)", changed=True), Y),
    ),
    "take-input": Drawing(
        "A layer takes the map in at its input",
        _line(X, _ST, Box("W· + b"), Y),
        _line(X, Box("(W·s)· + (b + ΣW·t)", changed=True), Y),
    ),
    "border": Drawing(
        "At a border of zeros the shift is missing",
        _line(X, _ST, Box("pad 0"), Box("W· + b"), Y),
        _line(X, Box("pad 0"), _ST, Box("W· + b"), Label("not y")),
        sign="≠",
    ),
    "split": Drawing(
        "Scale and shift may part",
        _line(X, _ST, Y),
        _line(X, Pill("+ t/s"), _S, Y),
    ),
    "compose": Drawing(
        "Two maps are one",
        _line(X, Pill("s₁· + t₁"), Pill("s₂· + t₂"), Y),
        _line(X, Pill("s₂s₁· + s₂t₁ + t₂"), Y),
    ),
    "identity": Drawing("Identity, eval dropout, a cast", *_through("identity")),
    "reshape": Drawing("Flatten: each channel becomes a run", *_through("flatten", _st(0, 0, 1, 1, 2, 2))),
    "permute": Drawing("The map's axes are permuted alike", *_through("(N, C, L) → (N, L, C)")),
    "slice": Drawing(
        "A part asks nothing of the rest",
        *_through("[1:3]", _st(1, 2), _st(None, 1, 2, None)),
    ),
    "select": Drawing(
        "Picked channels take their numbers along",
        *_through("pick 2, 0", _st(2, 0), _st(0, None, 2)),
    ),
    "parts": Drawing(
        "Parts of one value ask for their parts of the map",
        Line(((_st(0, 1), Label("y₁")), (_st(2, 3), Label("y₂"))), (X, Box("split")), forks=True),
        Line(((Label("y₁"),), (Label("y₂"),)), (X, _st(0, 1, 2, 3), Box("split")), forks=True),
    ),
    "concat": Drawing(
        "Each branch takes its slice",
        Line(((Label("a"),), (Label("b"),)), (Box("concat"), _st(0, 1, 2, 3), Y)),
        Line(((Label("a"), _st(0, 1)), (Label("b"), _st(2, 3))), (Box("concat"), Y)),
    ),
    "repeat": Drawing("Copies along an axis that the map does not know", *_through("expand")),
    "channel-shuffle": Drawing(
        "A shuffle carries the numbers along",
        *_through("shuffle", _st(0, 2, 1, 3), _st(0, 1, 2, 3)),
    ),
    "pixel-shuffle": Drawing(
        "One channel out of r² in: each gets its numbers",
        *_through("pixel shuffle", _st(0, 1), _st(0, 0, 0, 0, 1, 1, 1, 1)),
    ),
    "average": Drawing("A mean lets a map by", *_through("mean")),
    "sum": Drawing(
        "A sum of n elements counts the shift n times",
        _line(X, Box("sum of n"), _ST, Y),
        _line(X, Pill("s· + t/n"), Box("sum of n"), Y),
    ),
    "maximum": Drawing("A maximum lets a map by that does not turn it over", *_through("max, all s ≥ 0")),
    "pad": Drawing("Copied borders carry the map", *_through("pad by reflection")),
    "add": Drawing(
        "The scale goes to each branch, the shift to one",
        Line(((Label("a"),), (Label("b"),)), (Box("+"), _ST, Y)),
        Line(((Label("a"), _ST), (Label("b"), _S)), (Box("+"), Y)),
    ),
    "constant-add": Drawing(
        "Around a constant",
        _line(X, Box("+ c"), _ST, Y),
        _line(X, Pill("s· + (t + s·c − c)"), Box("+ c"), Y),
    ),
    "constant-times": Drawing(
        "Around a factor",
        _line(X, Box("c ·"), _ST, Y),
        _line(X, Pill("s· + t/c"), Box("c ·"), Y),
    ),
    "relu": Drawing(
        "ReLU lets a positive scale by, and no shift",
        _line(X, Box("ReLU"), Pill("s·, s ≥ 0"), Y),
        _line(X, Pill("s·, s ≥ 0"), Box("ReLU"), Y),
    ),
    "slope": Drawing(
        "A slope turns over for a negative scale",
        _line(X, Box("PReLU, slope a"), Pill("s·, s < 0"), Y),
        _line(X, Pill("(a·s)·"), Box("PReLU, slope 1/a", changed=True), Y),
    ),
    "attention": Drawing(
        "Rows of a softmax sum to one",
        _line(Label("V"), Box("softmax(QKᵀ) ·"), _ST, Y),
        _line(Label("V"), _ST, Box("softmax(QKᵀ) ·"), Y),
    ),
    "spread": Drawing(
        "A spread knows the size of a scale, and no shift",
        _line(X, _ST, Box("std"), Y),
        _line(X, Box("std"), Pill("|s|·"), Y),
    ),
    "scatter": Drawing(
        "A sum at places that the data name lets a scale by",
        _line(X, Box("sum at nodes"), Pill("s·"), Y),
        _line(X, Pill("s·"), Box("sum at nodes"), Y),
    ),
    "product": Drawing(
        "One factor takes the scale",
        Line(((Label("a"),), (Label("b"),)), (Box("×"), Pill("s·"), Y)),
        Line(((Label("a"), Pill("s·")), (Label("b"),)), (Box("×"), Y)),
    ),
    "summand": Drawing(
        "A stored summand takes the shift in",
        _line(X, Box("+ c"), _ST, Y),
        _line(X, Pill("s·"), Box("+ (s·c + t)", changed=True), Y),
    ),
    "inverse": Drawing(
        "Other readers take the inverse in",
        Line(((_ST, Y), (Box("W"), Label("z"))), (X,), forks=True),
        Line(((Y,), (Pill("(· − t)/s"), Box("W"), Label("z"))), (X, _ST), forks=True),
    ),
    "factor": Drawing(
        "A stored factor takes the scale in",
        _line(X, _S, Box("c ×"), Y),
        _line(X, Box("(s·c) ×", changed=True), Y),
    ),
    "sideways": Drawing(
        "The other branch of a sum gives way",
        Line(((Label("a"), _ST), (Label("b"),)), (Box("+"), Y)),
        Line(((Label("a"),), (Label("b"), Pill("· / s"))), (Box("+"), _ST, Y)),
    ),
    "merge": Drawing(
        "Branches over one value become one convolution",
        Line(
            ((X, Box("3×3"), _ST), (X, Box("1×1"), Pill("s· + t", (3, 4, 5)))),
            (Box("+"), Y),
        ),
        _line(X, Box("3×3", changed=True), Y),
    ),
}


def svg(drawing: Drawing) -> str:
    """The drawing as one SVG, on a ground of its own, so that it is legible on any page."""
    lines = (drawing.before, drawing.after)
    heights = [_LANE * len(line.branches) for line in lines]
    width = max(max(_width(line) for line in lines) + 64, round(7.9 * len(drawing.title)) + 32)
    height = sum(heights) + 60
    top = 42
    parts = [
        f"<text x='16' y='26' font-size='14' font-weight='600' fill='{_INK}'>{escape(drawing.title)}</text>"
    ]
    for number, (line, tall) in enumerate(zip(lines, heights, strict=True)):
        middle = top + tall / 2
        if number:
            parts.append(_text(24, middle, drawing.sign, size=20, weight=600))
        parts += _drawn(line, 44, middle)
        top += tall
    head = (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' width='{width}'"
        f" height='{height}' role='img' {_FONT}>"
    )
    ground = f"<rect width='{width}' height='{height}' rx='10' fill='{_PAPER}'/>"
    return "\n".join((head, f"<title>{escape(drawing.title)}</title>", ground, *parts, "</svg>", ""))


def _width(line: Line) -> int:
    fork = _GAP if line.trunk else 0
    return max(map(_length, line.branches)) + fork + _length(line.trunk)


def _length(chain: Chain) -> int:
    return sum(node.width for node in chain) + _GAP * max(len(chain) - 1, 0)


def _drawn(line: Line, left: float, middle: float) -> Iterator[str]:
    lanes = [middle + _LANE * (i - (len(line.branches) - 1) / 2) for i in range(len(line.branches))]
    if not line.trunk:
        yield from _chain(line.branches[0], left, middle)
        return
    longest = max(map(_length, line.branches))
    trunk_left = left if line.forks else left + longest + _GAP
    branch_left = left + _length(line.trunk) + _GAP if line.forks else left
    for branch, lane in zip(line.branches, lanes, strict=True):
        ends = branch_left + (0 if line.forks else _length(branch))
        meets = trunk_left + _length(line.trunk) if line.forks else trunk_left
        start, end = ((meets, middle), (ends, lane)) if line.forks else ((ends, lane), (meets, middle))
        yield _arrow(*start, *end)
        yield from _chain(branch, branch_left, lane)
    yield from _chain(line.trunk, trunk_left, middle)


def _chain(chain: Chain, left: float, middle: float) -> Iterator[str]:
    for number, node in enumerate(chain):
        if number:
            yield _arrow(left - _GAP, middle, left, middle)
        yield from _node(node, left, middle)
        left += node.width + _GAP


def _node(node: Node, left: float, middle: float) -> Iterator[str]:
    top = middle - _HEIGHT / 2
    if isinstance(node, Label):
        yield _text(left + node.width / 2, middle, node.text, style="italic")
        return
    if isinstance(node, Box):
        fill, line = ("#fde7bd", "#b7791f") if node.changed else (_BOX, _LINE)
        yield _rect(left, top, node.width, fill, line, radius=5)
        yield _text(left + node.width / 2, middle, node.text)
        return
    yield _rect(left, top, node.width, "#ffffff", "#3b7dd8", radius=_HEIGHT / 2)
    stripes = 7 * len(node.stripes)
    yield _text(left + 13 + (node.width - 26 - stripes) / 2, middle, node.text)
    for number, channel in enumerate(node.stripes):
        x = left + node.width - 13 - stripes + 7 * number
        fill = _NOBODY if channel is None else _HUES[channel]
        yield (
            f"<rect x='{x:g}' y='{middle - 9:g}' width='6' height='18' fill='{fill}'"
            f" stroke='{_LINE if channel is None else fill}' stroke-width='0.7'/>"
        )


def _rect(left: float, top: float, width: float, fill: str, line: str, *, radius: float) -> str:
    return (
        f"<rect x='{left:g}' y='{top:g}' width='{width:g}' height='{_HEIGHT}' rx='{radius:g}' fill='{fill}'"
        f" stroke='{line}'/>"
    )


def _text(
    x: float, middle: float, text: str, *, size: int = 14, weight: int = 400, style: str = "normal"
) -> str:
    return (
        f"<text x='{x:g}' y='{middle + size * 0.35:g}' font-size='{size}' font-weight='{weight}'"
        f" font-style='{style}' text-anchor='middle' fill='{_INK}'>{escape(text)}</text>"
    )


def _arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    tip = f"M{x2 - 7:g},{y2 - 4:g} L{x2 - 1:g},{y2:g} L{x2 - 7:g},{y2 + 4:g}"
    way = f"M{x1 + 2:g},{y1:g} " + (
        f"L{x2 - 2:g},{y2:g}" if y1 == y2 else f"C{x1 + 14:g},{y1:g} {x2 - 16:g},{y2:g} {x2 - 2:g},{y2:g}"
    )
    return f"<path d='{way} {tip}' fill='none' stroke='{_LINE}' stroke-width='1.4'/>"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, drawing in DRAWINGS.items():
        (FOLDER / f"{name}.svg").write_text(svg(drawing), encoding="utf-8", newline="\n")
