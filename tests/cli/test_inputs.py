"""`--input` by name, by type, as entries of a dict; and what is said of one that does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Shell

NETS = """
from torch import nn

class Entries(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.meta = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(2, 4)
    def forward(self, batch):
        return self.features(batch) + self.meta(batch["meta"])
    def features(self, batch):
        return self.bn(self.conv(batch["image"])).mean((2, 3))

class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.bn, self.table = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Embedding(7, 8)
    def forward(self, x, ids):
        return self.bn(self.linear(x)) + self.table(ids).mean(1)

class ByName(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    def forward(self, *, image, scale=None):
        return self.bn(self.conv(image))

class Pair(ByName):
    def forward(self, *, a, b):
        return super().forward(image=a + b)

class Looks(ByName):
    def forward(self, batch):
        return super().forward(image=batch["image"] + batch["other"])

class Optional(ByName):
    def forward(self, *, image=None, mask=None):
        return super().forward(image=image)

class Signal(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4)
    def forward(self, x):
        return self.bn(self.conv(x))

class Broken(ByName):
    def forward(self, x):
        return self.bn(self.conv(x)).pooled()
"""


@pytest.fixture(autouse=True)
def nets(folder: Path) -> None:
    (folder / "net.py").write_text(NETS)


@pytest.mark.parametrize(
    ("net", "inputs"),
    [
        ("Entries", ("image:1x3x9x9", "meta:1x2")),
        ("Tokens", ("x:2x4", "ids:2x5:int64")),
        ("Tokens", ("2x4", "2x5:int64")),
        ("ByName", ("image:1x3x9x9",)),
        ("ByName", ("1x3x9x9",)),
        ("ByName", ()),
        ("Pair", ("1x3x9x9", "1x3x9x9")),
        ("Optional", ()),
    ],
)
def test_an_input_finds_its_place(bntool: Shell, net: str, inputs: tuple[str, ...]) -> None:
    words = [word for text in inputs for word in ("--input", text)]
    assert bntool("fold", f"net.py:{net}", *words, "--check", "fast", "--json").document["bn_folded"] == 1
    assert bntool("verify", f"net.py:{net}").code == 0  # the inputs are remembered


@pytest.mark.parametrize(
    ("net", "inputs", "advice"),
    [
        ("Tokens", ("2x4", "2x5"), "an input holds integers: --input NAME:1x16:int64"),
        ("Tokens", ("2x4",), "--input ids:1x4"),
        ("ByName", ("1x3x9x9", "1"), "its forward takes image, scale: name each, --input image:1x3x224x224"),
        ("Pair", ("1x3x9x9",), "--input a:1x3x224x224 --input b:1x3x224x224"),
        ("Pair", ("a:1x3x9x9",), "--input a:1x3x224x224 --input b:1x3x224x224"),
        ("Entries", (), "--input meta:1x3x224x224 --input image:1x3x224x224 are entries of it"),
        ("Looks", (), "--input image:1x3x224x224 --input other:1x3x224x224 are entries of it"),
        ("Looks", ("image:1x3x9x9",), "--input image:1x3x224x224 --input other:1x3x224x224"),
        ("Signal", ("1x3x224x224",), "give the right shape with --input 1x2x1024"),
        ("Signal", ("1x2x2",), "give it the size that it was trained on, --input 1x2xLENGTH"),
        ("Broken", ("1x3x9x9",), "this AttributeError is raised by its own code"),
    ],
)
def test_advice_fits_the_error(refused: Shell, net: str, inputs: tuple[str, ...], advice: str) -> None:
    words = [word for text in inputs for word in ("--input", text)]
    refused("fold", f"net.py:{net}", *words, code=3, says=advice)


@pytest.mark.parametrize(
    ("text", "says"), [("imgae:1x3x9x9", "its inputs are batch"), ("meta:1x2:int63", "is no type of tensor")]
)
def test_a_name_or_a_type_that_there_is_not(refused: Shell, text: str, says: str) -> None:
    refused("fold", "net.py:Entries", "--input", text, code=2, says=says)
    assert sorted(p.name for p in Path().iterdir() if p.is_file()) == ["net.py"]
