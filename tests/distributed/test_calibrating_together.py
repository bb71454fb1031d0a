from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from bntool.calibrating.calibrating import calibrate
from tests.distributed.jobs import DEALT, batches, two_ways


@pytest.mark.parametrize("dealt", DEALT)
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.SyncBatchNorm])
def test_the_statistics_are_those_of_one_process(
    found: list[dict[str, Any]], dealt: str, norm: type[nn.Module]
) -> None:
    alone = calibrate(two_ways(norm), batches())
    assert {layer.name for layer in alone.layers} == {"common", "rare"}
    one = alone.model.state_dict()
    assert int(one["rare.num_batches_tracked"]) < int(one["common.num_batches_tracked"]) == 6
    for rank in found:
        state, document = rank[f"{norm.__name__}, {dealt}"]
        assert document == alone.to_dict()
        for name, tensor in one.items():
            # The order of some merges of float64 moments differs: a few roundings of 1e-16.
            torch.testing.assert_close(state[name], tensor, rtol=1e-12, atol=1e-12)
            assert torch.equal(state[name], found[0][f"{norm.__name__}, {dealt}"][0][name])


def test_no_data_in_any_process_is_said_in_each(found: list[dict[str, Any]]) -> None:
    assert [rank["no data"] for rank in found] == ["the data holds no batch"] * len(found)
    assert [rank["no BatchNorm"] for rank in found] == ["the model has no BatchNorm"] * len(found)


def test_some_process_does_not_reach_a_layer_that_others_reach() -> None:
    """Else the merge of layers that only some processes saw is not tested."""
    seen = [len(calibrate(two_ways(), [batch]).layers) for batch in batches()]
    for size in (2, 3):
        reached = [max((n for i, n in enumerate(seen) if i % size == rank)) for rank in range(size)]
        if min(reached) < max(reached):
            return
    pytest.fail(f"every process sees every layer: {seen}")
