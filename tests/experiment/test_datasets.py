from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bntool.core.errors import BntoolError, LoadError, UsageError
from bntool.data.choosing import Choice
from bntool.data.images import Preparation
from bntool.experiment.datasets import open_dataset
from bntool.experiment.samples import Held, Streamed
from bntool.graph.inputs import Inputs
from tests.experiment.nets import arrays, write_npz


def test_an_npz_with_both_parts(tmp_path: Path) -> None:
    data = open_dataset(str(write_npz(tmp_path)))
    assert (len(data.train), len(data.test), data.classes) == (96, 48, 3)
    x, y = next(data.train.batches([torch.tensor([5, 2])]))
    images, labels = arrays()
    assert torch.equal(x, torch.from_numpy(images[[5, 2]]))
    assert y.tolist() == labels[[5, 2]].tolist()


def test_an_npz_of_one_part_is_split_by_the_seed(tmp_path: Path) -> None:
    x, y = arrays(50)
    np.savez(tmp_path / "d.npz", x=x, y=y)
    first, again, other = (open_dataset(str(tmp_path / "d.npz"), Choice(seed=seed)) for seed in (1, 1, 2))
    assert (len(first.train), len(first.test)) == (40, 10)
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()
    assert "a fifth is held out" in first.notes[0]
    both = torch.cat([next(part.batches([torch.arange(len(part))]))[0] for part in (first.train, first.test)])
    assert sorted(both.sum((1, 2, 3)).tolist()) == sorted(torch.from_numpy(x).sum((1, 2, 3)).tolist())


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"y": np.zeros(50, int)}, "every training sample is of class 0"),
        ({"y": np.arange(50) % 3 - 1}, "label is -1"),
        ({"y": np.arange(50) % 3 + 0.5}, "the labels are float64"),
        ({"y": np.eye(50, 3, dtype=int)}, r"the labels are int64 of shape \[50, 3\]"),
        ({"y": np.arange(49) % 3}, "50 samples and 49 labels"),
        ({"x": np.full((50, 1, 9, 9), np.nan, "float32")}, "NaN or infinite"),
        ({"x": np.zeros((0, 1, 9, 9), "float32"), "y": np.zeros(0, int)}, "0 samples are too few"),
    ],
)
def test_labels_that_no_classifier_can_learn(tmp_path: Path, changed: dict[str, Any], says: str) -> None:
    x, y = arrays(50)
    np.savez(tmp_path / "d.npz", **{"x": x, "y": y, **changed})
    with pytest.raises(UsageError, match=says):
        open_dataset(str(tmp_path / "d.npz"))


def test_test_labels_that_training_does_not_know(tmp_path: Path) -> None:
    x, y = arrays(50)
    np.savez(tmp_path / "d.npz", x_train=x, y_train=y, x_test=x, y_test=y + 1)
    with pytest.raises(UsageError, match="test labels go up to 3"):
        open_dataset(str(tmp_path / "d.npz"))


@pytest.mark.parametrize("ref", ["mnist", "fashion-mnist"])
def test_known_data_that_is_not_there_is_not_loaded_down(tmp_path: Path, ref: str) -> None:
    pytest.importorskip("torchvision")
    with pytest.raises(LoadError, match=f"cannot read {ref}") as caught:
        open_dataset(ref, root=tmp_path)
    assert "--download" in caught.value.next_step
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ref", ["nothing", "missing.npz", "no_such_module:loader", "x.py:loader"])
def test_data_that_does_not_exist(ref: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LoadError):
        open_dataset(ref)


def test_mnist_is_normalised_as_everybody_does(mnist_root: Path) -> None:
    data = open_dataset("mnist", root=mnist_root)
    assert (len(data.train), len(data.test), data.classes) == (60_000, 10_000, 10)
    assert isinstance(data.train, Held)
    # The background, 0, and the mean of all pixels, which the constants give to four digits only.
    assert float(data.train.inputs.min()) == pytest.approx(-0.1307 / 0.3081, rel=1e-6)
    assert float(data.train.inputs.mean()) == pytest.approx(0, abs=2e-4)


def _images(folder: Path, count: int) -> None:
    from PIL import Image

    for label, shade in (("dark", 40), ("light", 200)):
        (folder / label).mkdir(parents=True)
        for i in range(count):
            Image.new("L", (10, 10), shade + i).save(folder / label / f"{i}.png")


def test_a_folder_of_images_with_and_without_a_test_part(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    _images(tmp_path / "a" / "train", 3)
    _images(tmp_path / "a" / "val", 2)
    _images(tmp_path / "b", 5)
    like = Inputs((torch.zeros(1, 1, 9, 9),))
    data = open_dataset(str(tmp_path / "a"), preparation=Preparation(like, [0.5], [0.25]))
    assert (len(data.train), len(data.test), data.classes) == (6, 4, 2)
    x, y = next(data.train.batches([torch.tensor([0, 5])]))
    assert y.tolist() == [0, 1]
    expected = (torch.tensor([40 / 255, 202 / 255]) - 0.5) / 0.25
    assert torch.allclose(x[:, 0, 4, 4], expected, rtol=0, atol=8 * 2**-24)
    split = open_dataset(str(tmp_path / "b"), preparation=Preparation(like))
    assert (len(split.train), len(split.test)) == (8, 2)
    with pytest.raises(LoadError, match="no data set of images"):
        open_dataset(str(tmp_path / "b" / "dark"), preparation=Preparation(like))


def test_a_folder_without_a_test_part_beside_train(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    (tmp_path / "train").mkdir()
    with pytest.raises(UsageError, match="neither test nor val"):
        open_dataset(str(tmp_path), preparation=Preparation(Inputs((torch.zeros(1, 1, 9, 9),))))


LOADERS = """
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset
from tests.experiment.nets import arrays

x, y = map(torch.from_numpy, arrays(40))

class Shaky(Dataset):
    def __len__(self):
        return 40
    def __getitem__(self, i):
        return x[i] + torch.randn(()), int(y[i])

def tensors():
    return TensorDataset(x, y), TensorDataset(x[:9], y[:9])

def loaders():
    return tuple(DataLoader(part, batch_size=7) for part in tensors())

def batches():
    return zip(x.split(7), y.split(7)), [(x[:9], y[:9])]

def shaky():
    return Shaky(), Shaky()

one = tensors()[0]

def raises():
    raise KeyError("gone")

def singles():
    return [x, x], [x]
"""


@pytest.mark.parametrize("name", ["tensors", "loaders", "batches"])
def test_a_loader_of_the_users_own(tmp_path: Path, name: str) -> None:
    (tmp_path / "own.py").write_text(LOADERS)
    data = open_dataset(f"{tmp_path}/own.py:{name}")
    assert (len(data.train), len(data.test), data.classes) == (40, 9, 3)
    x, y = next(data.train.batches([torch.tensor([39, 0])]))
    images, labels = arrays(40)
    assert torch.equal(x, torch.from_numpy(images[[39, 0]]))
    assert y.tolist() == labels[[39, 0]].tolist()


def test_a_dataset_that_draws_random_numbers_is_asked_every_time(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(LOADERS)
    data = open_dataset(f"{tmp_path}/own.py:shaky")
    assert isinstance(data.train, Streamed)
    parts = [torch.tensor([0, 1])]
    torch.manual_seed(0)
    first, second = next(data.train.batches(parts))[0], next(data.train.batches(parts))[0]
    torch.manual_seed(0)
    again = next(data.train.batches(parts))[0]
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("missing", "has no missing"),
        ("one", "the loader gives a TensorDataset"),
        ("raises", "the loader raised KeyError"),
        ("singles", "the labels are float32"),
    ],
)
def test_a_loader_that_gives_something_else(tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / "own.py").write_text(LOADERS)
    with pytest.raises(BntoolError, match=says):
        open_dataset(f"{tmp_path}/own.py:{name}")
