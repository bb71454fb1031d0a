"""How the command line speaks: streams, documents, colours, help, and how it stops."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bntool.cli import run
from bntool.core.errors import LoadError
from tests.cli import nets
from tests.cli.conftest import Shell, contents


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["fould", "model.pt"], "did you mean fold?"),
        (["fold", "model.pt", "--expot", "onnx"], "--export"),
        (["fold", "a.pt", "b.pt"], "b.pt"),
        (["insert", "model.pt", "--input"], "--input"),
    ],
)
def test_a_line_that_cannot_be_read(refused: Shell, words: list[str], says: str) -> None:
    assert refused(*words, code=2, says=says).out == ""
    assert refused(*words[:1], "--json", *words[1:], code=2, says=says).document["status"] == "usage"


def test_without_a_command_there_is_help(bntool: Shell) -> None:
    said = bntool()
    assert (said.code, said.err) == (0, "")
    assert said.out.startswith("Usage: bntool")
    assert said.out == bntool("--help").out


@pytest.mark.parametrize(
    "command", ["insert", "summary", "fold", "export", "verify", "explain", "doctor", "demo", "report"]
)
def test_every_command_has_help(bntool: Shell, command: str) -> None:
    said = bntool(command, "--help")
    assert (said.code, said.err) == (0, "")
    assert said.out.startswith(f"Usage: bntool {command}")
    assert said.out == bntool(command, "-h").out


def test_help_beside_json_is_still_help(bntool: Shell) -> None:
    assert bntool("fold", "--json", "--help").out.startswith("Usage: bntool fold")


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["--version"],
        ["explain", "nonlinear"],
        ["fold", "--help"],
    ],
    ids=" ".join,
)
def test_nothing_heavy_is_imported_for(words: list[str]) -> None:
    code = f"""
import sys
from bntool.cli import run
code = run({words!r})
heavy = {{'torch', 'onnx', 'onnxruntime', 'numpy', 'rich'}} & set(sys.modules)
sys.exit(f'imported {{heavy}}' if heavy else code)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done


def test_explain(bntool: Shell, refused: Shell) -> None:
    said = bntool("explain", "nonlinear")
    assert said.code == 0
    assert said.out.startswith("nonlinear")
    everything = bntool("explain", "--json").document
    assert "weight-shared" in everything["reasons"]
    refused("explain", "nonlinaer", code=2, says="nonlinear")


def test_doctor(bntool: Shell) -> None:
    said = bntool("doctor", "--json")
    assert said.code in (0, 5)
    assert {row["name"] for row in said.document["rows"]} >= {"python", "torch"}


def test_what_a_model_prints_stays_out_of_the_document(bntool: Shell) -> None:
    code = nets.USER_CODE.replace(
        "x = F.relu(self.first", "print('in forward')\n        x = F.relu(self.first"
    )
    Path("noisy.py").write_text("print('at import')\n" + code)
    said = bntool("insert", "noisy.py:Net", *nets.INPUT, "--json")
    assert said.code == 0
    assert said.document["status"] == "ok"
    assert "at import" in said.err


def test_ctrl_c_leaves_nothing(
    bntool: Shell, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bntool.pipeline import serving

    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    nets.save(nets.normalised(), "model.pt")
    before = contents(folder.parent)
    monkeypatch.setattr(serving, "check_onnx", interrupted)
    said = bntool("fold", "model.pt", *nets.INPUT, "--export", "onnx")
    assert (said.code, said.err.strip()) == (130, "bntool: stopped")
    assert contents(folder.parent) == before
    stopped = bntool("fold", "model.pt", *nets.INPUT, "--export", "onnx", "--json")
    assert (stopped.code, stopped.document["status"]) == (130, "stopped")


def test_a_bug_is_called_a_bug(bntool: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    from bntool.pipeline import surgeries

    def broken(*args: object, **options: object) -> None:
        raise EOFError("the end")

    nets.save(nets.normalised(), "model.pt")
    monkeypatch.setattr(surgeries, "fold", broken)
    said = bntool("fold", "model.pt", *nets.INPUT)
    assert said.code == 70
    assert "a bug in bntool" in said.err
    assert "--debug" in said.err
    assert bntool("fold", "model.pt", *nets.INPUT, "--json").document["status"] == "bug"


def test_what_fills_a_screen_is_shortened_and_whole_on_request(refused: Shell) -> None:
    words = "from torch import nn\n\nclass Net(nn.Module):\n    def forward(self, x):\n"
    Path("wordy.py").write_text(words + "        raise ValueError('shape mismatch, ' * 100 + 'the end')\n")
    line = ("summary", "wordy.py:Net", *nets.INPUT)
    short = refused(*line, code=2, says="shape mismatch")
    assert max(map(len, short.err.splitlines())) < 450
    assert "(-v shows all of it)" in short.err
    assert "the end" in refused(*line, "-v", code=2).err
    assert "the end" in refused(*line, "--json", code=2).document["error"]["what"]


def test_debug_shows_the_traceback_and_keeps_the_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["fold", "nope.pt", "--debug", "--json"]) == LoadError.exit_code
    out, err = capsys.readouterr()
    assert json.loads(out)["status"] == "cannot-load"
    assert "Traceback" in err


def test_a_reader_that_leaves_is_no_failed_check() -> None:
    """`bntool summary model.pt | head -1`: quiet, and not the exit code of a failed check."""
    nets.save(nets.plain(), "model.pt")
    code = """
import os, sys
read, write = os.pipe()
os.close(read)
os.dup2(write, 1)
from bntool.cli import main
main(['summary', 'model.pt', '--input', '1x3x12x12'])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (141, "")


def test_no_colours_even_when_they_are_asked_for(monkeypatch: pytest.MonkeyPatch, bntool: Shell) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "40")
    nets.save(nets.normalised(), "model.pt")
    assert bntool("fold", "model.pt", *nets.INPUT).code == 0  # the fixture looks for escape codes


def test_a_state_folder_that_cannot_be_written_is_said(
    bntool: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(blocked))
    nets.save(nets.plain(), "model.pt")
    said = bntool("insert", "model.pt")
    assert said.code == 0
    assert "the next command here needs MODEL named" in said.out
    assert bntool("summary").code == 2
