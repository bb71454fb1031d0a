"""Laws that meet in networks made at random, as no test has put them together: a sample of `make random`."""

from __future__ import annotations

import collections
import warnings

import pytest
import torch
from torch import Tensor, nn

from tools.sweeps.random_files import file_trials
from tools.sweeps.random_folds import FRONT_ENDS
from tools.sweeps.random_nets import RandomNet
from tools.sweeps.random_trials import TOLERANCE, difference, outputs_of


def test_a_seed_is_one_network() -> None:
    one, two = RandomNet(5), RandomNet(5)
    x = torch.randn(1, one.channels, 12, 12, dtype=torch.float64)
    assert one.told() == two.told() != RandomNet(6).told()
    assert all(map(torch.equal, outputs_of(one, x), outputs_of(two, x)))


def test_numbers_where_there_were_none_and_none_where_there_were_are_a_difference() -> None:
    net = RandomNet(5)

    def run(x: Tensor) -> list[Tensor]:
        return outputs_of(net, x)

    def nothing(x: Tensor) -> list[Tensor]:
        return [torch.full_like(out, torch.nan) for out in run(x)]

    assert difference(run, run, net) == 0.0
    assert difference(run, nothing, net) == difference(nothing, run, net) == float("inf")


@pytest.mark.parametrize(("front", "nets"), [("module", 40), ("program", 4), ("onnx", 8)])
def test_surgeries_are_right_where_nothing_checks_them(front: str, nets: int) -> None:
    done: collections.Counter[str] = collections.Counter()
    kept: collections.Counter[str] = collections.Counter()
    for seed in range(100, 100 + nets):
        net = RandomNet(seed)
        norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporters, of their own doings
            trials = list(FRONT_ENDS[front](seed))
        for trial in trials:
            assert trial.error <= TOLERANCE, f"seed {seed}, {trial.what}: {trial.error}\n{net.told()}"
            what = trial.what.rpartition(", ")[2]
            done[what] += len(trial.plan.sites)
            kept[what] += len(trial.plan.skips)
            if front == "module" and "fold" in trial.what and "insert" not in trial.what:
                assert len(trial.plan.sites) + len(trial.plan.skips) == len(norms)
    assert done["fold"] > kept["fold"] > 0, "networks that are all foldable, or none, show nothing"
    assert done["insert"] > nets / 4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("front", "seed"),
    [
        ("module", 90156),  # a convolution that the forward adds behind its BatchNorm and by itself
        ("onnx", 90007),  # a node that has its weight under the name of another
    ],
)
def test_networks_that_once_came_out_wrong(front: str, seed: int) -> None:
    for trial in FRONT_ENDS[front](seed):
        assert trial.error <= TOLERANCE, trial.what


def test_a_file_of_the_newer_exporter() -> None:
    trials = list(file_trials(RandomNet(7), "dynamo"))
    assert {trial.what for trial in trials} >= {"dynamo, insert", "dynamo, fold"}
    assert max(trial.error for trial in trials) <= TOLERANCE
