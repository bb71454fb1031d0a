"""Laws that meet in networks made at random, as no test has put them together: a sample of `make random`."""

from __future__ import annotations

import torch
from torch import nn

from tools.random_folds import TOLERANCE, difference, fold_one, insert_one, outputs_of
from tools.random_nets import RandomNet


def test_a_seed_is_one_network() -> None:
    one, two = RandomNet(5), RandomNet(5)
    x = torch.randn(1, one.channels, 12, 12, dtype=torch.float64)
    assert one.told() == two.told() != RandomNet(6).told()
    assert all(map(torch.equal, outputs_of(one, x), outputs_of(two, x)))


def test_numbers_where_there_were_none_and_none_where_there_were_are_a_difference() -> None:
    net = RandomNet(5)
    assert difference(net, net, net) == 0.0

    class Nothing(nn.Module):
        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [torch.full_like(out, torch.nan) for out in outputs_of(net, x)]

    assert difference(net, Nothing(), net) == difference(Nothing(), net, net) == float("inf")


def test_folds_are_right_where_nothing_checks_them() -> None:
    folded = kept = 0
    for seed in range(50):
        net = RandomNet(seed)
        for unshare in (False, True):
            result, error = fold_one(net, unshare=unshare)
            assert error <= TOLERANCE, f"seed {seed}, unshare={unshare}\n{net.told()}"
        norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert len(result.sites) + len(result.skips) == len(norms)
        folded, kept = folded + len(result.sites), kept + len(result.skips)
    assert folded > kept > 0, "networks that are all foldable, or none, show nothing"


def test_insertions_change_nothing_and_fold_away() -> None:
    sites = 0
    for seed in range(100, 150):
        net = RandomNet(seed)
        result, moved, back = insert_one(net)
        assert moved == 0.0, f"seed {seed}\n{net.told()}"
        assert back <= TOLERANCE, f"seed {seed}\n{net.told()}"
        sites += len(result.sites)
    assert sites > 15
