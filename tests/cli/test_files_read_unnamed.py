"""Files that a command reads though nobody typed their names: none of them may be an output either."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.torch import save_file

from tests.cli import nets
from tests.cli.conftest import Said, Shell, contents

MAKE = """
from torch import nn


def make():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.BatchNorm2d(2)
    )
"""


def test_a_shard_that_an_index_of_weights_names(refused: Callable[..., Said], bntool: Shell) -> None:
    Path("net.py").write_text(MAKE)
    Path("weights").mkdir()
    places = {}
    for part in ("0", "1", "3", "4"):
        held = {n: t for n, t in nets.normalised().state_dict().items() if n.startswith(part)}
        save_file(held, f"weights/{part}.safetensors", {"format": "pt"})
        places |= dict.fromkeys(held, f"{part}.safetensors")
    index = Path("weights/model.safetensors.index.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    line = ("fold", "net.py:make", "--weights", str(index), *nets.INPUT, "--force")
    os.link("weights/3.safetensors", "other.pt")
    Path("link.pt").symlink_to("weights/1.safetensors")
    for output in ("other.pt", "link.pt"):
        refused(*line, "-o", output, code=2, says="is the input itself")
    refused(*line, "-o", "o.pt", "--report", "weights/4.safetensors", code=2, says="is the input itself")
    assert bntool(*line, "-o", "o.pt").code == 0


def test_the_file_that_a_link_in_a_data_folder_leads_to(refused: Callable[..., Said], bntool: Shell) -> None:
    nets.save(nets.normalised(), "norm.pt")
    Path("elsewhere").mkdir()
    Path("photos/a/deeper").mkdir(parents=True)
    for name in ("linked.png", "hard.png", "unrelated.png", "far.png"):
        Image.fromarray(np.full((12, 12, 3), len(name), np.uint8)).save(f"elsewhere/{name}")
    Path("photos/a/1.png").symlink_to(Path("elsewhere/linked.png").resolve())
    os.link("elsewhere/hard.png", "photos/a/deeper/2.png")
    Path("middle.png").symlink_to("elsewhere/far.png")
    Path("photos/a/3.png").symlink_to(Path("middle.png").absolute())
    line = ("calibrate", "norm.pt", "--data", "photos", *nets.INPUT, "--force")
    for name in ("linked.png", "hard.png", "far.png"):
        refused(*line, "-o", f"elsewhere/{name}", code=2, says="photos, which is read")
    assert bntool(*line, "-o", "elsewhere/unrelated.png").code == 0


def test_the_side_file_of_a_model_that_the_folder_remembers(
    refused: Callable[..., Said], bntool: Shell, folder: Path
) -> None:
    """`bntool fold` alone takes what `insert` wrote, and with it the plan in its side file."""
    nets.save(nets.plain(), "plain.pt")
    assert bntool("insert", "plain.pt", *nets.INPUT, "-q").code == 0
    side = "plain_bn.pt.bntool.json"
    Path("link.pt").symlink_to(side)
    Path("o.pt.bntool.json").symlink_to(side)
    for words in (("-o", side), ("-o", "link.pt"), ("-o", "new.pt", "--report", side)):
        refused("fold", *words, "--force", code=2, says="is the input itself")
    refused("fold", "-o", "o.pt", "--force", code=2, says="is a link")
    before = contents(folder)
    assert bntool("fold", "-o", "new.pt", "--force").code == 0
    assert before.items() <= contents(folder).items()
