"""Fold networks made at random, and insert into them, in float64: `make random`.

Nothing is checked while folding, so that what comes out is what the laws alone decided.
"""

from __future__ import annotations

import argparse
import collections
import warnings
from collections.abc import Callable, Iterator

import torch

from tools.sweeps.random_files import exporter_of, file_trials
from tools.sweeps.random_nets import RandomNet
from tools.sweeps.random_programs import program_trials
from tools.sweeps.random_trials import TOLERANCE, Trial, module_trials

FRONT_ENDS: dict[str, Callable[[int], Iterator[Trial]]] = {
    "module": lambda seed: module_trials(RandomNet(seed)),
    "program": lambda seed: program_trials(RandomNet(seed)),
    "onnx": lambda seed: file_trials(RandomNet(seed), exporter_of(seed)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--as", choices=FRONT_ENDS, default="module", dest="front", help="what a network is given as"
    )
    parser.add_argument("--nets", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    trials = FRONT_ENDS[chosen.front]
    kept: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    done: collections.Counter[str] = collections.Counter()
    wrong = 0
    for seed in range(chosen.first, chosen.first + chosen.nets):
        bad: list[str] = []
        try:
            for trial in trials(seed):
                done[trial.what] += len(trial.plan.sites)
                kept[trial.what].update(skip.reason.value for skip in trial.plan.skips)
                if trial.error > TOLERANCE:
                    bad.append(f"{trial.what}: {trial.error:.3g}")
        except Exception as error:  # noqa: BLE001  whatever breaks is what we look for
            bad.append(f"{type(error).__name__}: {error}")
        if bad:
            wrong += 1
            print(f"seed {seed}: {'; '.join(bad)}\n{RandomNet(seed).told()}", flush=True)
    for what, sites in done.items():
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in kept[what].most_common())
        print(f"{what}: {sites:,} of {sites + kept[what].total():,}; not: {reasons}")
    print(f"{chosen.nets:,} networks as {chosen.front}: wrong outputs in {wrong}")
    raise SystemExit(int(bool(wrong)))


if __name__ == "__main__":
    main()
