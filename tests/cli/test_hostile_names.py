"""No name takes the terminal over: every command, every kind of file, in a pipe and on a terminal."""

from __future__ import annotations

import contextlib
import io
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from bntool.cli import _COMMANDS, run
from tests.cli import hostile, nets
from tests.cli.conftest import Shell
from tests.cli.hostile import FAKE, FILE, NAME

_NET, _BARE = ("net.py:norm", *nets.INPUT), ("net.py:bare", *nets.INPUT)
LINES: tuple[tuple[str, ...], ...] = (
    ("inspect", "w.pt"),
    ("inspect", "w.safetensors"),
    ("inspect", "m.onnx"),
    ("inspect", "m.pt2"),
    ("inspect", "s.pt"),
    ("inspect", "d.npz"),
    ("inspect", FILE + ".pt"),
    ("inspect", "caf\udce9.pt"),
    ("summary", *_NET),
    ("fold", *_NET, "--dry-run"),
    ("fold", "m.onnx", "--dry-run"),
    ("fold", "w.safetensors", "--plan", "plan.json", "--dry-run"),
    ("insert", *_BARE, "--dry-run"),
    ("insert", *_BARE, "--plan", "bad_plan.json"),
    ("verify", *_NET, "net.py:bare"),
    ("calibrate", *_NET, "--data", "d.npz", "--force"),
    ("compare", *_BARE, "--data", "images", "--epochs", "1"),
    ("report", "doc.json", "--format", "md"),
    ("fold", "net.py:noisy", *nets.INPUT, "--dry-run"),
    (NAME,),
)
"""What is typed in a pipe, and on a terminal."""
MORE_LINES: tuple[tuple[str, ...], ...] = (
    ("inspect", "m.pt", "-v"),
    ("inspect", "nested.pt"),
    ("inspect", "surrogate.pt"),
    ("inspect", "cut.safetensors"),
    ("inspect", "unknown.onnx"),
    ("inspect", "lost.onnx"),
    ("summary", "m.pt", *nets.INPUT),
    ("summary", "m.pt2"),
    ("fold", *_NET, "--json", "--dry-run"),
    ("fold", *_NET, "-o", FILE + "_folded.pt"),
    ("fold", FILE + ".pt", *nets.INPUT),
    ("fold", *_NET, "--weights", "w.pt", "--dry-run"),
    ("fold", *_NET, "--weights", "nested.pt"),
    ("fold", *_NET, "--weights", "nested.pt", "--key", NAME, "--dry-run"),
    ("fold", "w.safetensors", "--plan", "bad_plan.json"),
    ("fold", "open.onnx", "--dry-run"),
    ("fold", "unknown.onnx"),
    ("fold", "lost.onnx"),
    ("fold", "m.pt2"),
    ("fold", "s.pt"),
    ("fold", "net.py:raising", *nets.INPUT),
    ("fold", "net.py:leaving", *nets.INPUT),
    ("fold", "net.py:" + NAME),
    ("fold", NAME),
    ("fold", *_NET, "--" + NAME),
    ("insert", "m.onnx"),
    ("insert", *_BARE, "--sites", "sites.json"),
    ("insert", *_BARE, "--include", NAME),
    ("insert", *_BARE, "--source"),
    ("export", *_NET, "--exporter", "legacy", "-o", "e.onnx"),
    ("verify", "m.onnx", "unknown.onnx"),
    ("verify", "m.onnx", "same.onnx"),
    ("verify", "again.pt", *_NET),
    ("bench", "m.onnx", "m.onnx", "--rounds", "3"),
    ("calibrate", *_NET, "--data", "d.pt", "--force"),
    ("calibrate", *_NET, "--data", "images", "--force"),
    ("report", "doc.json", "--figure", NAME, "-o", "x.svg"),
    ("report", "failed.json", "--format", "md"),
    ("explain", NAME),
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("hostile")
    before = Path.cwd()
    os.chdir(where)
    hostile.make_all()
    os.chdir(before)
    return where


def _line(words: tuple[str, ...]) -> str:
    return ascii(" ".join(words).replace(NAME, "NAME").replace(FILE, "FILE"))


@pytest.fixture
def among(files: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(files)
    return files


def _require_harmless(text: str) -> None:
    found = {c for c in text if c != "\n" and not c.isprintable()}
    assert not found, ascii(text)
    assert not re.search(f"^{FAKE}", text, flags=re.MULTILINE), text


@pytest.mark.parametrize("words", [*LINES, *MORE_LINES], ids=_line)
def test_in_a_pipe(bntool: Shell, among: Path, words: tuple[str, ...]) -> None:
    said = bntool(*words)
    assert said.code != 70, said
    assert said.out + said.err
    _require_harmless(said.out)
    _require_harmless(said.err)


@pytest.mark.skipif(os.name == "nt", reason="no terminals of this kind")
@pytest.mark.parametrize("words", LINES, ids=_line)
def test_on_a_terminal(among: Path, words: tuple[str, ...]) -> None:
    with _terminal() as said:
        run(list(words))
    shown = said.getvalue().decode().replace("\r\n", "\n")
    # What takes a second has a line of progress; rich draws it by colours, and by erasing single lines.
    shown = re.sub(r"\r(?=\x1b\[2K)|\x1b\[(\?25[hl]|[\d;]*m|1A|2K)", "", shown)
    assert shown
    _require_harmless(shown)


@contextlib.contextmanager
def _terminal() -> Iterator[io.BytesIO]:
    """A terminal as standard output and error; what arrived there is whole at the end."""
    controller, terminal = os.openpty()
    arrived = io.BytesIO()

    def read() -> None:
        with contextlib.suppress(OSError):  # the other end was closed
            while piece := os.read(controller, 65536):
                arrived.write(piece)

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(terminal, "w", encoding="utf-8") as stream:
        with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
            yield arrived
    reader.join()
    os.close(controller)


def test_every_command_that_reads_a_file_is_tried() -> None:
    tried = {words[0] for words in (*LINES, *MORE_LINES)}
    assert set(_COMMANDS) - tried == {"doctor", "demo", "completion"}


def test_reports_show_what_is_there(bntool: Shell, among: Path) -> None:
    for document in ("doc", "failed"):
        for kind in ("html", "md"):
            report = Path(f"{document}.{kind}")
            assert bntool("report", f"{document}.json", "-o", str(report), "--force").code == 0
            text = report.read_text(encoding="utf-8")
            ours = re.sub(r"<style>.*?</style>|<script>.*?</script>", "", text, flags=re.DOTALL)
            _require_harmless(ours)
            assert r"\x1b" in ours.replace("\\\\", "\\")
            assert "<i>" not in ours
            if kind == "md":
                assert not re.search(r"@you|http://|(?<!\\)[`\[\]]", ours)
    assert bntool("fold", *_NET, "-o", "r.pt", "--report", "r.html").code == 0
    _require_harmless(
        re.sub(r"<s(tyle|cript)>.*?</s\1>", "", Path("r.html").read_text("utf-8"), flags=re.DOTALL)
    )
