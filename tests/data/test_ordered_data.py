"""Data that lies in an order: drawn by a seed, told of, and warned of where bntool cannot draw it."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bntool
from bntool import calibrate, open_batches
from bntool.calibrating.drift import Grouping
from bntool.cli import run
from bntool.core.errors import LoadError, UsageError
from bntool.graph.inputs import Inputs

LIKE = Inputs((torch.zeros(1, 3, 8, 8),))


def shades(count: int = 12, classes: int = 4, side: int = 8) -> tuple[Tensor, Tensor]:
    """Images (N, 3, side, side) in 0..1, class by class, told apart by their brightness."""
    drawn = torch.Generator().manual_seed(0)
    labels = torch.arange(classes).repeat_interleave(count)
    noise = 25 * torch.randn(len(labels), 3, side, side, generator=drawn)
    return ((40 + 55 * labels)[:, None, None, None] + noise).clamp(0, 255).div(255), labels


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Class folders below imgs/train and imgs/val, and a text between them."""
    image = pytest.importorskip("PIL.Image")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for part, count in (("train", 8), ("val", 2)):
        for number, (pixels, label) in enumerate(zip(*shades(count), strict=True)):
            place = tmp_path / "imgs" / part / f"class{label}"
            place.mkdir(parents=True, exist_ok=True)
            whole = (255 * pixels).to(torch.uint8).permute(1, 2, 0).numpy()
            image.fromarray(whole).save(place / f"{number:03}.png")
    (tmp_path / "imgs" / "train" / "labels.txt").write_text("no image")
    return tmp_path / "imgs"


def sizes(batches) -> list[int]:
    return [len(inputs.args[0]) for inputs in batches]


# -- drawn by the seed ---------------------------------------------------------------------------------------


def test_files_and_folders_are_drawn_by_the_seed_and_every_sample_once(tmp_path, folder):
    np.save(tmp_path / "x.npy", np.arange(40, dtype="float32").reshape(40, 1))
    whole = [t.args[0].flatten().tolist() for t in open_batches(tmp_path / "x.npy", batch_size=8)]
    assert sorted(itertools.chain(*whole)) == list(range(40))
    assert all(max(batch) - min(batch) > 8 for batch in whole)
    again = [t.args[0].flatten().tolist() for t in open_batches(tmp_path / "x.npy", batch_size=8)]
    other = [t.args[0].flatten().tolist() for t in open_batches(tmp_path / "x.npy", batch_size=8, seed=1)]
    assert whole == again != other
    some = [t.args[0].flatten().tolist() for t in open_batches(tmp_path / "x.npy", samples=5)]
    assert some == [sorted(itertools.chain(*some))]
    assert max(some[0]) > 5
    classes = [b.args[0].mean((1, 2, 3)).sort().values for b in open_batches(folder, batch_size=8, like=LIKE)]
    assert all(float(batch[-1] - batch[0]) > 0.3 for batch in classes)


def test_the_shares_of_processes_are_the_batches_of_one(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(21, dtype="float32").reshape(21, 1))
    batches = [b.args[0] for b in open_batches(tmp_path / "x.npy", batch_size=4)]
    shares = [
        [b.args[0] for b in open_batches(tmp_path / "x.npy", batch_size=4, share=(r, 2))] for r in (0, 1)
    ]
    assert [len(b) for b in batches] == [4, 4, 4, 4, 5]
    assert all(torch.equal(a, b) for a, b in zip(batches[0::2], shares[0], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(batches[1::2], shares[1], strict=True))


def test_a_plain_loader_that_reads_in_order_draws_and_says_so():
    loader = DataLoader(TensorDataset(torch.arange(12.0).reshape(12, 1)), batch_size=4)
    batches = open_batches(lambda: loader)
    values = [t.args[0].flatten().tolist() for t in batches]
    assert sorted(itertools.chain(*values)) == list(range(12))
    assert values[0] != [0.0, 1.0, 2.0, 3.0]
    assert "drawn by the seed" in batches.notes[0]
    kept = open_batches(loader, shuffle=False)
    assert next(iter(kept)).args[0].flatten().tolist() == [0.0, 1.0, 2.0, 3.0]
    assert not kept.notes


# -- which ---------------------------------------------------------------------------------------------------


def test_the_training_part_is_read_and_what_is_read_is_told(folder):
    batches = open_batches(folder, like=LIKE)
    assert sum(sizes(batches)) == 32
    (note,) = batches.notes
    assert note.startswith("32 images in 4 folders of")
    assert note.endswith("class0 (8), class1 (8), class2 (8), class3 (8)")
    assert sum(sizes(open_batches(folder, like=LIKE, split="validation"))) == 8
    assert sum(sizes(open_batches(folder, like=LIKE, split="all"))) == 40
    some = open_batches(folder, like=LIKE, include=["class[13]/*"])
    assert some.notes[0].endswith("class1 (8), class3 (8)")
    few = open_batches(folder, like=LIKE, samples=6, batch_size=4)
    assert sizes(few) == [4, 2]
    assert few.notes[0].startswith("6 of 32 images")


def test_the_training_arrays_of_an_npz_are_read(tmp_path):
    x, y = shades()
    parts = {"x_train": x[:30], "y_train": y[:30], "x_test": x[30:], "y_test": y[30:]}
    np.savez(tmp_path / "d.npz", **{name: part.numpy() for name, part in parts.items()})
    assert sum(sizes(open_batches(tmp_path / "d.npz", like=LIKE))) == 30
    assert sum(sizes(open_batches(tmp_path / "d.npz", like=LIKE, split="test"))) == 18
    with pytest.raises(UsageError, match="no array is of a part val"):
        open_batches(tmp_path / "d.npz", like=LIKE, split="val")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"split": "dev"}, "no part dev"),
        ({"include": ["cats/*"]}, "none of 32 files"),
        ({"resize": 4}, "resize is 4"),
        ({"mean": "imagnet"}, "neither a list of numbers nor one of imagenet"),
        ({"samples": 0}, "samples is 0"),
    ],
)
def test_what_is_not_there_is_told_with_what_is(folder, options, says):
    with pytest.raises(UsageError, match=says) as caught:
        open_batches(folder, like=LIKE, **options)
    assert caught.value.next_step


def test_a_class_may_be_called_train(tmp_path, folder):
    (folder / "val").rename(folder / "plane")
    assert sum(sizes(open_batches(folder, like=LIKE))) == 40


def test_folders_that_hold_something_else(folder, tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("")
    with pytest.raises(UsageError, match="no image") as caught:
        open_batches(tmp_path / "texts", like=LIKE)
    assert caught.value.where == "it holds 1 files: .txt (1)"
    (folder / "train" / "class0" / "000.png").write_bytes(b"damaged")
    with pytest.raises(LoadError, match=r"000\.png is no image that can be read"):
        list(open_batches(folder, like=LIKE))


def test_images_of_other_channels_are_told(folder):
    image = pytest.importorskip("PIL.Image")
    image.new("L", (30, 9)).save(folder / "train" / "class0" / "grey.png")
    batches = open_batches(folder, like=LIKE)
    assert "RGB (32), L (1); all are made RGB" in batches.notes[1]
    assert sum(sizes(batches)) == 33


def test_sizes_and_crops_are_those_of_torchvision(tmp_path):
    image = pytest.importorskip("PIL.Image")
    transforms = pytest.importorskip("torchvision.transforms")
    drawn = np.random.default_rng(0)
    (tmp_path / "a").mkdir()
    for shape, resize in (((37, 61), None), ((61, 37), 26), ((20, 20), 31), ((8, 9), None)):
        image.fromarray(drawn.integers(0, 256, (*shape, 3), dtype="uint8")).save(tmp_path / "a" / "i.png")
        like = Inputs((torch.zeros(1, 3, 16, 16),))
        (found,) = open_batches(tmp_path / "a", like=like, mean="imagenet", resize=resize)
        expected = transforms.Compose(
            [
                transforms.Resize(resize or 16),
                transforms.CenterCrop(16),
                transforms.ToTensor(),
                transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ]
        )(image.open(tmp_path / "a" / "i.png"))
        assert torch.equal(found.args[0][0], expected)


# -- a last batch of one -------------------------------------------------------------------------------------


def test_a_last_batch_of_one_joins_the_one_before_from_every_source(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(9, 5)
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6))
    np.save(tmp_path / "nine.npy", x.numpy())
    expected = calibrate(model, [x[:4], x[4:]]).model.state_dict()
    buffer = torch.empty(4, 5)

    def one_buffer():
        """A loader that fills the same memory again and again."""
        for part in x.split(4):
            yield buffer[: len(part)].copy_(part)

    kinds = {
        "file": open_batches(tmp_path / "nine.npy", batch_size=4, shuffle=False),
        "loader": DataLoader(x, batch_size=4),
        "opened": open_batches(lambda: DataLoader(x, batch_size=4), shuffle=False),
        "list": list(x.split(4)),
        "pairs": [(part, torch.zeros(len(part))) for part in x.split(4)],
        "mappings": [{"input": part} for part in x.split(4)],
        "generator": one_buffer(),
    }
    for name, batches in kinds.items():
        found = calibrate(model, batches)
        assert found.batches == 2, name
        for key, tensor in found.model.state_dict().items():
            assert torch.equal(tensor, expected[key]), (name, key)


def test_what_does_not_fit_together_stays_apart():
    batches = open_batches([torch.zeros(2, 3, 8, 8), torch.zeros(1, 3, 9, 9)])
    assert sizes(batches) == [2, 1]
    assert sizes(open_batches([torch.zeros(1, 3)] * 3)) == [1, 1, 1]
    assert sizes(open_batches([torch.zeros(4, 3), torch.zeros(1, 3), torch.zeros(4, 3)])) == [4, 1, 4]
    assert sizes(open_batches([torch.zeros(4, 3)] * 3, samples=6)) == [4, 2]
    assert sizes(open_batches([torch.zeros(4, 3)] * 3, samples=5)) == [5]


# -- warned of -----------------------------------------------------------------------------------------------


def test_an_ordered_and_unbalanced_stream_is_warned_of():
    x, labels = shades(20)
    keep = torch.cat([torch.arange(80)[labels == c][: 20 - 5 * c] for c in range(4)])  # 20, 15, 10, 5
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
    ordered = calibrate(model, x[keep].split(10))
    (warning,) = ordered.warnings
    assert "batches differ more than chance allows" in warning
    assert "at 1 " in warning
    assert warning.split(":")[0] in str(ordered)
    mixed = keep[torch.randperm(len(keep), generator=torch.Generator().manual_seed(0))]
    assert not calibrate(model, x[mixed].split(10)).warnings


def unbalanced() -> tuple[Tensor, Tensor]:
    """120, 60, 30 and 10 images of four classes, in that order."""
    x, labels = shades(120)
    keep = torch.cat([torch.arange(len(x))[labels == c][:n] for c, n in enumerate((120, 60, 30, 10))])
    return x[keep], labels[keep]


def small(norm: bool = False) -> nn.Module:
    torch.manual_seed(0)
    norms = [nn.BatchNorm2d(4)] if norm else []
    ends = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)
    return nn.Sequential(nn.Conv2d(3, 4, 3), *norms, nn.ReLU(), *ends)


class Heedless(torch.utils.data.Dataset):
    """Gives its samples in their order, whatever number is asked for."""

    def __init__(self, x: Tensor, labels: Tensor) -> None:
        self.x, self.labels, self.at = x, labels, -1

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, _: int) -> tuple[Tensor, int]:
        self.at = (self.at + 1) % len(self.x)
        return self.x[self.at], int(self.labels[self.at])


DIFFER = "batches differ more than chance allows"


def test_every_function_warns_of_an_ordered_stream():
    x, labels = unbalanced()
    mixed = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    assert DIFFER in str(calibrate(small(norm=True), x.split(20)))
    inserted = bntool.insert(small(), x[:2], init="calibrate", data=x.split(20))
    assert f"warning: the 11 {DIFFER}" in " ".join(str(inserted).split())
    assert any(DIFFER in note for note in inserted.to_dict()["notes"])
    assert DIFFER not in str(bntool.insert(small(), x[:2], init="calibrate", data=x[mixed].split(20)))
    heedless = Heedless(x, labels)
    found = bntool.compare(small(), (heedless, heedless), epochs=1, batch_size=20)
    (warning,) = found.warnings
    assert DIFFER in warning
    assert found.to_dict()["warnings"] == [warning]
    # by number the samples are drawn, whatever their order
    for data in (TensorDataset(x, labels), DataLoader(TensorDataset(x, labels), batch_size=20)):
        assert not bntool.compare(small(), (data, data), epochs=1, batch_size=20).warnings


def test_parts_that_an_ordered_file_was_cut_into_are_warned_of():
    x, labels = unbalanced()

    def cut(at: int, order: Tensor) -> tuple[TensorDataset, TensorDataset]:
        one, other = order[:at], order[at:]
        return TensorDataset(x[one], labels[one]), TensorDataset(x[other], labels[other])

    lying = torch.arange(len(x))
    (warning,) = bntool.compare(small(), cut(212, lying), epochs=1).warnings
    assert "(class 3: 1% of the training, 100% of the test)" in warning
    mixed = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    assert not bntool.compare(small(), cut(180, mixed), epochs=1).warnings
    with pytest.raises(UsageError, match="up to 3, and the training labels only up to 2") as caught:
        bntool.compare(small(), cut(200, lying), epochs=1)
    assert "shuffle" in caught.value.next_step


@pytest.mark.parametrize("words", [["calibrate"], ["insert", "--init", "calibrate"], ["compare"]])
def test_every_command_warns_of_an_ordered_stream(tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    torch.save(small(norm="calibrate" in words[0]), "m.pt")
    torch.save(unbalanced(), "stream.pt")
    Path("own.py").write_text(
        "import torch\nx, y = torch.load('stream.pt')\n"
        "def loader(): return (x.split(20))\n"
        "def parts(): return [(x[:212], y[:212]), (x[212:], y[212:])]\n"
    )
    data = "own.py:parts" if words == ["compare"] else "own.py:loader"
    more = ["--epochs", "1"] if words == ["compare"] else ["--input", "1x3x8x8", "--quiet"]
    assert run([*words, "m.pt", "--data", data, *more]) == 0
    said = capsys.readouterr().out
    assert "warning: the " in said
    assert "note: warning" not in said


def test_what_other_data_is_asked_is_refused_of_a_pair():
    x, labels = unbalanced()
    pair = TensorDataset(x, labels), TensorDataset(x, labels)
    for asked in ({"columns": ["a"]}, {"split": "train,val"}, {"include": ["*"]}, {"mean": "imagenet"}):
        with pytest.raises(UsageError, match=f"{next(iter(asked))}.* (is|are) for"):
            bntool.compare(small(), pair, epochs=1, **asked)
    few = bntool.compare(small(), pair, epochs=1, samples=60, batch_size=30)
    assert "60 samples to train on" in few.notes[0]


def test_batches_drawn_at_random_are_not_warned_of():
    """Normal, heavy-tailed, alike in every channel, and mostly zero: at most chance's share of alarms."""
    drawn = np.random.default_rng(0)
    alarms = trials = 0
    for trial in range(120):
        channels, count, size = (int(drawn.choice(c)) for c in ((1, 7, 30), (6, 20, 64), (2, 3, 8)))
        normal = drawn.standard_normal((count, channels))
        kinds = (normal, np.exp(1.5 * normal), normal[:, :1] + 0.1 * normal, 1.0 * (normal > 1.6))
        grouping = Grouping()
        for part in torch.from_numpy(kinds[trial % 4]).split(size):
            grouping.add(part)
        found = grouping.ratio()
        if found is not None:
            trials += 1
            alarms += found[0] > found[1]
    # One in a thousand is expected; two of 120 happen by chance in less than one of a hundred such tests.
    assert trials > 80
    assert alarms <= 1


def test_calibrating_from_a_folder_in_class_order_keeps_the_accuracy(folder, capsys):
    x, labels = shades(96, 4)
    torch.manual_seed(0)
    layers = [m for i in (3, 8, 8) for m in (nn.Conv2d(i, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(4):
        for i in torch.randperm(len(x)).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[i]), labels[i]).backward()
            optimizer.step()
    torch.save(model, "m.pt")

    def accuracy(name: str) -> float:
        trained = torch.load(name, weights_only=False).eval()
        return float((trained(x).argmax(1) == labels).float().mean())

    words = ["calibrate", "m.pt", "--input", "1x3x8x8", "--data", "imgs", "--batch-size", "8", "--force"]
    assert run(words) == 0
    said = capsys.readouterr().out
    assert "note: 32 images in 4 folders of imgs/train: class0 (8)" in said
    assert "warning" not in said
    assert accuracy("m_calibrated.pt") >= accuracy("m.pt") - 0.005
    assert run([*words, "--no-shuffle"]) == 0
    assert "warning: the 4 batches differ more than chance allows" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["calibrate", "insert"])
def test_an_empty_loader_is_told_as_such(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    norm = [nn.BatchNorm2d(4)] if command == "calibrate" else []
    torch.save(nn.Sequential(nn.Conv2d(3, 4, 3), *norm, nn.ReLU()), "m.pt")
    Path("own.py").write_text(
        "import torch\ndef loader(): return torch.utils.data.DataLoader([], batch_size=2)\n"
    )
    more = ["--init", "calibrate"] if command == "insert" else []
    code = run([command, "m.pt", "--input", "1x3x8x8", "--data", "own.py:loader", *more])
    said = capsys.readouterr().err
    assert code in (2, 3), said
    assert "num_samples" not in said
    assert "no " in said.split("error: ")[1].split("\n")[0], said
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["m.pt", "own.py"]


@pytest.mark.parametrize("words", [["--split", "dev"], ["--include", "cats/*"], ["--limit", "0"]])
def test_bad_choices_write_nothing(folder, capsys, words):
    torch.save(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), "m.pt")
    assert run(["calibrate", "m.pt", "--input", "1x3x8x8", "--data", "imgs", *words]) == 2
    assert sorted(p.name for p in folder.parent.iterdir()) == ["imgs", "m.pt"]
    assert "next:" in capsys.readouterr().err
