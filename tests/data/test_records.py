"""Parquet, Hugging Face data sets and webdataset shards, read by their own libraries where installed."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from bntool import open_batches
from bntool.cli import run
from bntool.core.errors import LoadError, UsageError
from bntool.data.choosing import Choice
from bntool.data.images import Preparation
from bntool.experiment.datasets import open_dataset
from bntool.graph.inputs import Inputs

LIKE = Inputs((torch.zeros(1, 3, 8, 8),))
KINDS = ("parquet", "saved", "shards")
NET = "from torch import nn\ndef net(): return nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2))\n"


def pixels() -> tuple[np.ndarray, list[int]]:
    """24 images (8, 8, 3), class by class."""
    drawn = np.random.default_rng(0)
    labels = [c for c in range(3) for _ in range(8)]
    return drawn.integers(0, 256, (24, 8, 8, 3), dtype="uint8"), labels


def encoded(image: np.ndarray) -> bytes:
    pillow = pytest.importorskip("PIL.Image")
    file = io.BytesIO()
    pillow.fromarray(image).save(file, "PNG")
    return file.getvalue()


def write_shard(path: Path, samples: list[dict[str, bytes]]) -> None:
    with tarfile.open(path, "w") as shard:
        for number, sample in enumerate(samples):
            for ending, content in sample.items():
                member = tarfile.TarInfo(f"{number:04}.{ending}")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))


def write_parquet(path: Path, columns: dict[str, list]) -> None:
    arrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(arrow.table(columns), path)


def write(kind: str, folder: Path) -> Path:
    """The images as one of the kinds, with a training part of 24 and a test part of 6."""
    folder.mkdir()
    images, labels = pixels()
    content = [encoded(image) for image in images]
    parts = {"train": range(24), "test": range(0, 24, 4)}
    if kind == "saved":
        library = pytest.importorskip("datasets")
        features = library.Features({"image": library.Image(), "label": library.ClassLabel(3)})
        held = {
            part: library.Dataset.from_dict(
                {"image": [{"bytes": content[i], "path": None} for i in n], "label": [labels[i] for i in n]},
                features=features,
            )
            for part, n in parts.items()
        }
        library.disable_progress_bars()
        library.DatasetDict(held).save_to_disk(folder)
        return folder
    for part, numbers in parts.items():
        for half, of in enumerate((numbers[: len(numbers) // 2], numbers[len(numbers) // 2 :])):
            if kind == "parquet":
                rows = [{"bytes": content[i], "path": ""} for i in of]
                label = [labels[i] for i in of]
                write_parquet(folder / f"{part}-{half}.parquet", {"image": rows, "label": label})
            else:
                pytest.importorskip("webdataset")
                rows = [{"png": content[i], "cls": b"%d" % labels[i], "json": b"{}"} for i in of]
                write_shard(folder / f"{part}-{half:06}.tar", rows)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_images_are_drawn_by_the_seed_from_the_part_that_is_asked_for(tmp_path, kind):
    place = write(kind, tmp_path / "d")
    images, _ = pixels()
    expected = torch.from_numpy(images).permute(0, 3, 1, 2).float().div(255)
    lying = list(open_batches(place, like=LIKE, shuffle=False, batch_size=23))
    assert [len(batch.args[0]) for batch in lying] == [24]  # a last batch of one joins the one before
    assert torch.equal(lying[0].args[0], expected)
    drawn = open_batches(place, like=LIKE, batch_size=8)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))[:8].sort().values
    assert torch.equal(next(iter(drawn)).args[0], expected[order])
    (note,) = drawn.notes
    assert note.startswith("24 samples of ")
    assert note.endswith("0 (8), 1 (8), 2 (8)")
    test = open_batches(place, like=LIKE, split="test", shuffle=False)
    assert torch.equal(next(iter(test)).args[0], expected[::4])
    (some,) = open_batches(place, like=LIKE, samples=5)
    assert len(some.args[0]) == 5
    with pytest.raises(UsageError, match="there is no part dev"):
        open_batches(place, like=LIKE, split="dev")
    normed = next(iter(open_batches(place, like=LIKE, shuffle=False, mean="imagenet")))
    assert float(normed.args[0].min()) < -1
    with pytest.raises(UsageError, match="include is for a folder of images"):
        open_batches(place, like=LIKE, include=["*.png"])


@pytest.mark.parametrize("kind", KINDS)
def test_both_parts_are_labelled_data_for_a_comparison(tmp_path, kind):
    place = write(kind, tmp_path / "d")
    data = open_dataset(str(place), preparation=Preparation(LIKE))
    assert (len(data.train), len(data.test), data.classes) == (24, 6, 3)
    assert data.labels is not None
    assert data.labels[1].tolist() == [0, 0, 1, 1, 2, 2]
    turned = open_dataset(str(place), Choice(split="test,train"), Preparation(LIKE))
    assert (len(turned.train), len(turned.test)) == (6, 24)
    whole = open_dataset(str(place), Choice(samples=10), Preparation(LIKE))
    assert (len(whole.train), len(whole.test)) == (10, 6)


def test_arrays_and_names_of_classes_in_parquet(tmp_path):
    drawn = np.random.default_rng(0).standard_normal((20, 5)).astype("float32")
    held = {"x": list(drawn), "kind": ["cat", "dog"] * 10, "id": list(range(20))}
    write_parquet(tmp_path / "d.parquet", held)
    like = Inputs((torch.zeros(1, 5),))
    (batch,) = open_batches(tmp_path / "d.parquet", like=like, shuffle=False)
    assert torch.equal(batch.args[0], torch.from_numpy(drawn))
    data = open_dataset(str(tmp_path / "d.parquet"), Choice(columns=("x", "kind")), Preparation(None))
    assert (len(data.train), len(data.test), data.classes) == (16, 4, 2)
    with pytest.raises(UsageError, match="no column holds the labels: the data holds x, kind, id"):
        open_dataset(str(tmp_path / "d.parquet"))
    write_parquet(tmp_path / "odd.parquet", {"x": [[1.0], [1.0, 2.0]], "label": [0, 1]})
    with pytest.raises(UsageError, match=r"sizes \(1,\) and \(2,\)"):
        list(open_batches(tmp_path / "odd.parquet"))
    write_parquet(tmp_path / "two.parquet", {"a": list(drawn), "b": list(drawn)})
    with pytest.raises(UsageError, match="not clear which column") as caught:
        open_batches(tmp_path / "two.parquet", like=like)
    assert caught.value.next_step == "name the input's column: --columns a"
    assert len(next(iter(open_batches(tmp_path / "two.parquet", like=like, columns=["b"]))).args[0]) == 20


def test_arrays_in_shards_and_what_is_no_column_of_every_sample(tmp_path):
    pytest.importorskip("webdataset")
    content = io.BytesIO()
    np.save(content, np.ones((3, 8, 8), "float32"))
    write_shard(tmp_path / "a.tar", [{"npy": content.getvalue(), "txt": b"one"}] * 4 + [{"txt": b"two"}])
    with pytest.raises(UsageError, match=r"sample 0004 has no npy: it holds txt"):
        open_batches(tmp_path / "a.tar", like=LIKE)
    (batch,) = open_batches(tmp_path / "a.tar", like=LIKE, samples=4, shuffle=False)
    assert batch.args[0].shape == (4, 3, 8, 8)
    objects = io.BytesIO()
    np.save(objects, np.array([print]), allow_pickle=True)
    write_shard(tmp_path / "b.tar", [{"npy": objects.getvalue()}] * 2)
    with pytest.raises(LoadError, match="holds Python objects"):
        open_batches(tmp_path / "b.tar", like=LIKE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("command", ["calibrate", "insert", "compare"])
def test_a_column_that_is_not_there_is_one_error_and_nothing_is_written(
    tmp_path, monkeypatch, capsys, kind, command
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    write(kind, tmp_path / "d")
    Path("net.py").write_text(
        NET.replace("nn.BatchNorm2d(2)", "nn.ReLU()") if command != "calibrate" else NET
    )
    more = {"insert": ["--init", "calibrate"], "compare": ["--epochs", "1"]}.get(command, [])
    words = [command, "net.py:net", "--input", "1x3x8x8", "--data", "d", *more]
    assert run([*words, "--columns", "picture"]) == 2
    said = capsys.readouterr().err
    assert said.count("error:") == 1
    assert "there is no column picture: the data holds " in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d", "net.py"]


@pytest.mark.parametrize(("name", "says"), [("d.parquet", "pyarrow"), ("d.tar", "webdataset")])
def test_a_library_that_is_not_installed_is_named(tmp_path, monkeypatch, name, says):
    (tmp_path / name).write_bytes(b"damaged")
    monkeypatch.setitem(sys.modules, says, None)
    with pytest.raises(LoadError, match=f"needs {says}, which is not installed") as caught:
        open_batches(tmp_path / name, like=LIKE)
    assert caught.value.next_step == f"pip install {says}"


def test_damaged_records_are_one_error(tmp_path):
    for name, library in (("d.parquet", "pyarrow"), ("d.tar", "webdataset")):
        pytest.importorskip(library)
        (tmp_path / name).write_bytes(b"damaged" * 100)
        with pytest.raises(LoadError, match="cannot read the data"):
            open_batches(tmp_path / name, like=LIKE)
    write_shard(tmp_path / "e.tar", [{"png": b"damaged", "cls": b"1"}] * 2)
    with pytest.raises(LoadError, match=r"0000\.png is no image that can be read"):
        list(open_batches(tmp_path / "e.tar", like=LIKE))


def test_calibrate_and_compare_read_them_by_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    write("parquet", tmp_path / "d")
    Path("net.py").write_text(NET)
    assert run(["calibrate", "net.py:net", "--input", "1x3x8x8", "--data", "d", "-o", "c.pt"]) == 0
    assert "24 samples of 2 parquet files, d: image; label 0 (8), 1 (8), 2 (8)" in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    Path("classifies.py").write_text(
        "from torch import nn\n"
        "def net(): return nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 3))\n"
    )
    words = ["compare", "classifies.py:net", "--input", "1x3x8x8", "--data", "d", "--epochs", "1", "--json"]
    assert run(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["status"], found["steps_per_epoch"]) == ("ok", 1)
    assert "24 samples of 2 parquet files, d: image; label 0 (8), 1 (8), 2 (8)" in found["notes"]
