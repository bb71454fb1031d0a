"""How often `bench` sees a difference that is not there: A against A, a hundred times.

    python -m tools.measures.false_claims [--times 100] [--rounds 30]

Exit 1 for more than one claim in a hundred.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections import Counter

import torch
from torch import nn

from bntool.graph.inputs import Inputs
from bntool.runtime.benchmarking import Candidate, benchmark


def network() -> nn.Module:
    """A run of about a millisecond, as small as anybody times."""
    layers: list[nn.Module] = []
    for given, made in ((3, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(given, made, 3), nn.BatchNorm2d(made), nn.ReLU()]
    return nn.Sequential(*layers).eval()


def main() -> int:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--times", type=int, default=100)
    asked.add_argument("--rounds", type=int, default=30)
    given = asked.parse_args()
    inputs_of = Inputs((torch.randn(1, 3, 32, 32),)).batched()
    told: Counter[bool] = Counter()
    widths = []
    for _ in range(given.times):
        model = network()
        pair = [Candidate("A", model), Candidate("the same", copy.deepcopy(model))]
        (versus,) = benchmark(pair, inputs_of, batches=(1,), rounds=given.rounds).versus
        told[versus.measurable] += 1
        assert versus.interval is not None
        low, high = versus.interval
        widths.append(high - low)
        if versus.measurable:
            print(versus.verdict)
    middle = sorted(widths)[len(widths) // 2]
    print(f"{told[True]} false claims of {given.times}; an interval is {middle:.3f} wide in the median")
    return int(told[True] > given.times // 100)


if __name__ == "__main__":
    sys.exit(main())
