"""`docs/elsewhere-kept.md`: each class of BatchNorms that a fold keeps, and why, looked into by hand.

A rule is a pattern over the class as `kept_classes` names it, whether algebra allows a fold, and the reason.
The first rule that fits tells. A class that none fits is listed as not yet looked into, as if it could fold.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any


@dataclasses.dataclass(frozen=True)
class Rule:
    """Why the BatchNorms of some classes stay; `must`: algebra allows no fold of the network as it is."""

    pattern: str
    title: str
    must: bool
    why: str


RULES = (
    Rule(
        r"not-observed",
        "Did not run",
        True,
        """The layer takes no part in a forward in eval mode: an auxiliary head, a branch that only trains,
        a leftover of a backbone. There is nothing to fold, and nothing slows inference.""",
    ),
    Rule(
        r"weight-computed|custom-forward",
        "A weight that its layer computes",
        False,
        """Max-norm, weight norm, masks, signs: the layer computes its weight from parameters alone, and
        would undo an edit at the next call. `--bake` stores what it computes, and then they fold: the
        page counts how many. No law writes through slices of one weight (octave convolutions) nor
        through a product of the weights of two layers, which algebra would allow.""",
    ),
    Rule(
        r"output-used-elsewhere, written over",
        "A write in place behind it",
        False,
        """A way is found, and then an activation that works in place would write over what a shortcut
        reads, for the BatchNorm's own output was what it wrote over. With `inplace=False` they fold; in
        exported programs and ONNX files, where nothing is in place, they do.""",
    ),
    Rule(
        r"axis-mismatch",
        "A layer that mixes the channels",
        True,
        """A layer before it takes the channels for a direction in space and convolves along them
        (dimension-wise convolutions), or one value is spread over all channels: its one weight cannot
        hold a number for each channel. An activation or a softmax follows.""",
    ),
    Rule(
        r"called-more-than-once|weight-shared",
        "One weight, several BatchNorms",
        False,
        """The layer is called once for each of several BatchNorms, which ask for different weights: one
        weight can hold one of them. With a clone for each call (`--unshare`) they fold.""",
    ),
    Rule(
        r"unknown-op: real|unknown-op: imag|unknown-op: .*stack",
        "Complex numbers",
        True,
        """Two real BatchNorms stand over the real and the imaginary part of a complex convolution, (A·u −
        B·v) and (A·v + B·u). The first asks for s₁·A, the second for s₂·A of one stored A: as long as
        s₁ ≠ s₂ no A, B does both. Behind them stands an activation of each part.""",
    ),
    Rule(
        r"reaches-input: ",
        "On the network's input",
        True,
        """Upstream there is no weight. Downstream its shift meets zero padding or a product with another
        value, or it is one part of a concatenation that an activation reads.""",
    ),
    Rule(
        r"shift-at-padding",
        "Zero padding",
        True,
        """With x' = x upstream, a layer with zero padding sees 0 where s·x + t would have had 0 too:
        W·(s·x + t) + b differs at the border from anything W'·x + b' gives by Σ W·t over the taps
        outside, a number that depends on the place. A bias does not. The value before is read by a
        shortcut that is padded with zero channels.""",
    ),
    Rule(
        r"zero-scale",
        "γ = 0 or near it",
        True,
        """The inverse of s·x + t is needed by other readers, and s is (nearly) zero.""",
    ),
    Rule(
        r"negative-scale: (ReLU|maximum|scatter\w*) →",
        "A maximum or ReLU before it, γ < 0",
        True,
        """What goes in is max(a, b), and max(s·a, s·b) = s·max(a, b) for s ≥ 0 only: with s < 0 the
        function is a minimum, which no scale, shift or weight before the maximum makes (max is convex
        in its inputs, s·max is concave). Downstream the shift meets zero padding, a product, or another
        activation. With γ > 0 they fold.""",
    ),
    Rule(
        r"negative-scale: ",
        "A shortcut from a maximum, γ < 0",
        True,
        """The scale goes upstream through a sum whose other branch comes from a ReLU or a maximum: all
        branches of a sum have one scale, and that branch's is positive. With γ > 0 they fold.""",
    ),
    Rule(
        r"nonlinear: curve →",
        "Behind a curve: ELU, GELU, SiLU, a sigmoid",
        True,
        """s·f(x) + t = f(s'·x + t') for all x only for f that keep their shape under scaling, which these
        do not (compare the limits, or the second derivative). Downstream the shift t meets the border
        of a zero padded layer, a product, another curve, or the output.""",
    ),
    Rule(
        r"nonlinear: ReLU →",
        "Behind a ReLU, before what takes no shift",
        True,
        """relu(x') ≥ 0 with its corner at 0: s·relu(x) + t with t ≠ 0 is no relu of anything. Downstream t
        meets zero padding, a gate (t·g is no shift: g depends on the data), or another activation.""",
    ),
    Rule(
        r"nonlinear: ",
        "Between operations that take no shift",
        True,
        """Upstream stands a product, a softmax, an activation, or a sum or maximum of as many values as
        the data say, whose shift no weight gives; downstream a product, an activation or a shortcut
        from the input.""",
    ),
    Rule(
        r"output-used-elsewhere: .*→ BN → (.*, )?(ReLU|curve)",
        "Before an activation, its input read by others: pre-activation",
        True,
        """f(s·x + t) has its corner (or its bend) at x = −t/s. Without the BatchNorm the activation reads
        x' = α·x + β, one map for all readers of x. So of all the BatchNorms over one value at most one
        can go: the others take the inverse in and stay, for their corners lie elsewhere. In a dense
        block all read the same maps: one of a block goes. Along shortcuts a sum has one scale for all
        that it adds: one scale for all blocks of a stage. A shift of its own each block could have, but
        only past a ReLU with γ > 0, as its scale must then go down; and a stage that begins with a
        maximum or a ReLU allows no γ < 0 at all. With γ of both signs at most one of a stage goes. With
        γ > 0 all of them fold, but for writes in place (above).""",
    ),
    Rule(
        r"output-used-elsewhere: .*→ BN → (sum|concat)",
        "On a branch that rejoins a path from the same value",
        True,
        """x is what a ReLU or a maximum gives, which others read as it is: its scale can become p > 0
        alone. The branch s·x + t is added to (or joined with) another branch, then a ReLU: the other
        branch could take s in, but a ReLU behind the sum lets s ≥ 0 by alone.""",
    ),
    Rule(
        r"output-used-elsewhere: .*→ BN → .*layer",
        "Before a layer with zero padding, its input read by others",
        True,
        """The scale goes down into the layer. The shift must go up, for the border knows of none; upstream
        stands a sum of a gated branch (no shift passes a product with a gate) and a shortcut from an
        activation, or the map lies along an axis that the layer keeps and a curve follows.""",
    ),
    Rule(
        r"output-used-elsewhere: .*→ BN → output|output-used-elsewhere: .*→ BN → mean",
        "What it gives is returned, or pooled by a gate",
        True,
        """Downstream there is no layer. Upstream the value is read by other BatchNorms and by the sums of
        later blocks, which go on to other outputs.""",
    ),
)


ASKED = 95.0
"""Per cent of all BatchNorms that are to fold."""


def shares(rows: dict[str, dict[str, Any]]) -> str:
    """What folds of all BatchNorms, and of those that algebra allows; which class makes most of the rest."""
    good = [row for row in rows.values() if row["status"] == "ok" and row["bn_total"]]
    total, folded = (sum(row[key] for row in good) for key in ("bn_total", "folded"))
    numbers = {rule.title: sum(n for _, n, _ in _classes_of(good, rule)) for rule in RULES}
    must = sum(numbers[rule.title] for rule in RULES if rule.must)
    share, most = 100 * folded / total, 100 * folded / (total - must)
    text = f"of all {total:,} BatchNorms {folded:,} fold, {share:.1f} %"
    if share < ASKED:
        title, number = max(numbers.items(), key=lambda one: one[1])
        text += (
            f", which is below {ASKED:.0f} % since {number:,} of the others are of one class: {title.lower()}"
        )
    return f"{text}. {must:,} must stay; of the other {total - must:,} fold {most:.1f} %"


def kept_page(rows: dict[str, dict[str, Any]]) -> str:
    """The page: both shares, and a section for each rule with its classes."""
    good = [row for row in rows.values() if row["status"] == "ok" and row["bn_total"]]
    told = [(rule, _classes_of(good, rule)) for rule in RULES]
    others = _classes_of(good, None)
    lines = [
        "# What stays in models of other libraries",
        "",
        "Each class of BatchNorms that [the sweep](elsewhere.md) keeps, looked into by hand once. A class",
        "is the reason, what stands before the BatchNorm, what reads it, and what reads its input beside it.",
        "Written by `make elsewhere`; the texts stand in `tools/sweeps/kept_page.py`.",
        "",
        f"In figures: {shares(rows)}.",
        "",
    ]
    for rule, found in told:
        if not found:
            continue
        number = sum(n for _, n, _ in found)
        why = " ".join(rule.why.split())
        lines += [f"## {rule.title}", "", f"*{number:,} BatchNorms; {_allowed(rule)}* · {why}", ""]
        lines += _table(found)
    if others:
        lines += ["## Not yet looked into", "", "Counted as if algebra allowed a fold.", "", *_table(others)]
    return "\n".join(lines).rstrip() + "\n"


def _allowed(rule: Rule) -> str:
    return "they must stay" if rule.must else "algebra allows a fold"


def _table(found: list[tuple[str, int, str]]) -> list[str]:
    rows = [f"| `{name}` | {number} | {example} |" for name, number, example in found]
    return ["| class | BN | for example |", "|---|---|---|", *rows, ""]


def _classes_of(good: list[dict[str, Any]], rule: Rule | None) -> list[tuple[str, int, str]]:
    """The classes of which this rule tells (None: those of which none does), the most frequent first."""
    found: dict[str, tuple[int, str]] = {}
    for row in good:
        for name, (number, example) in row.get("classes", {}).items():
            first = next((r for r in RULES if re.match(r.pattern, name)), None)
            if first is rule:
                before, shown = found.get(name, (0, f"{row['model']} `{example}`"))
                found[name] = before + number, shown
    return sorted(((name, *rest) for name, rest in found.items()), key=lambda one: -one[1])
