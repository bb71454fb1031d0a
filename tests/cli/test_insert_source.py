from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.cli import nets
from tests.cli.conftest import Shell, contents

REFERENCE = "user_net.py:Net"
ADDED = ["self.first_bn = nn.BatchNorm2d(4)", "self.second_bn = nn.BatchNorm2d(5)"]


@pytest.fixture
def script() -> Path:
    Path("user_net.py").write_text(nets.USER_CODE)
    return Path("user_net.py")


@pytest.fixture
def proved_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof in this process: quicker, and the same function."""
    from bntool.source import proof, rewriting

    monkeypatch.setattr(rewriting, "prove_apart", proof.prove)


def added(diff: str) -> list[str]:
    lines = [line[1:].strip() for line in diff.splitlines() if line.startswith("+")]
    return [line for line in lines if "nn.BatchNorm2d" in line]


# Here the proof has a process of its own, as users have it: the package may be imported only once there.
def test_the_new_source_is_shown_proved_and_written(bntool: Shell, folder: Path) -> None:
    Path("zoo").mkdir()
    Path("zoo/__init__.py").write_text("from .user_net import Net\n")
    Path("zoo/registry.py").write_text(
        "seen = []\n\n\ndef once(cls):\n    assert cls.__name__ not in seen, 'twice'\n"
        "    seen.append(cls.__name__)\n    return cls\n"
    )
    code = nets.USER_CODE.replace("class Net", "@once\nclass Net")
    Path("zoo/user_net.py").write_text(f"from .registry import once\n{code}")
    said = bntool("insert", "zoo/user_net.py:Net", *nets.INPUT, "--source", "-o", "new.py")
    assert (said.code, said.err) == (0, "")
    lines = said.out.splitlines()
    assert [line for line in lines if not line.startswith("note:")][:2] == [
        "--- zoo/user_net.py",
        "+++ new.py",
    ]
    assert added(said.out) == ADDED
    assert "proved      imported, old weights loaded, output the same to the last bit (3 inputs)" in lines
    assert lines[-1] == "wrote       new.py"
    assert Path("zoo/user_net.py").read_text().endswith(code)
    assert "x = F.relu(self.first_bn(self.first(images)))" in Path("new.py").read_text()
    assert {name.partition("/")[0] for name in contents(folder)} == {"new.py", "zoo"}


def test_without_an_output_nothing_is_written(bntool: Shell, script: Path, proved_here: None) -> None:
    before = contents(Path.cwd())
    said = bntool("insert", REFERENCE, *nets.INPUT, "--source")
    assert said.code == 0
    assert added(said.out) == ADDED
    assert "note: nothing is written; -o FILE or --in-place writes the source" in said.out
    said = bntool("insert", REFERENCE, *nets.INPUT, "--source", "--in-place", "--dry-run", "-q")
    assert said.out.startswith("--- user_net.py\n+++ user_net.py\n@@")
    assert {k: v for k, v in contents(Path.cwd()).items() if "__pycache__" not in k} == before


def test_in_place_then_nothing_is_left_to_do(bntool: Shell, script: Path, proved_here: None) -> None:
    document = bntool("insert", REFERENCE, *nets.INPUT, "--source", "--in-place", "--json").document
    assert document["status"] == "ok"
    assert document["output"] == "user_net.py"
    assert [(s["conv"], s["bn"], s["form"]) for s in document["sites"]] == [
        ("first", "first_bn", "source"),
        ("second", "second_bn", "source"),
    ]
    source = document["source"]
    assert [(s["bn"], s["line"], s["verdict"]) for s in source["sites"]] == [
        ("first_bn", 9, "edited"),
        ("second_bn", 10, "edited"),
    ]
    assert added(source["diff"]) == ADDED
    assert document["check"]["max_abs"] == 0
    nets.forget("user_net")
    model = nets.user_model(code=script.read_text())
    assert isinstance(model.first_bn, nn.BatchNorm2d)
    assert model(torch.randn(2, 3, 12, 12)).shape == (2, 2)
    before = script.read_bytes()
    again = bntool("insert", REFERENCE, *nets.INPUT, "--source", "--in-place")
    assert again.code == 4
    assert "already-normalised" in again.out
    assert script.read_bytes() == before


def test_weights_of_a_file_are_what_is_proved(bntool: Shell, script: Path, proved_here: None) -> None:
    torch.save(nets.user_model().half().state_dict(), "w.pt")
    nets.forget("user_net")
    said = bntool("insert", REFERENCE, "--weights", "w.pt", *nets.INPUT, "--source", "--json")
    assert (said.code, said.document["check"]["max_abs"]) == (0, 0)


def test_an_unsafe_source_falls_back_to_the_module(bntool: Shell, script: Path) -> None:
    script.write_text(nets.USER_CODE.replace("images))\n", "images))\n        again = self.second\n"))
    before = script.read_bytes()
    said = bntool("insert", REFERENCE, *nets.INPUT, "--source", "-o", "new.py")
    assert said.code == 0
    assert next(line for line in said.out.splitlines() if not line.startswith("note:")) == (
        "unsafe: user_net.py:15: second: the layer self.second is handed on under another name"
    )
    assert "the model is changed instead" in said.out
    assert "wrote       Net_bn.pt" in said.out
    assert not Path("new.py").exists()
    assert script.read_bytes() == before
    shown = bntool("insert", REFERENCE, *nets.INPUT, "--source", "--json").document
    assert (shown["status"], shown["output"]) == ("ok", None)
    (site,) = shown["source"]["sites"]
    assert (site["conv"], site["line"], site["verdict"]) == ("second", 15, "unsafe")
    assert shown["source"]["diff"] == ""
    assert any(note.startswith("nothing is written") for note in shown["notes"])


def test_what_cannot_be_proved_is_not_written(
    bntool: Shell, script: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bntool.source import rewriting

    monkeypatch.setattr(rewriting, "prove_apart", lambda task: ("it computes something else", None))
    said = bntool("insert", REFERENCE, *nets.INPUT, "--source", "--in-place")
    assert said.code == 0
    assert "unsafe: user_net.py:9: (all): not proved: it computes something else" in said.out
    assert script.read_text() == nets.USER_CODE


def test_a_process_that_dies_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from bntool.source import proof

    monkeypatch.setattr(proof, "_CHILD", "raise SystemExit('gone')")
    why, check = proof.prove_apart(None)  # type: ignore[arg-type]
    assert why == "the process that runs the new source ended: gone"
    assert check is None


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["model.pt", "--source"], "--source edits the class in a Python file"),
        (["--source"], "no MODEL"),
        (["torchvision:alexnet", "--source"], "names none"),
        ([REFERENCE, "--in-place"], "--in-place is for --source"),
        ([REFERENCE, "--source", "--in-place", "-o", "new.py"], "exclude each other"),
        ([REFERENCE, "--source", "-o", "new.pt"], "no .py file"),
        ([REFERENCE, "--source", "-o", "user_net.py"], "the input itself"),
        ([REFERENCE, "--source", "-o", "taken.py"], "exists already"),
        ([REFERENCE, "--source", "--keep-keys"], "do not go together"),
        ([REFERENCE, "--source", "--drop-bias"], "do not go together"),
        ([REFERENCE, "--source", "--per-call"], "do not go together"),
        ([REFERENCE, "--source", "--position", "after"], "do not go together"),
        ([REFERENCE, "--source", "--init", "calibrate", "--data", "x.pt"], "do not go together"),
    ],
)
def test_options_that_do_not_fit(refused, script: Path, words: list[str], says: str) -> None:
    Path("taken.py").write_text("")
    refused("insert", *words, code=2, says=says)


def test_source_that_is_not_python_is_refused_as_ever(refused, script: Path) -> None:
    script.write_text("class Net(:\n")
    refused("insert", REFERENCE, "--source", code=3, says="SyntaxError")
