from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest

from bntool.core.errors import UsageError
from bntool.experiment.settings import Settings, seed_for


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"batch_size": 1}, "batch size is 1"),
        ({"optimizer": "lion"}, "unknown optimizer 'lion'"),
        ({"schedule": "warm"}, "unknown schedule 'warm'"),
        ({"lrs": ()}, "no learning rate"),
        ({"lrs": (0.1, -1.0)}, "learning rate is -1"),
        ({"lrs": (math.nan,)}, "learning rate is nan"),
        ({"lrs": (0.1, 0.1)}, "given twice"),
        ({"momentum": 1.0}, "momentum is 1"),
        ({"weight_decay": -0.1}, "weight decay is -0.1"),
        ({"repeats": 0}, "repeats is 0"),
        ({"watch_every": -1}, "watch every is -1"),
    ],
)
def test_a_setting_out_of_range_is_named(given: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        Settings(**{"epochs": 1, **given})
    assert caught.value.next_step


def test_the_schedules() -> None:
    def rates(schedule: Any) -> list[float]:
        settings = Settings(epochs=1, schedule=schedule)
        return [settings.rate_at(0.8, step, 8) for step in range(8)]

    assert rates("constant") == [0.8] * 8
    assert rates("step") == pytest.approx([0.8] * 4 + [0.08] * 2 + [0.008] * 2, rel=1e-15)
    cosine = rates("cosine")
    assert cosine[0] == 0.8
    assert cosine[4] == pytest.approx(0.4, rel=1e-15)
    assert all(a > b > 0 for a, b in pairwise(cosine))


def test_how_often_a_run_is_looked_into() -> None:
    assert Settings(epochs=1).watched_steps(4690) == 46
    assert Settings(epochs=1).watched_steps(20) == 2
    assert [Settings(epochs=1).watched_steps(n) for n in (1, 9, 10, 100, 999, 1100)] == [1, 1, 1, 10, 10, 11]
    assert Settings(epochs=1, watch_every=3).watched_steps(4690) == 3
    assert Settings(epochs=1, watch_every=0).watched_steps(4690) == 0


def test_each_purpose_has_a_seed_of_its_own() -> None:
    seeds = {
        seed_for(seed, purpose, n) for seed in range(4) for purpose in ("order", "epoch") for n in range(4)
    }
    assert len(seeds) == 32
    assert all(0 <= seed < 1 << 63 for seed in seeds)
