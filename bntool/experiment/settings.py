"""What a comparison trains with. No torch here."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from typing import Any, Literal

from bntool.core.errors import UsageError

OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("constant", "cosine", "step")
RECORDS = 100
"""How many times a run is looked into, unless `watch_every` says otherwise."""
_SPARSEST = 10
_FEWEST = 10
"""Fewer records than this draw no curve."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How both arms are trained, and how BatchNorm goes into one of them.

    `lrs` are learning rates, each a run of its own; `momentum` is that of SGD. `schedule`: `constant`,
    `cosine` (to 0 over all steps), `step` (a tenth after half of the epochs, a hundredth after three
    quarters). Repeat r has the seed `seed + r`: it orders the batches and, `from_scratch`, draws the
    weights. `sync` makes the BatchNorms normalise by the whole batch where several processes
    share it. `init` is that of `insert`; None stands for `default` from scratch, `identity` otherwise.
    Every `watch_every`-th step is looked into; None stands for a hundred times a run, at most every tenth
    step unless the run would be seen less than ten times; 0 for never.
    """

    epochs: int
    batch_size: int = 128
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    lrs: tuple[float, ...] = (0.01,)
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: Literal["constant", "cosine", "step"] = "constant"
    repeats: int = 1
    seed: int = 0
    from_scratch: bool = False
    activations: tuple[str, ...] = ("relu",)
    position: Literal["before", "after"] = "before"
    affine: bool = True
    sync: bool = False
    init: Literal["identity", "default"] | None = None
    device: str = "cpu"
    watch_every: int | None = None

    def __post_init__(self) -> None:
        """Raise `UsageError` for a choice that there is not, or a number out of range."""
        for name, allowed in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in allowed:
                raise UsageError(
                    f"unknown {name} {getattr(self, name)!r}", next_step=f"use {' or '.join(allowed)}"
                )
        for name, least in (("epochs", 1), ("batch_size", 2), ("repeats", 1), ("seed", 0)):
            if getattr(self, name) < least:
                why = ": BatchNorm needs the variance of a batch" if name == "batch_size" else ""
                raise UsageError(
                    f"{name.replace('_', ' ')} is {getattr(self, name)}",
                    next_step=f"it must be at least {least}{why}",
                )
        if not self.lrs:
            raise UsageError("no learning rate is given", next_step="give one or more: --lr 0.01,0.1")
        for rate in self.lrs:
            if not (math.isfinite(rate) and rate > 0):
                raise UsageError(f"the learning rate is {rate}", next_step="it must be above 0")
        if len(set(self.lrs)) < len(self.lrs):
            raise UsageError("a learning rate is given twice", next_step="give each once")
        if not 0 <= self.momentum < 1:
            raise UsageError(f"momentum is {self.momentum}", next_step="it must be in 0 ≤ momentum < 1")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise UsageError(f"weight decay is {self.weight_decay}", next_step="it must be 0 or more")
        if self.watch_every is not None and self.watch_every < 0:
            raise UsageError(f"watch every is {self.watch_every}", next_step="it must be 0 (never) or more")

    @property
    def norm_init(self) -> Literal["identity", "default"]:
        return self.init or ("default" if self.from_scratch else "identity")

    def rate_at(self, lr: float, step: int, steps: int) -> float:
        """The learning rate of step `step` (from 0) of `steps`."""
        if self.schedule == "cosine":
            return lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        if self.schedule == "step":
            return float(lr * 0.1 ** ((2 * step >= steps) + (4 * step >= 3 * steps)))
        return lr

    def watched_steps(self, steps: int) -> int:
        """Every how many steps a run of `steps` steps is looked into; 0 for never."""
        if self.watch_every is not None:
            return self.watch_every
        return max(1, min(_SPARSEST, steps // _FEWEST), steps // RECORDS)

    def to_dict(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}


def seed_for(*parts: int | str) -> int:
    """A seed of its own for each purpose: no two of them share their random numbers."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
