"""Files of weights on the command line: the side file names the architecture, sharded ones go in and out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bntool.files.safetensors_files import read_index
from bntool.files.sidecar import Origin, make_document, write_sidecar
from tests.cli import nets
from tests.cli.conftest import Shell
from tests.files import torch_files as tf

ARCH = """
from torch import nn


def make():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.BatchNorm2d(2)
    ).eval()
"""


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel()


def _side_file(arch: str) -> None:
    document = make_document("fold", Origin("x.pt", arch=arch), "net.pt")
    write_sidecar("net.pt", document, force=True)


def test_the_side_file_names_the_architecture(bntool: Shell) -> None:
    models = pytest.importorskip("torchvision").models
    model = models.squeezenet1_1(weights=None)
    torch.save(model.state_dict(), "net.pt")
    alone = bntool("summary", "net.pt", "--json").document
    assert (alone["kind"], alone["totals"]["parameters"]) == ("weights", sum(map(_size, model.parameters())))
    refused = bntool("summary", "net.pt", "--input", "1x3x64x64")
    assert refused.code == 2
    assert "--input is not for a file of weights without its model: it does not run" in refused.err
    _side_file("torchvision:squeezenet1_1")
    said = bntool("summary", "net.pt", "--input", "1x3x64x64", "--json")
    assert said.code == 0
    assert said.document["totals"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert "--arch torchvision:squeezenet1_1, as its side file says" in said.document["notes"]


def test_folded_weights_are_verified_against_those_they_came_from(bntool: Shell) -> None:
    models = pytest.importorskip("torchvision").models
    torch.save(models.squeezenet1_1(weights=None).state_dict(), "plain.pt")
    words = ("--arch", "torchvision:squeezenet1_1", "--input", "1x3x64x64", "-o", "net.pt")
    assert bntool("insert", "plain.pt", *words, "-q").code == 0
    said = bntool("verify", "plain.pt", "net.pt", "--input", "1x3x64x64", "--json")
    assert said.code == 0
    assert "--arch torchvision:squeezenet1_1, as the side file of net.pt says" in said.document["notes"]
    again = bntool("verify", "net.pt", "plain.pt", "--input", "1x3x64x64")
    assert again.code == 0


def test_code_that_a_side_file_names_is_not_run(bntool: Shell) -> None:
    Path("evil.py").write_text("open('marker', 'w')\n" + ARCH)
    torch.save(nets.normalised().state_dict(), "net.pt")
    _side_file("evil.py:make")
    assert bntool("fold", "net.pt").code == 3
    assert bntool("summary", "net.pt").code == 0
    assert not Path("marker").exists()


def test_a_sharded_model_is_folded_and_written_sharded(bntool: Shell) -> None:
    Path("net.py").write_text(ARCH)
    places = {}
    for part in "0134":
        name = f"model-{part}.safetensors"
        chosen = {n: t for n, t in nets.normalised().state_dict().items() if n.startswith(part)}
        save_file(chosen, name, {"format": "pt"})
        places |= dict.fromkeys(chosen, name)
    Path("model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"by": "me"}, "weight_map": places})
    )
    before = {p.name: p.read_bytes() for p in Path().iterdir()}
    said = bntool("fold", "model.safetensors.index.json", "--arch", "net.py:make", *nets.INPUT, "--json")
    assert said.code == 0, said
    assert said.document["output"] == "model_folded.safetensors.index.json"
    index = read_index(Path("model_folded.safetensors.index.json"))
    assert index.metadata["by"] == "me"
    folded = {name: header.read(name) for name, header in index.headers()}
    assert folded.keys() == {"0.weight", "0.bias", "3.weight", "3.bias"}
    x = torch.randn(1, 3, 12, 12)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    net.load_state_dict({n.replace("3.", "2."): t for n, t in folded.items()})
    # Folded weights are rounded once to float32; three dozen products to an output.
    torch.testing.assert_close(net(x), nets.normalised()(x), rtol=1e-5, atol=1e-5)
    assert {n: Path(n).read_bytes() for n in before} == before
    assert (
        bntool("summary", "model_folded.safetensors.index.json", "--arch", "net.py:make", *nets.INPUT).code
        == 0
    )


def test_summary_of_a_model_whose_class_is_not_here(bntool: Shell) -> None:
    conv = tf.mapping((tf.text("weight"), tf.tensor(tf.storage())))
    inner = tf.module("gone.Block", ("_buffers", conv))
    net = tf.module("gone.Net", ("_modules", tf.mapping((tf.text("block"), inner))))
    tf.write_zip(Path("net.pt"), tf.pickled(net))
    said = bntool("summary", "net.pt", "--json")
    assert said.code == 0, said
    assert said.document["totals"]["buffers"] == 4
    assert any("gone.Block, gone.Net" in note for note in said.document["notes"] if isinstance(note, str))
    for command in ("fold", "insert", "export"):
        refused = bntool(command, "net.pt")
        assert refused.code == 3
        assert "needs 2 classes bntool does not know: gone.Block, gone.Net" in refused.err


def test_max_size_is_an_option_of_every_command_that_loads(bntool: Shell) -> None:
    nets.save(nets.plain(), "net.pt")
    for command in ("summary", "fold", "insert", "export", "inspect"):
        said = bntool(command, "net.pt", "--max-size", "64K")
        assert said.code == 3
        assert "--max-size allows 64.0 KiB" in said.err
    assert bntool("summary", "net.pt", "--max-size", "a lot").code == 2


def test_folded_weights_are_read_back_by_the_architecture_they_came_from(bntool: Shell) -> None:
    """Its fresh BatchNorms shift nothing, and yet the bias that the fold made has its place."""
    Path("net.py").write_text(ARCH)
    torch.save(nets.normalised().state_dict(), "net.pt")
    assert bntool("fold", "net.pt", "--arch", "net.py:make", *nets.INPUT).code == 0
    said = bntool("summary", "net_folded.pt", "--arch", "net.py:make", *nets.INPUT, "--json")
    assert said.code == 0, said
    assert said.document["totals"]["parameters"] == 3 * 4 * 9 + 4 + 4 * 2 * 9 + 2
