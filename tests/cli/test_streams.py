"""Standard output and error: whose they are, and what happens when they cannot be written."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from rich.progress import BarColumn

from bntool.cli import run
from bntool.cli.progress import Description, bar_of
from bntool.cli.streams import Stream, say
from tests.cli import nets
from tests.cli.conftest import Shell

ROOT = Path(__file__).resolve().parents[2]
needs_unix = pytest.mark.skipif(not Path("/dev/full").exists(), reason="a shell and /dev/full are needed")


def _typed(line: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A line of the shell in which `bntool` is this one."""
    ours = f'bntool() {{ {shlex.quote(sys.executable)} -m bntool "$@"; }}; {line}'
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", ours], capture_output=True, text=True, check=False, env=environment
    )


@needs_unix
@pytest.mark.parametrize(
    ("line", "code", "told"),
    [
        ("bntool explain nonlinear >&-", 9, "error: standard output could not be written: it is closed"),
        ("bntool explain nonlinear >/dev/full", 9, "No space left on device"),
        ("bntool explain nonlinear --json >&-", 9, "it is closed"),
        ("bntool explain nonlinear --json >/dev/full", 9, "No space left on device"),
        ("bntool --help >/dev/full", 9, "No space left on device"),
        ("bntool --version >&-", 9, "it is closed"),
        ("bntool completion bash >/dev/full", 9, "No space left on device"),
        ("bntool explain nonlinear >&- 2>&-", 9, ""),
        ("bntool explain nonlinear >/dev/full 2>/dev/full", 9, ""),
        ("bntool explain nonlinear <&- >&- 2>&-", 9, ""),
        ("bntool explain nonlinear 2>&- >/dev/null", 0, ""),
        ("bntool explain nonlinear --json 2>&- >/dev/null", 0, ""),
        ("bntool explain wrong 2>&-", 2, ""),
        ("bntool explain wrong 2>/dev/full", 2, ""),
        ("bntool explain wrong >&-", 2, "error: there is no reason code"),
        ("bntool explain wrong --json >/dev/full", 2, "error: standard output could not be written"),
        ("bntool explain --json | true", 141, ""),
        ("bntool explain nonlinear | true", 141, ""),
        ("bntool explain wrong 2>&1 | true", 2, ""),
    ],
)  # fmt: skip
def test_one_exit_code_and_no_traceback(line: str, code: int, told: str) -> None:
    done = _typed(line)
    assert done.returncode == code, done
    assert done.stdout == ""
    assert told in done.stderr if told else done.stderr == ""
    assert "Traceback" not in done.stderr
    assert "ignored" not in done.stderr


@needs_unix
def test_with_no_streams_at_all_the_work_is_done_and_no_file_gets_what_is_printed(bntool: Shell) -> None:
    nets.save(nets.normalised(), "model.pt")
    assert bntool("fold", "model.pt", *nets.INPUT, "-o", "a.pt").code == 0
    done = _typed("bntool fold model.pt --input 1x3x12x12 -o b.pt <&- >&- 2>&-")
    assert done.returncode == 9
    for file in ("model.pt", "b.pt"):
        assert b"BatchNorm  " not in Path(file).read_bytes()
    assert nets.state_of("b.pt").keys() == nets.state_of("a.pt").keys()
    assert Path("b.pt.bntool.json").is_file()


_LOUD = """
import atexit, ctypes, os, subprocess, sys
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        if type(x) is torch.Tensor and not hasattr(self, "said"):
            self.said = True
            print("by Python")
            torch.ops.aten._print("by torch")
            os.write(1, b"by number\\n")
            subprocess.run([sys.executable, "-c", "print('by a child')"])
            ctypes.CDLL(None).puts(b"by C, held back")
            atexit.register(print, "at the end")
            atexit.register(os.write, 1, b"at the very end\\n")
        return self.norm(self.conv(x))
"""


@needs_unix
def test_a_document_is_alone_whatever_prints() -> None:
    Path("loud.py").write_text(_LOUD)
    done = _typed("bntool summary loud.py:Net --input 1x3x12x12 --json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "ok"
    said = (
        "by Python",
        "by torch",
        "by number",
        "by a child",
        "by C, held back",
        "at the end",
        "at the very end",
    )
    assert [word for word in said if word not in done.stderr] == []


@needs_unix
def test_descriptor_1_is_lent_and_given_back(capfd: pytest.CaptureFixture[str]) -> None:
    Path("loud.py").write_text(_LOUD.replace("atexit.register", "(lambda *_: None)"))
    assert run(["summary", "loud.py:Net", *nets.INPUT, "--json"]) == 0
    os.write(1, b"{}")
    out, err = capfd.readouterr()
    document, _, after = out.rpartition("{}")
    assert json.loads(document)["status"] == "ok"
    assert after == ""
    assert "by number" in err
    assert "by C, held back" in err


class _Broken(io.StringIO):
    """A standard output that takes one line."""

    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        if self.getvalue():
            raise self.error
        return super().write(text)


@pytest.mark.parametrize("json_too", [(), ("--json",)], ids=["text", "json"])
@pytest.mark.parametrize(
    ("error", "code"),
    [
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 141),
        (OSError(errno.ENOSPC, "No space left on device"), 9),
    ],
)
def test_the_work_is_done_though_nobody_can_be_told(
    monkeypatch: pytest.MonkeyPatch, error: OSError, code: int, json_too: tuple[str, ...]
) -> None:
    nets.save(nets.normalised(), "model.pt")
    stdout = _Broken(error)
    io.StringIO.write(stdout, "full")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert run(["fold", "model.pt", *nets.INPUT, "-o", "folded.pt", *json_too]) == code
    assert nets.counted("folded.pt")[1] == 0
    assert sys.stdout is stdout


def test_a_failure_of_the_work_keeps_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    nets.save(nets.normalised(), "model.pt")
    nets.save(nets.plain(), "other.pt")
    monkeypatch.setattr(sys, "stdout", stdout := _Broken(OSError(errno.ENOSPC, "No space left on device")))
    io.StringIO.write(stdout, "full")
    assert run(["verify", "model.pt", "other.pt", *nets.INPUT]) == 1


def _python(code: str) -> subprocess.CompletedProcess[str]:
    start = "import sys, warnings; from bntool.cli.streams import Streams, say"
    line = [sys.executable, "-c", f"{start}; streams = Streams(document=False); {code}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(line, capture_output=True, text=True, check=False, env=environment)


def test_a_model_that_closes_standard_output_is_told_so() -> None:
    done = _python(
        "sys.__stdout__.close(); say('result'); assert not sys.stdout.isatty(); sys.exit(streams.outcome(0))"
    )
    assert done.returncode == 9
    assert "it is closed" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_what_an_encoding_lacks_is_written_out(encoding: str) -> None:
    raw = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    stream = Stream(raw)
    print("畳\x1b[2J\udc80…", file=stream, flush=True)
    seen = raw.buffer.getvalue().decode(encoding)
    assert seen.startswith("畳" if encoding == "utf-8" else r"\u7573")
    assert r"\x1b[2J\udc80" in seen
    assert seen.endswith("\n")


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_of_somebody_else_is_drawn_on_a_terminal(terminal: bool) -> None:
    raw = io.StringIO()
    raw.isatty = lambda: terminal  # type: ignore[method-assign]
    stream = Stream(raw)
    for text in ("\r 10%", "\r 20%\rerror"):
        stream.write(text)
    start = "\r" if terminal else r"\r"
    assert raw.getvalue() == rf"{start} 10%{start} 20%\rerror"


def test_a_warning_takes_one_line() -> None:
    done = _python(r"warnings.warn('a\x1b[2J\nsuspicious: nothing')")
    assert done.stderr.endswith(r"UserWarning: a\x1b[2J\nsuspicious: nothing" + "\n")
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(os.name == "nt", reason="no terminals of this kind")
def test_progress_shows_names_and_obeys_none(monkeypatch: pytest.MonkeyPatch) -> None:
    controller, terminal = os.openpty()
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "200")
    with os.fdopen(terminal, "w", encoding="utf-8") as raw:
        monkeypatch.setattr(sys, "stdout", Stream(raw))
        monkeypatch.setattr(sys, "stderr", Stream(raw))
        before = sys.stdout, sys.stderr
        with bar_of(Description(), BarColumn()) as bar:
            bar.add_task("[link=http://x]a[/link]\x1b[2J", total=None)
            print("\x1b]8;;http://x\x07[red]part", end="", flush=True)
            say("\x1b[2Jwhole")
        assert (sys.stdout, sys.stderr) == before
        shown = os.read(controller, 65536).decode()
    os.close(controller)
    assert r"[link=http://x]a[/link]\x1b[2J" in shown
    assert r"\x1b]8;;http://x\x07[red]part" in shown
    assert r"\x1b[2Jwhole" in shown
    assert "\x1b]" not in shown
    assert "\x1b[2J" not in shown
    assert re.search(r"\x1b\[[\d;]*m", shown), "the bar has colours"
