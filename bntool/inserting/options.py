"""What the user asks of an insertion."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Literal

from bntool.errors import UsageError
from bntool.observe.aten import ACTIVATIONS


@dataclasses.dataclass(frozen=True)
class InsertOptions:
    """What to insert and where.

    `activations` are kinds (`relu`, `silu`, …) or `any`. `pooling` lets a pooling layer stand between a
    layer and its activation. Of the sites found, `skip_last` leaves out the last, then `every` keeps each
    N-th, the first included. `per_call` gives a layer that runs several times a BatchNorm for each call.
    `drop_bias` moves a bias that a BatchNorm follows into its running mean. `portable` puts no class of
    bntool's own into the model. `banned` maps a layer to the forms that broke this model when tried.
    """

    activations: tuple[str, ...] = ("relu",)
    position: Literal["before", "after"] = "before"
    linear: bool = False
    pooling: bool = False
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    every: int = 1
    skip_last: bool = False
    per_call: bool = False
    keep_keys: bool = False
    portable: bool = False
    drop_bias: bool = False
    affine: bool = True
    eps: float = 1e-5
    momentum: float = 0.1
    init: Literal["identity", "calibrate", "default"] = "identity"
    sync: bool = False
    banned: Mapping[str, frozenset[str]] = dataclasses.field(default_factory=dict)

    def validate(self) -> None:
        """Raise `UsageError` for an unknown activation or option, or a number out of range."""
        choices = {"position": ("before", "after"), "init": ("identity", "calibrate", "default")}
        for option, allowed in choices.items():
            if getattr(self, option) not in allowed:
                raise UsageError(f"{option} is {' or '.join(allowed)}, not {getattr(self, option)!r}")
        for option in ("activations", "include", "exclude"):
            if isinstance(getattr(self, option), str):
                raise UsageError(f"{option} is a tuple of names, not one string")
        for name in self.activations:
            if name != "any" and name not in ACTIVATIONS:
                close = difflib.get_close_matches(name.lower(), sorted(ACTIVATIONS), n=3)
                raise UsageError(
                    f"unknown activation {name!r}",
                    next_step=f"did you mean {', '.join(close)}?" if close else "see bntool insert --help",
                )
        if not 0 < self.eps < 1:
            raise UsageError(f"eps must lie between 0 and 1, not {self.eps}")
        if not 0 <= self.momentum <= 1:
            raise UsageError(f"momentum must lie between 0 and 1, not {self.momentum}")
        if self.every < 1:
            raise UsageError(f"every must be 1 or more, not {self.every}")
        if self.portable and self.per_call:
            raise UsageError(
                "a BatchNorm for each call needs a class of bntool's own, which portable rules out",
                next_step="give one of the two",
            )
        if self.drop_bias and self.position == "after":
            raise UsageError(
                "behind the activation a BatchNorm cannot take the bias in",
                next_step='use position "before", or keep the biases',
            )

    def to_dict(self) -> dict[str, object]:
        fields = dataclasses.asdict(self)
        del fields["banned"]
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}
