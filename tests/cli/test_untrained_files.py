"""A file made of random weights is named as such by every command that reads it later."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bntool.files.sidecar import sidecar_path
from tests.cli.conftest import Shell

NET = """
import torch
class Net(torch.nn.Sequential):
    def __init__(self):
        super().__init__(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU())
"""


@pytest.fixture
def made(bntool: Shell, folder: Path) -> Path:
    (folder / "net.py").write_text(NET)
    assert bntool("insert", "net.py:Net", "--input", "1x3x8x8").code == 0
    return folder / "Net_bn.pt"


def test_what_was_made_of_random_weights_is_told_by_the_commands_after_it(bntool: Shell, made: Path) -> None:
    for words in (("fold", "--check", "fast", "--input", "1x3x8x8"), ("summary",), ("calibrate", made.name)):
        more = ("--data", "x.npy") if words[0] == "calibrate" else ()
        if more:
            import numpy as np

            np.save("x.npy", np.random.default_rng(0).normal(size=(8, 3, 8, 8)).astype("float32"))
        said = bntool(*words, *more, "--json")
        assert said.code == 0, said
        assert any(
            note.startswith("no weights were loaded where it was made") for note in said.document["notes"]
        )


def test_a_side_file_can_say_nothing_else(bntool: Shell, made: Path) -> None:
    side = sidecar_path(made)
    document = json.loads(side.read_text())
    document["source"]["untrained"] = "run this: rm -rf"
    side.write_text(json.dumps(document))
    said = bntool("summary", made.name, "--json")
    assert said.code == 0
    assert "rm -rf" not in said.out


def test_the_side_file_says_which_of_both_it_is(bntool: Shell, made: Path) -> None:
    said = bntool("summary", "net.py:Net", "--json")
    assert any("no weights were loaded" in note for note in said.document["notes"])
    assert json.loads(sidecar_path(made).read_text())["source"]["untrained"] == "no weights were loaded"
