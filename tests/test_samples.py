from __future__ import annotations

import importlib
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from samples.seed_network import seed_network

MODEL = Path(__file__).parents[1] / "samples" / "model.pt"


def test_the_network_has_the_agreed_size_and_output() -> None:
    model = seed_network().eval()
    assert sum(p.numel() for p in model.parameters()) == 48_884
    output = model(torch.randn(3, 1, 28, 28))
    assert output.shape == (3, 10)
    # Ten float32 exponentials are added: a few roundings of 2**-24 each.
    assert torch.allclose(output.exp().sum(1), torch.ones(3), rtol=0, atol=16 * 2**-24)


@pytest.mark.timeout(300)
def test_a_trained_network_keeps_its_accuracy_to_the_last_image(
    mnist_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(MODEL.parent))
    insert_then_train = importlib.import_module("insert_then_train")
    held_out = insert_then_train.mnist_tensors(mnist_root, train=False)
    images, _ = insert_then_train.mnist_tensors(mnist_root, train=True)
    figures = {
        name: round(insert_then_train.accuracy(model, *held_out) * 10_000)
        for name, model in insert_then_train.versions(images).items()
    }
    assert len(figures) == 3
    assert set(figures.values()) == {figures["as it is"]}
    assert figures["as it is"] > 9800


def test_seven_convolutions_are_followed_by_a_relu_and_the_last_is_not() -> None:
    layers = list(seed_network())
    followed = [
        isinstance(after, nn.ReLU) for layer, after in pairwise(layers) if isinstance(layer, nn.Conv2d)
    ]
    assert followed == [True] * 7 + [False]


def test_the_saved_module_is_this_network_from_stock_layers_alone() -> None:
    allowed = [nn.Sequential, nn.Conv2d, nn.ReLU, nn.MaxPool2d, nn.Flatten, nn.LogSoftmax]
    with torch.serialization.safe_globals(allowed):
        saved = torch.load(MODEL, weights_only=True)
    assert type(saved) is nn.Sequential
    assert str(saved) == str(seed_network())
    assert not any(module.training for module in saved.modules())
    shapes = {key: value.shape for key, value in seed_network().state_dict().items()}
    assert {key: value.shape for key, value in saved.state_dict().items()} == shapes
    assert all(torch.isfinite(value).all() for value in saved.state_dict().values())


def test_the_saved_network_is_trained() -> None:
    """A handwritten one, drawn as a stroke, is seen as a one."""
    saved = torch.load(MODEL, weights_only=False)
    image = torch.zeros(1, 1, 28, 28)
    image[..., 4:24, 13:15] = 1
    assert int(saved((image - 0.1307) / 0.3081).argmax()) == 1
