"""`bntool insert --init calibrate --data`: measured from data, eval outputs within rounding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from bntool import open_batches
from bntool.api import load
from tests.cli import nets
from tests.cli.conftest import Shell


def images(count: int = 12) -> torch.Tensor:
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(3))


def test_the_statistics_are_those_of_the_data_and_the_output_stays(bntool: Shell) -> None:
    model = nets.plain()
    nets.save(model, "model.pt")
    np.save("images.npy", images().numpy())
    said = bntool("insert", "model.pt", "--init", "calibrate", "--data", "images.npy", *nets.INPUT)
    assert said.code == 0
    assert "unchanged within rounding" in said.out
    inserted = load("model_bn.pt").model
    with torch.no_grad():
        seen = model[0](images()).double()
        norm = inserted[1]
        # float32 sums of 1,200 values behind a convolution: a few units in the sixth digit
        torch.testing.assert_close(norm.running_mean.double(), seen.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
        variance = seen.var((0, 2, 3), correction=0)
        torch.testing.assert_close(norm.running_var.double(), variance, rtol=1e-5, atol=1e-6)
        before, after = model.eval()(images()), inserted.eval()(images())
        # two roundings more at each element, behind one more convolution of 36 terms
        assert float((before - after).abs().max() / before.abs().max()) < 36 * torch.finfo(torch.float32).eps


def test_the_first_training_step_stays_close(bntool: Shell) -> None:
    """On the very data that was measured, train mode normalises by what the affine undoes."""
    model = nets.plain()
    nets.save(model, "model.pt")
    np.save("images.npy", images().numpy())
    assert bntool("insert", "model.pt", "--init", "calibrate", "--data", "images.npy", *nets.INPUT).code == 0
    inserted = load("model_bn.pt").model.train()
    with torch.no_grad():
        before, after = model.train()(images()), inserted(images())
    # σ², μ and γ each carry a rounding, twelve units in all at an element (docs/calibrating.md), and the
    # convolution behind sums 36 of them
    assert float((before - after).abs().max() / before.abs().max()) < 12 * 36 * torch.finfo(torch.float32).eps


def test_the_first_step_is_told_and_so_are_channels_that_hardly_vary(bntool: Shell) -> None:
    model = nets.plain()
    first = next(m for m in model.modules() if isinstance(m, torch.nn.Conv2d))
    with torch.no_grad():
        first.weight[[1, 3]] = 0
    nets.save(model, "model.pt")
    np.save("images.npy", images(40).numpy())
    words = ("insert", "model.pt", "--init", "calibrate", "--data", "images.npy", *nets.INPUT, "--json")
    notes = bntool(*words).document["notes"]
    assert any(note.endswith("channels hardly vary (σ² < ε): 1, 3") for note in notes)
    (told,) = (note for note in notes if note.startswith("first training step"))
    (batch,) = next(iter(open_batches("images.npy"))).args  # drawn by the same seed
    batch = batch.float()
    with torch.no_grad():
        before, after = model.eval()(batch), load("model_bn.pt").model.train()(batch)
    moved = float((before - after).abs().max() / before.abs().max())
    assert float(told.split(" moves by ")[1].split()[0]) == pytest.approx(moved, rel=0.06)  # two digits


def test_data_and_calibrate_go_together(bntool: Shell, refused: Callable[..., object], folder: Path) -> None:
    nets.save(nets.plain(), "model.pt")
    refused("insert", "model.pt", "--init", "calibrate", *nets.INPUT, code=2, says="go together")
    np.save("images.npy", images().numpy())
    refused("insert", "model.pt", "--data", "images.npy", *nets.INPUT, code=2, says="go together")
    assert not (folder / "model_bn.pt").exists()


def test_data_that_does_not_fit_writes_nothing(refused: Callable[..., object], folder: Path) -> None:
    nets.save(nets.plain(), "model.pt")
    np.save("images.npy", np.zeros((4, 5, 12, 12), dtype=np.float32))
    words = ("insert", "model.pt", "--init", "calibrate", "--data", "images.npy", *nets.INPUT)
    refused(*words, code=2, says="images.npy")
    assert not (folder / "model_bn.pt").exists()
