"""What cannot be loaded or written: one clear error, the right exit code, nothing left behind."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.cli import nets
from tests.cli.conftest import Shell

COMMANDS = (["insert"], ["fold", "--export", "onnx"], ["summary"], ["export"])

BROKEN_CODE = """
import sys
from torch import nn


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3))


class Raises(Net):
    def forward(self, x):
        raise ValueError("not today")


class Exits(Net):
    def forward(self, x):
        sys.exit(9)


class Ends(Net):
    def __init__(self):
        raise EOFError("no more")
"""


class Opens:
    """Unpickling it would write a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open, ("marker", "w")


class Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch marker",)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c[0])
def test_a_file_that_is_no_model(refused: Shell, command: list[str]) -> None:
    nets.save(nets.plain(), "good.pt")
    Path("empty.pt").write_bytes(b"")
    Path("text.pt").write_text("hello\n")
    Path("cut.pt").write_bytes(Path("good.pt").read_bytes()[:-100])
    Path("folder.pt").mkdir()
    name, *options = command
    refused(name, "nope.pt", *options, code=3, says="no such file: nope.pt")
    refused(name, "goood.pt", *options, code=3, says="did you mean good.pt")
    refused(name, "empty.pt", *options, code=3, says="an empty file")
    refused(name, "text.pt", *options, code=3, says="a text file")
    refused(name, "cut.pt", *options, code=3, says="cut short or damaged")
    refused(name, "folder.pt", *options, code=3, says="is a folder")
    assert refused(name, "nope.pt", *options, "--json", code=3).document["status"] == "cannot-load"


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c[0])
@pytest.mark.parametrize("payload", [Opens(), {"model": Runs()}], ids=["open", "system"])
def test_a_malicious_pickle_is_not_run(refused: Shell, command: list[str], payload: object) -> None:
    name, *options = command
    nets.save(payload, "evil.pt")
    Path("bare.pt").write_bytes(pickle.dumps(payload))
    for file in ("evil.pt", "bare.pt"):
        refused(name, file, *options, code=3)
        assert not Path("marker").exists()


def test_no_flag_but_trust_lets_a_function_through(refused: Shell) -> None:
    nets.save(Runs(), "evil.pt")
    refused("insert", "evil.pt", "--allow", "posix.system", code=2, says="refused")
    refused("insert", "evil.pt", "--allow", "os.system", code=2, says="refused")
    assert not Path("marker").exists()


def test_a_grant_ends_with_the_file_it_was_given_for(bntool: Shell, refused: Shell) -> None:
    nets.save(nets.plain(), "model.pt")
    assert bntool("insert", "model.pt", "--trust-pickle").code == 0
    nets.save(Runs(), "model_bn.pt")
    refused("summary", code=3)
    assert not Path("marker").exists()


def test_weights_without_their_architecture(refused: Shell, bntool: Shell) -> None:
    model = nets.user_model()
    nets.save(model.state_dict(), "w.pt")
    nets.save({"epoch": 1, "weights": 3}, "none.pt")
    refused("insert", "w.pt", code=3, says="--arch")
    refused("insert", "w.pt", "--arch", "user_net.py:Nett", code=3, says="Nett")
    refused("insert", "w.pt", "--arch", "nope.py:Net", code=3, says="no such file")
    refused("insert", "w.pt", "--arch", "banana", code=2, says="not a reference")
    refused("insert", "w.pt", "--key", "ema", "--arch", "user_net.py:Net", code=2, says="--key ema")
    refused("insert", "none.pt", code=3, says="no model or weights found")
    Path("other.py").write_text("from torch import nn\ndef make(): return nn.Linear(2, 2)\n")
    refused("insert", "w.pt", "--arch", "other.py:make", code=3, says="do not fit other.py:make")


def test_references_that_lead_nowhere(refused: Shell) -> None:
    pytest.importorskip("torchvision")
    refused("insert", "torchvision:resnetfifty", code=3, says="did you mean resnet50")
    refused("insert", "no_such_package:make", code=3)
    refused("insert", "torchvision:alexnet", "--arch", "torchvision:vgg11", code=2, says="--arch")


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c[0])
def test_an_input_that_does_not_fit(refused: Shell, command: list[str]) -> None:
    nets.save(nets.normalised() if command[0] == "fold" else nets.plain(), "model.pt")
    name, *options = command
    code = 2 if name == "summary" else 3  # which shows what it could see, and says that the size is wrong
    refused(name, "model.pt", *options, "--input", "1x5x12x12", code=code, says="1x5x12x12")
    refused(name, "model.pt", *options, "--input", "1x3", code=code, says="--input")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("banana", "not a shape"),
        ("1x3x", "not a shape"),
        ("-1x3x4x4", "not a shape"),
        ("1x0x3", "size 0"),
        ("pixels:1x3x12x12", "no input named pixels"),
        ("9999999x9999999x9999999", "too large"),
    ],
)
def test_an_input_that_makes_no_sense(refused: Shell, text: str, says: str) -> None:
    nets.save(nets.plain(), "model.pt")
    refused("insert", "model.pt", f"--input={text}", code=2, says=says)


def test_a_named_input(bntool: Shell, refused: Shell) -> None:
    nets.save(nets.plain(), "model.pt")
    assert bntool("insert", "model.pt", "--input", "input:1x3x12x12", "--dry-run").code == 0
    refused("insert", "model.pt", *("--input", "input:1x3x12x12") * 2, code=2, says="given twice")
    nets.user_model()
    nets.forget("user_net")
    assert bntool("insert", "user_net.py:Net", "--input", "images:1x3x12x12", "--dry-run").code == 0
    refused("insert", "user_net.py:Net", "--input", "image:1x3x12x12", code=2, says="its inputs are images")


def test_an_input_that_cannot_be_inferred(refused: Shell) -> None:
    nets.save(nn.Sequential(nn.ReLU()), "model.pt")
    refused("insert", "model.pt", code=3, says="--input")


@pytest.mark.parametrize("command", [["insert"], ["fold"], ["export"]], ids=lambda c: c[0])
def test_outputs_that_cannot_be_written(refused: Shell, command: list[str]) -> None:
    nets.save(nets.normalised(), "model.pt")
    Path("taken").mkdir()
    (name,) = command
    refused(name, "model.pt", "-o", "nowhere/out.pt", code=2, says="does not exist")
    refused(name, "model.pt", "-o", "model.pt/out.pt", code=2, says="does not exist")
    refused(name, "model.pt", "-o", "taken", code=2, says="is a folder")
    refused(name, "model.pt", "-o", "model.pt", code=2, says="is the input itself")
    refused(name, "model.pt", "-o", "model.pt", "--force", code=2, says="is the input itself")
    refused(name, "model.pt", "-o", f"{'a' * 300}.pt", code=2, says="too long")
    refused(name, "model.pt", "-o", "", code=2, says="empty")


def test_an_output_named_as_another_kind_of_file(refused: Shell) -> None:
    nets.save(nets.plain(), "model.pt")
    nets.save(nets.normalised(), "bn.pt")
    refused("insert", "model.pt", "-o", "out.onnx", code=2, says="same kind as the input")
    refused("insert", "model.pt", "-o", "out.safetensors", code=2, says="same kind as the input")
    refused("fold", "bn.pt", "-o", "out.onnx", "--export", "onnx", code=2, says="out.pt")


@pytest.mark.parametrize("taken", ["model_folded.pt", "model_folded.pt.bntool.json", "model_folded.onnx"])
def test_any_output_that_exists_is_kept(refused: Shell, taken: str) -> None:
    nets.save(nets.normalised(), "model.pt")
    Path(taken).write_text("mine")
    refused("fold", "model.pt", *nets.INPUT, "--export", "onnx", code=2, says="--force")


def test_a_full_disk_leaves_nothing(refused: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(held: object, file: Any, **options: object) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    nets.save(nets.plain(), "model.pt")
    monkeypatch.setattr(torch, "save", full)
    refused("insert", "model.pt", code=2, says="No space left on device")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--eps", "-1"], "eps"),
        (["--eps", "nan"], "eps"),
        (["--activation", "rleu"], "did you mean relu"),
        (["--seed", "-3"], "--seed"),
        (["--seed", str(2**63)], "from 0 to 9223372036854775807"),
        (["--plan", "nope.json"], "nope.json"),
        (["--check", "maybe"], "--check"),
        (["--position", "beside"], "--position"),
    ],
)
def test_options_out_of_range(refused: Shell, options: list[str], says: str) -> None:
    nets.save(nets.plain(), "model.pt")
    refused("insert", "model.pt", *options, code=2, says=says)


@pytest.mark.parametrize(
    "options",
    [["--atol", "nan"], ["--atol", "-1"], ["--rtol", "inf"], ["--device", "mps"], ["--export", "tf"]],
)
def test_fold_options_out_of_range(refused: Shell, options: list[str]) -> None:
    nets.save(nets.normalised(), "model.pt")
    refused("fold", "model.pt", *options, code=2, says=options[0])


def test_no_model_in_an_empty_folder(refused: Shell) -> None:
    for command in ("insert", "summary", "fold", "export"):
        refused(command, code=2, says="no MODEL given")
        refused(command, "--json", code=2, says="no MODEL given")


def test_an_empty_model_is_not_the_last_one(bntool: Shell, refused: Shell) -> None:
    """`bntool fold "$MODEL"` with the variable unset must not fold something else."""
    nets.save(nets.plain(), "model.pt")
    assert bntool("insert", "model.pt").code == 0
    refused("fold", "", code=2, says="empty")


def test_code_of_the_user_that_raises_or_exits(refused: Shell) -> None:
    Path("broken.py").write_text(BROKEN_CODE)
    refused("insert", "broken.py:Raises", code=3, says="not today")
    refused("insert", "broken.py:Exits", code=3, says="sys.exit(9)")
    refused("insert", "broken.py:Ends", code=3, says="no more")
