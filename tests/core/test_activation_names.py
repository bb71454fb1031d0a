"""Activations by the names that people have for them."""

from __future__ import annotations

import pytest
from torch import nn

import bntool
from bntool.cli import run
from bntool.core.activations import ACTIVATIONS, kind_of, kinds_of
from bntool.core.errors import UsageError
from bntool.core.options import InsertOptions
from tests.next_steps import commands_in, faults

CLASSES = """ELU Hardshrink Hardsigmoid Hardtanh Hardswish LeakyReLU LogSigmoid PReLU ReLU ReLU6 RReLU SELU
    CELU GELU Sigmoid SiLU Mish Softplus Softshrink Tanh Threshold GLU""".split()


@pytest.mark.parametrize("name", CLASSES)
def test_the_classes_of_torch_are_known_by_their_names(name: str) -> None:
    assert hasattr(nn, name)
    kind = kind_of(name)
    assert kind in ACTIVATIONS
    assert kind.replace("_", "") == name.lower()
    assert {kind_of(f"nn.{name}"), kind_of(f"torch.nn.{name}"), kind_of(f"F.{kind}_")} == {kind}


def test_other_names_and_several_at_once() -> None:
    assert kinds_of(("swish, h-swish", "hard_swish", "lrelu", "any")) == (
        "silu",
        "hardswish",
        "leaky_relu",
        "any",
    )
    assert InsertOptions.of({"activations": ["ReLU,GELU"]}).activations == ("relu", "gelu")


def test_one_that_is_not_known_lists_all() -> None:
    with pytest.raises(UsageError, match="unknown activation 'foo'") as caught:
        bntool.insert(nn.ReLU(), activations=("relu", "foo"))
    assert all(kind in caught.value.next_step for kind in (*ACTIVATIONS, "any"))


def test_commas_and_repeats_on_the_command_line(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "n.py").write_text(
        "from torch import nn\ndef net():\n    return nn.Sequential(\n"
        "        *(m for a in (nn.SiLU, nn.GELU, nn.ReLU6) for m in (nn.Conv2d(3, 3, 3), a())))\n"
    )
    words = ["insert", "n.py:net", "--input", "1x3x12x12", "--dry-run", "-q"]
    assert run([*words, "--activation", "swish,ReLU6"]) == 0
    several = capsys.readouterr().out
    assert run([*words, "--activation", "silu", "--activation", "relu6"]) == 0
    assert capsys.readouterr().out == several
    assert "2 BatchNorm" in several


def test_next_steps_that_cannot_be_typed_are_seen() -> None:
    """The check that every printed next step passes, held against some that are wrong."""
    assert commands_in("bntool insert net.py:Net --source, or see") == [["insert", "net.py:Net", "--source"]]
    assert not faults("bntool insert MODEL --dry-run says why; --activation any takes others", "compare")
    assert faults("name it --foo x", "fold")
    assert faults("bntool fold model.pt --exprt onnx", "fold")
    assert faults("bntool fold model.pt --batch-sizes 1,x", "fold")
    assert not faults("run `bntool doctor`, or use --device cpu", "fold")
