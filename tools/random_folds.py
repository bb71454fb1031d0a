"""Fold networks made at random, and insert into them, in float64: `make random`.

Nothing is checked while folding, so that what comes out is what the laws alone decided.
"""

from __future__ import annotations

import argparse
import collections
import warnings
from typing import Any

import torch
from torch import Tensor, nn

import bntool
from tools.random_nets import SIDE, RandomNet

TOLERANCE = 1e-9
"""Relative to the largest output. Fourteen steps in float64 round to about 1e-14; a channel whose variance is
zero is scaled by up to 1/√ε ≈ 300, and a few of them may stand in a row."""


def inputs_of(net: RandomNet, batch: int = 2) -> Tensor:
    return torch.randn(batch, net.channels, SIDE, SIDE, dtype=torch.float64)


def outputs_of(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        out: Any = model(x)
    return [out] if isinstance(out, Tensor) else list(out)


def difference(before: nn.Module, after: nn.Module, net: RandomNet) -> float:
    """The largest difference of the outputs, relative to their peak, on inputs that were not observed.

    Infinite where one output has numbers and the other has not.
    """
    worst = 0.0
    for batch in (2, 3):
        x = inputs_of(net, batch)
        for old, new in zip(outputs_of(before, x), outputs_of(after, x), strict=True):
            if not torch.equal(torch.isfinite(old), torch.isfinite(new)):
                return float("inf")
            numbers = torch.isfinite(old)
            if bool(numbers.any()):
                error = float((old - new)[numbers].abs().max())
                worst = max(worst, error / max(float(old[numbers].abs().max()), 1e-6))
    return worst


def fold_one(net: RandomNet, *, unshare: bool = False) -> tuple[bntool.SurgeryResult, float]:
    """The fold of a network, unchecked, and how far its outputs are from the original's."""
    result = bntool.fold(net, (inputs_of(net),), check="none", unshare=unshare)
    return result, difference(net, result.model, net)


def insert_one(net: RandomNet) -> tuple[bntool.SurgeryResult, float, float]:
    """An insertion, how far the outputs moved, and how far after folding it away again."""
    result = bntool.insert(net, (inputs_of(net),), activations=("any",))
    back = bntool.fold(result.model, (inputs_of(net),), check="none")
    return result, difference(net, result.model, net), difference(net, back.model, net)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nets", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    kept: collections.Counter[str] = collections.Counter()
    folded = total = sites = wrong = 0
    for seed in range(chosen.first, chosen.first + chosen.nets):
        net = RandomNet(seed)
        inserted, moved, back = insert_one(net)
        found = {"insert": (moved and float("inf"), back)}
        sites += len(inserted.sites)
        if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in net.modules()):
            result, error = fold_one(net)
            found["fold"] = (error,)
            found["fold, unshared"] = (fold_one(net, unshare=True)[1],)
            folded, total = folded + len(result.sites), total + len(result.sites) + len(result.skips)
            kept.update(skip.reason.value for skip in result.skips)
        bad = {what: errors for what, errors in found.items() if max(errors) > TOLERANCE}
        if bad:
            wrong += 1
            print(f"seed {seed}: {bad}\n{net.told()}", flush=True)
    reasons = ", ".join(f"{n:,} {reason}" for reason, n in kept.most_common())
    print(f"{chosen.nets:,} networks: {folded:,} of {total:,} BatchNorms folded; kept: {reasons}")
    print(f"{sites:,} inserted; wrong outputs in {wrong} networks")
    raise SystemExit(int(bool(wrong)))


if __name__ == "__main__":
    main()
