from __future__ import annotations

import pytest
import torch
from torch import nn

import bntool
from bntool.experiment.watching import Watcher, places_in_both
from tests.experiment.nets import classifier

IMAGES = torch.randn(8, 1, 9, 9, generator=torch.Generator().manual_seed(0))


def records(model: nn.Module, watcher: Watcher, steps: int = 1) -> list[dict]:
    for step in range(steps):
        with watcher.step(step):
            model.zero_grad()
            model(IMAGES).square().sum().backward()
    return watcher.records


def test_the_input_of_each_activation_is_what_is_watched() -> None:
    model = classifier()
    result = bntool.insert(model, IMAGES[:2])
    plain, normed = places_in_both(model, result.plan)
    (record,) = records(model.train(), Watcher(model, plain, 1))
    inputs = model[0](IMAGES).detach()  # 8 x 4 x 7 x 7 values: fewer than the sample, so all of them
    seen = record["values"]["0"]
    assert seen["mean"] == pytest.approx(float(inputs.mean()), abs=1e-6)
    assert seen["std"] == pytest.approx(float(inputs.std(correction=0)), rel=1e-5)
    expected = torch.quantile(inputs.flatten(), torch.tensor([0.01, 0.25, 0.5, 0.75, 0.99]))
    assert seen["quantiles"] == pytest.approx(expected.tolist(), abs=1e-5)
    assert record["gradients"]["2"] == pytest.approx(float(model[2].weight.grad.norm()), rel=1e-5)

    with_norm = result.model.train()
    (record,) = records(with_norm, Watcher(with_norm, normed, 1))
    assert list(record["values"]) == ["0", "2"]
    for layer in ("0", "2"):
        # γ = 1, β = 0: mean 0 and variance 1 but for ε, within the roundings of a float32 mean.
        assert record["values"][layer]["mean"] == pytest.approx(0, abs=1e-5)
        assert record["values"][layer]["std"] == pytest.approx(1, abs=1e-3)
    assert list(record["gradients"]) == ["0", "2", "7"]
    assert record["gradients"]["2"] == pytest.approx(float(with_norm[3].weight.grad.norm()), rel=1e-5)


def test_behind_the_activation_it_is_the_activations_output() -> None:
    model = classifier()
    result = bntool.insert(model, IMAGES[:2], position="after")
    plain, normed = places_in_both(model, result.plan)
    (record,) = records(model, Watcher(model, plain, 1))
    assert record["values"]["0"]["quantiles"][0] == 0
    with_norm = result.model.train()
    (record,) = records(with_norm, Watcher(with_norm, normed, 1))
    assert record["values"]["0"]["mean"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("position", ["before", "after"])
def test_dead_channels_are_counted(position: str) -> None:
    model = classifier()
    with torch.no_grad():
        model[0].bias[:3] = -100
    result = bntool.insert(model, IMAGES[:2], position=position)
    plain, normed = places_in_both(model, result.plan)
    (record,) = records(model, Watcher(model, plain, 1))
    assert record["values"]["0"]["dead"] == 0.75
    with_norm = result.model.train()
    (record,) = records(with_norm, Watcher(with_norm, normed, 1))
    # Before the activation BatchNorm takes the bias away again; behind it, what is constant stays so.
    assert record["values"]["0"]["dead"] == (0 if position == "before" else 0.75)


def test_no_hook_stays_and_none_is_there_between() -> None:
    model = classifier()
    plain, _ = places_in_both(model, bntool.insert(model, IMAGES[:2]).plan)
    watcher = Watcher(model, plain, 3)
    hooks = []
    for step in range(7):
        with watcher.step(step):
            hooks.append(sum(len(module._forward_hooks) for module in model.modules()))
            model(IMAGES)
        assert not any(module._forward_hooks for module in model.modules())
    assert hooks == [2, 0, 0, 2, 0, 0, 2]
    assert [record["step"] for record in watcher.records] == [0, 3, 6]


def test_values_that_are_no_numbers_are_none() -> None:
    model = classifier()
    plain, _ = places_in_both(model, bntool.insert(model, IMAGES[:2]).plan)
    with torch.no_grad():
        model[0].weight.fill_(torch.nan)
    (record,) = records(model, Watcher(model, plain, 1))
    assert record["values"]["0"]["mean"] is None
    assert record["values"]["0"]["quantiles"] == [None] * 5
    assert record["gradients"]["0"] is None


def test_large_activations_are_sampled() -> None:
    model = nn.Sequential(nn.Conv2d(1, 64, 3), nn.ReLU())
    plain, _ = places_in_both(model, bntool.insert(model, IMAGES[:2]).plan)
    watcher = Watcher(model, plain, 1)
    first, second = records(model, watcher, 2)
    assert first["values"] == second["values"]
    values = model[0](IMAGES).detach()
    assert values.numel() > 4096
    # The standard error of the mean of 4096 values, five times.
    assert first["values"]["0"]["mean"] == pytest.approx(
        float(values.mean()), abs=5 * float(values.std()) / 64
    )
