"""Every tolerance that decides a comparison, each with where it comes from. No torch here.

All distances are relative to the peak |reference| of an output, because element by element a relative error
says nothing near zero. What decides is the **noise floor**: the error e0 that the original itself makes in
its own precision, measured against its own float64 run.

    limit = K_NOISE * e0 + eps * sqrt(layers)

The second term holds where e0 is small by luck (exact weights, one layer). A layer rounds once when its
tensor is stored and once when its result is: each relative error is at most u = eps/2. Over `layers` layers
independent errors add like a random walk, u * sqrt(layers); the folded weight adds as much again for its
own cast, so the two together stay within 2 * u * sqrt(layers) = eps * sqrt(layers).
"""

from __future__ import annotations

import dataclasses
import math

K_NOISE = 8.0
"""A fold re-associates one rounding per layer, and ONNX Runtime sums in another order: both are new draws of
the same noise, measured at 1 to 2.2 times e0 on torchvision models. The two are maxima over few draws, so
their ratio scatters; 8 leaves that room, and TF32 left on (2000 times e0) stays far outside."""

DRAWS = 7
"""How often the rounding is drawn anew where the first draw would fail a candidate. A candidate that is one
more draw is the largest of all nine once in nine times, and K_NOISE times the largest hardly ever, even where
a near tie inside the model (an attention that falls one way or the other) makes single draws scatter."""

DOUBLE = 2.0**-52
"""eps of float64."""

ALGEBRA_LIMIT = 1e-10
"""A surgery is algebra: redone in float64 it must agree far below any float32 rounding (6e-8), while the
float64 noise of deep networks, measured near 1e-15 of the peak, stays far under it. A network that carries a
rounding further is held to K_NOISE times what it makes of float64's own."""

SAME_NUMBER = 1e-9
"""Numbers that two plans compute in float64, one by one and not to a peak: each is a few products and sums
of the model's own, so what is the same in both differs by some 1e-15, and what is not by whole digits."""

MANY_INTEGERS = 1000
"""From so many integers on, `K_NOISE` + 2 of them that fall the other way are at most a hundredth."""

MOST_INTEGERS = 0.05
"""Where rounding alone changes a larger share of an output's integers, they decide nothing: `K_NOISE` + 2
times that share is half of them."""

HALF = 0.5
"""No limit lets more than half of an output's integers differ, whatever the noise."""


@dataclasses.dataclass(frozen=True)
class Limit:
    """What one output may differ by, relative to its peak; `undecidable` says why no limit can decide it.

    `absolute` comes on top, whatever the peak: what the runtime's own Sigmoid or Softmax errs by.
    """

    noise_floor: float
    limit: float
    undecidable: str = ""
    absolute: float = 0.0


EXACT = Limit(0.0, 0.0)
"""Equal to the last bit."""

ALGEBRA = Limit(DOUBLE / 2, ALGEBRA_LIMIT)
"""Of a surgery that was redone in float64."""


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """What the user allows in place of the noise floor: no element may lie further off than
    atol + rtol · peak, the largest absolute value of its output.
    """

    atol: float | None = None
    rtol: float | None = None

    @property
    def is_asked(self) -> bool:
        return self.atol is not None or self.rtol is not None

    def __str__(self) -> str:
        pairs = (("atol", self.atol), ("rtol", self.rtol))
        return ", ".join(f"{name} {value:g}" for name, value in pairs if value is not None)


BY_NOISE = Tolerance()
"""None is asked: the noise floor decides."""


def rounding_term(eps: float, layers: int) -> float:
    """The second term of the limit, eps * sqrt(layers), derived at the head of this file."""
    return eps * math.sqrt(max(layers, 1))


def half_the_digits(eps: float) -> float:
    """The relative error that leaves half of the digits; from there on a limit would pass everything."""
    return math.sqrt(eps)


def measured(noise: float, eps: float, layers: int, undecidable: str = "") -> Limit:
    """The limit of an output whose noise was measured against a float64 run."""
    return Limit(noise, K_NOISE * noise + rounding_term(eps, layers), undecidable)


def derived(noise: float, undecidable: str = "", absolute: float = 0.0) -> Limit:
    """The limit where there is no float64 run, and `noise` stands for one draw: a walk, or other roundings.

    Reference and candidate each carry a walk of eps/2 * sqrt(layers), and the candidate may draw K_NOISE
    times that, as it may of a measured one: 1 for the reference's own, 1 for the candidate's cast weights.
    """
    return Limit(noise, (K_NOISE + 2) * noise, undecidable, absolute)


def walk(eps: float, layers: int) -> Limit:
    """The limit by a walk of one rounding for each layer or node, where nothing is measured."""
    return derived(rounding_term(eps, layers) / 2)
