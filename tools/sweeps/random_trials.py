"""What is tried on one network made at random, as a module: folds and insertions that nothing checks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import bntool
from bntool.core.plan import Plan
from tools.sweeps.random_nets import SIDE, RandomNet

TOLERANCE = 1e-9
"""Relative to the largest output. Fourteen steps in float64 round to about 1e-14; a channel whose variance is
zero is scaled by up to 1/√ε ≈ 300, and a few of them may stand in a row."""

Run = Callable[[Tensor], Sequence[Tensor]]


@dataclasses.dataclass(frozen=True)
class Trial:
    """A surgery on one network, and how far its outputs are from the original's."""

    what: str
    plan: Plan
    error: float


def inputs_of(net: RandomNet, batch: int = 2) -> Tensor:
    return torch.randn(batch, net.channels, SIDE, SIDE, dtype=torch.float64)


def outputs_of(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        out: Any = model(x)
    return [out] if isinstance(out, Tensor) else list(out)


def difference(before: Run, after: Run, net: RandomNet, batches: Sequence[int] = (2, 3)) -> float:
    """The largest difference of the outputs, relative to their peak, on inputs that were not observed.

    Infinite where one output has numbers and the other has not.
    """
    worst = 0.0
    for batch in batches:
        x = inputs_of(net, batch)
        for old, new in zip(before(x), after(x), strict=True):
            if not torch.equal(torch.isfinite(old), torch.isfinite(new)):
                return float("inf")
            numbers = torch.isfinite(old)
            if bool(numbers.any()):
                error = float((old - new)[numbers].abs().max())
                worst = max(worst, error / max(float(old[numbers].abs().max()), 1e-6))
    return worst


def any_is_wrong(error: float) -> float:
    """An insertion must not move the last bit."""
    return float("inf") if error else 0.0


def has_norms(net: RandomNet) -> bool:
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in net.modules())


def module_trials(net: RandomNet) -> Iterator[Trial]:
    """The network as the module that it is."""

    def apart(before: nn.Module, after: nn.Module) -> float:
        return difference(lambda x: outputs_of(before, x), lambda x: outputs_of(after, x), net)

    example = (inputs_of(net),)
    inserted = bntool.insert(net, example, activations=("any",))
    yield Trial("insert", inserted.plan, any_is_wrong(apart(net, inserted.model)))
    back = bntool.fold(inserted.model, example, check="none")
    yield Trial("insert and fold", back.plan, apart(net, back.model))
    if has_norms(net):
        for what, unshare in (("fold", False), ("fold, unshared", True)):
            result = bntool.fold(net, example, check="none", unshare=unshare)
            yield Trial(what, result.plan, apart(net, result.model))
