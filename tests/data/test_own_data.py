"""Data as people have it: what other systems leave in folders, images of 16 bits, loaders of every shape."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bntool
from bntool.core.errors import UsageError
from bntool.graph.inputs import Inputs

LIKE = Inputs((torch.zeros(1, 3, 8, 8),))
X, Y = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 2


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six images in two folders."""
    image = pytest.importorskip("PIL.Image")
    drawn = np.random.default_rng(0)
    for number in range(6):
        place = tmp_path / "imgs" / f"c{number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        image.fromarray(drawn.integers(0, 256, (8, 8, 3), dtype="uint8")).save(place / f"{number}.png")
    return tmp_path / "imgs"


def total(batches) -> int:
    return sum(len(batch.args[0]) for batch in batches)


def test_hidden_files_are_no_images(folder):
    for name in ("c0/._0.png", "c0/.ipynb_checkpoints/0-checkpoint.png", "__MACOSX/c0/0.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"no image")
    batches = bntool.open_batches(folder, like=LIKE)
    assert total(batches) == 6
    assert batches.notes[0].endswith("c0 (3), c1 (3)")


def test_sixteen_bits_are_scaled_and_not_cut_off(tmp_path):
    image = pytest.importorskip("PIL.Image")
    values = np.random.default_rng(0).integers(0, 1 << 16, (8, 8)).astype("uint16")
    (tmp_path / "a").mkdir()
    image.fromarray(values).save(tmp_path / "a" / "0.png")
    (batch,) = bntool.open_batches(tmp_path / "a", like=LIKE)
    # an 8-bit image is within half a step of what 16 bits hold
    expected = torch.from_numpy(values.astype("float32") / 65535).expand(3, 8, 8)
    assert (batch.args[0][0] - expected).abs().max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize("pattern", ["c0", "c0/", "c0/*", "imgs"])
def test_a_folder_is_a_pattern(folder, pattern):
    if pattern == "imgs":
        with pytest.raises(UsageError, match="none of 6 files"):
            bntool.open_batches(folder, like=LIKE, include=[pattern])
    else:
        assert total(bntool.open_batches(folder, like=LIKE, include=[pattern])) == 3


def test_means_as_people_write_them(folder):
    (usual,) = bntool.open_batches(folder, like=LIKE, mean="imagenet")
    ways = (
        {"mean": "ImageNet"},
        {"std": "imagenet"},
        {"mean": "[0.485, 0.456, 0.406]", "std": "0.229 0.224 0.225"},
    )
    for way in ways:
        (batch,) = bntool.open_batches(folder, like=LIKE, **way)
        assert torch.equal(batch.args[0], usual.args[0])
    with pytest.raises(UsageError, match="are scaled to") as caught:
        bntool.open_batches(folder, like=LIKE, mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375])
    assert caught.value.next_step == "divide by 255: --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225"
    with pytest.raises(UsageError, match="2 values") as caught:
        bntool.open_batches(folder, like=LIKE, mean=[0.5, 0.5])
    assert caught.value.next_step == "give one value for all, or 3"


@pytest.mark.parametrize(
    "source",
    [
        TensorDataset(X, Y),
        lambda: TensorDataset(X, Y),
        (TensorDataset(X, Y), TensorDataset(X[:2], Y[:2])),
        lambda: (DataLoader(TensorDataset(X, Y), 4), DataLoader(TensorDataset(X[:2], Y[:2]))),
        [{"image": X[:8], "label": Y[:8]}, {"image": X[8:], "label": Y[8:]}],
    ],
    ids=["set", "function", "parts", "loaders", "mappings"],
)
def test_loaders_of_every_shape(source):
    assert total(bntool.open_batches(source, like=LIKE)) == 16


def test_pairs_of_inputs_beside_a_target():
    like = Inputs((torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8)))
    (batch,) = bntool.open_batches([((X, X), Y)], like=like)
    assert [tensor.shape for tensor in batch.args] == [X.shape, X.shape]


@pytest.mark.parametrize(
    ("source", "says", "then"),
    [
        (lambda: None, "gives a NoneType", "an iterable of batches"),
        (list, "gives no batch", "at least one"),
        ([X.movedim(1, -1)], "batches of 16x8x8x3", "numpy.moveaxis"),
        (list(X), "batches of 3x8x8", "single samples"),
        (["text"], r"takes 1 input\n", "give tensors"),
    ],
)
def test_what_is_no_data_says_what_would_be(source, says, then):
    with pytest.raises(UsageError, match=says) as caught:
        list(bntool.open_batches(source, like=LIKE))
    assert then in caught.value.next_step


def test_compare_takes_mappings():
    net = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2))
    part = {"image": X, "label": Y}
    assert len(bntool.compare(net, (part, part), epochs=1, batch_size=8).runs) == 2


def test_batches_of_one_sample_are_warned_of():
    net = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2))
    (warning,) = bntool.calibrate(net, X.split(1)).warnings
    assert "each batch is one sample" in warning
    assert not bntool.calibrate(net, X.split(4)).warnings
    assert not bntool.calibrate(net[:2], X.split(1)).warnings  # the first reads what no BatchNorm has changed
