from __future__ import annotations

import dataclasses
import importlib
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

import bntool
from bntool.experiment.comparison import compare_training
from bntool.experiment.datasets import open_dataset
from bntool.experiment.samples import Held
from bntool.experiment.settings import Settings
from samples.seed_network import seed_network

MODEL = Path(__file__).resolve().parents[2] / "samples" / "model.pt"


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


def test_the_report_of_the_seed_experiment_puts_ours_beside_what_was_published() -> None:
    run_module = importlib.import_module("samples.seed_experiment.run")
    runs = [
        {"arm": arm, "seed": seed, "history": [{"train_accuracy": 0.5, "test_accuracy": 0.25 + seed / 4}]}
        for seed in (0, 1)
        for arm in ("plain", "batchnorm")
    ]
    counts = {"trainable": 48_884, "buffers": 0}
    parameters = {"before": counts, "after": {"trainable": 49_320, "buffers": 443}}
    parameters["delta"] = {"trainable": 436, "buffers": 443}
    text = run_module.report(
        {"runs": runs, "parameters": parameters, "settings": {"epochs": 1}, "torch": "2"}
    )
    # The mean of 25 and 50 %, and their standard deviation, 25/√2.
    assert "| without BatchNorm | 1 | test | 14 | 37.50 ± 17.68 |" in text
    assert "| with BatchNorm | 10 | test | 99.39 | not run |" in text
    assert "| trainable parameters | 48,884 | 49,320 | +436 |" in text


def test_insert_compare_fold_on_mnist_keeps_every_image(mnist_root: Path, tmp_path: Path) -> None:
    data = open_dataset("mnist", root=mnist_root)
    train, test = data.train, data.test
    assert isinstance(train, Held) and isinstance(test, Held)
    some = dataclasses.replace(
        data,
        train=Held(train.inputs[:1536], train.labels[:1536]),
        test=Held(test.inputs[:1000], test.labels[:1000]),
        labels=None,
    )
    settings = Settings(epochs=1, batch_size=64, lrs=(0.05,), from_scratch=True)
    found = compare_training(seed_network(), some, settings, tmp_path / "c")
    assert found.surgery.parameters["delta"]["trainable"] == 436
    trained = found.models["batchnorm"]
    folded = bntool.fold(trained, train.inputs[:2])
    # Seven convolutions without bias, of 218 channels, have one afterwards.
    assert folded.parameters["after"]["trainable"] == 48_884 + 218
    with torch.no_grad():
        named = [model(test.inputs[:1000]).argmax(1) for model in (trained, folded.model)]
    assert torch.equal(*named)
    hits = int((named[1] == test.labels[:1000]).sum())
    assert hits == round(1000 * found.runs[1].history[-1]["test_accuracy"])
    assert found.runs[1].trains
