from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bntool.experiment.training import batch_bounds
from tests.distributed.jobs import NETS, poisoned, trained
from tests.experiment.nets import classifier


@pytest.mark.parametrize("name", NETS)
def test_a_step_together_is_the_step_of_one_process(
    found: list[dict[str, Any]], name: str, tmp_path: Path
) -> None:
    # 95 samples in batches of 20: the last has 15, which neither two nor three processes share evenly with
    # the same number of batches before it.
    state, alone = trained(tmp_path, NETS[name]())
    for rank in found:
        own, progress = rank[name]
        for key, tensor in state.items():
            # float64 sums in another order, ten steps: 1e-16 grown by momentum and by the layers' gains.
            torch.testing.assert_close(own[key], tensor, rtol=1e-10, atol=1e-12, msg=key)
        for ours, theirs in zip(progress.history, alone.history, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-10)


def test_every_process_holds_the_same_model(found: list[dict[str, Any]]) -> None:
    for name in (*NETS, "dropout"):
        first, figures = found[0][name]
        for rank in found[1:]:
            assert all(torch.equal(first[key], tensor) for key, tensor in rank[name][0].items())
            assert rank[name][1].history == figures.history


def test_a_job_that_was_stopped_goes_on_to_the_same_figures(found: list[dict[str, Any]]) -> None:
    for rank in found:
        (whole, figures), (rest, resumed) = rank["dropout"], rank["resumed"]
        assert resumed.history == figures.history
        # A sum of two has no order, and is the same to the bit. Of three it has: after the first step torch
        # lays its buckets anew, so a run that goes on adds in another order. Each of the few steps left then
        # errs by two roundings of a gradient that is no larger than what it changes.
        roundings = 0.0 if len(found) < 3 else 2 * 8 * torch.finfo(torch.float32).eps
        for key, tensor in rest.items():
            apart = (whole[key].double() - tensor.double()).abs().max()
            assert apart <= roundings * whole[key].double().abs().max(), key


def test_the_dropout_of_each_process_is_its_own(found: list[dict[str, Any]], tmp_path: Path) -> None:
    assert found[0]["dropout"][1].history != found[0]["sync"][1].history


def test_an_infinite_loss_in_one_process_ends_the_run_in_all(
    found: list[dict[str, Any]], tmp_path: Path
) -> None:
    _, alone = trained(tmp_path, classifier(), data=poisoned())
    assert alone.diverged is not None
    for rank in found:
        assert rank["infinite"][1].diverged == alone.diverged


def test_the_layers_are_of_their_own_class_again(found: list[dict[str, Any]]) -> None:
    assert all(rank["classes"].count(nn.SyncBatchNorm) == 2 for rank in found)


@pytest.mark.parametrize("length", range(12, 60))
@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_process_has_two_samples_of_each_batch(length: int, size: int) -> None:
    bounds = batch_bounds(length, 12, least=2 * size)
    assert [a for a, _ in bounds] == list(range(0, 12 * len(bounds), 12)) and bounds[-1][1] == length
    assert all(len(range(a, b)[rank::size]) >= 2 for a, b in bounds for rank in range(size))
