"""Completion, the manual, `--version`, examples and colours: what people expect of a command line."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from bntool.cli import _COMMANDS
from bntool.cli.completing import VARIABLE
from bntool.cli.examples import EXAMPLES
from bntool.cli.versions import version_text
from tests.cli import nets
from tests.cli.conftest import Shell
from tools.docs.make_reference import MANUAL, PAGE, completions, manual, page

ROOT = Path(__file__).resolve().parents[2]


def _typed(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    line = [sys.executable, "-m", "bntool", *words]
    return subprocess.run(line, capture_output=True, text=True, check=False, env=environment)


def _completed(line: str, shell: str = "bash") -> list[str]:
    words = line.split(" ")
    done = _typed(
        **{
            VARIABLE: f"{shell}_complete",
            "COMP_WORDS": words[-1] if shell == "fish" else line,
            "COMP_CWORD": words[-1] if shell == "fish" else str(len(words) - 1),
        }
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_of_completion_asks_by_the_variable(bntool: Shell, shell: str) -> None:
    said = bntool("completion", shell)
    assert (said.code, said.err) == (0, "")
    assert f"{VARIABLE}={shell}_complete" in said.out


def test_bash_takes_the_script(bntool: Shell) -> None:
    script = bntool("completion", "bash").out
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash here")
    shown = [bash, "--norc", "-c", f"{script}\ncomplete -p bntool"]
    done = subprocess.run(shown, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "-F _bntool_completion bntool" in done.stdout


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("bntool ins", ["plain,insert", "plain,inspect"]),
        ("bntool fold mod", ["file,mod"]),
        ("bntool fold --expor", ["plain,--export", "plain,--exporter"]),
        ("bntool fold --exporter le", ["plain,legacy"]),
        ("bntool compare --root d", ["dir,d"]),
        ("bntool explain shift-a", ["plain,shift-at-padding"]),
    ],
)
def test_what_bash_is_told(line: str, words: list[str]) -> None:
    assert _completed(line) == words


def test_zsh_and_fish_are_told_the_same() -> None:
    assert "insert" in _completed("bntool ins", "zsh")
    assert any(word.startswith("plain,insert") for word in _completed("ins", "fish"))


def test_the_scripts_that_the_wheel_brings_are_those_that_click_writes() -> None:
    pinned = re.search(r"^click==(.+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert pinned is not None, "make_reference writes them by the click that constraints.txt names"
    if metadata.version("click") != pinned[1]:
        pytest.skip(f"another click than {pinned[1]}, whose scripts may differ")
    for path, text in completions().items():
        assert path.read_text(encoding="utf-8") == text, "python tools/docs/make_reference.py"


def test_completion_imports_nothing_heavy() -> None:
    code = f"""
import os, sys
os.environ.update({VARIABLE}='bash_complete', COMP_WORDS='bntool fold --', COMP_CWORD='2')
from bntool.cli import main
try:
    main([])
except SystemExit as stop:
    assert not stop.code
heavy = {{'torch', 'numpy', 'onnx', 'onnxruntime', 'rich'}} & set(sys.modules)
sys.exit(str(heavy) if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "plain,--export" in done.stdout


def test_the_version_names_what_a_report_of_a_fault_needs(bntool: Shell) -> None:
    import torch

    said = bntool("--version")
    assert said.code == 0
    first, python, *rest = said.out.splitlines()
    assert first.startswith("bntool, version ")
    assert python == f"Python {'.'.join(map(str, sys.version_info[:3]))}"
    (ours,) = (line for line in rest if line.startswith("torch "))
    assert ours.split()[1] == torch.__version__.split("+")[0]
    assert (f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA") in ours
    assert any(line.startswith("onnxruntime") for line in rest)


def test_the_version_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    assert version_text().splitlines()[2:] == ["no torch", "no onnx"]


@pytest.mark.parametrize("command", _COMMANDS)
def test_every_help_has_its_examples(bntool: Shell, command: str) -> None:
    said = bntool(command, "--help")
    assert said.code == 0
    for line in EXAMPLES[command]:
        assert f"    {line}\n" in said.out
        assert line.split()[:2] == ["bntool", command]


def test_every_example_runs(bntool: Shell, folder: Path) -> None:
    """All but the demo, which `test_three_lines` runs."""
    shutil.copyfile(ROOT / "samples" / "model.pt", folder / "model.pt")
    (folder / "net.py").write_text(nets.USER_CODE, encoding="utf-8")
    random = np.random.default_rng(0)
    images = random.standard_normal((24, 1, 28, 28), dtype=np.float32)
    np.save(folder / "images.npy", images)
    np.savez(folder / "data.npz", x=images, y=random.integers(10, size=24))
    allowed = {"bntool doctor": (0, 5), "bntool doctor --json": (0, 5)}
    for line in (line for name, lines in EXAMPLES.items() if name != "demo" for line in lines):
        words, _, target = line.partition(" > ")
        said = bntool(*words.split()[1:])
        assert said.code in allowed.get(line, (0,)), f"{line}\n{said.err}"
        if target:
            (folder / target).write_text(said.out, encoding="utf-8")
    assert (folder / "report.html").is_file()


def test_the_page_of_commands_and_the_manual_are_up_to_date() -> None:
    for path, text in ((PAGE, page()), (MANUAL, manual())):
        assert path.read_text(encoding="utf-8") == text, "run: python tools/docs/make_reference.py"


def test_the_manual_is_well_formed() -> None:
    groff = shutil.which("groff")
    if groff is None:
        pytest.skip("no groff here")
    line = [groff, "-man", "-ww", "-Tutf8", "-Kutf8", "-P-c", str(MANUAL)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    shown = re.sub(r".\x08|\x1b\[[\d;]*m", "", done.stdout)
    assert all(f"bntool {command}" in shown for command in _COMMANDS)
    assert "--require-all" in shown


def _on_a_terminal(**variables: str) -> str:
    """What the diff of `insert --source`, which has colours, looks like on a terminal."""
    pty = pytest.importorskip("pty")
    controller, terminal = pty.openpty()
    code = (
        "from bntool.cli.session import Voice\n"
        "from bntool.cli.source import _show_diff\n"
        "_show_diff(Voice(False, False, False), '+new\\n-old\\n')"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", **variables}
    process = subprocess.run([sys.executable, "-c", code], stdout=terminal, env=environment, check=False)
    os.close(terminal)
    shown = os.read(controller, 65536).decode()
    os.close(controller)
    assert process.returncode == 0
    assert "new" in shown
    return shown


def test_colours_are_for_terminals_and_for_those_who_want_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[32m+new" in _on_a_terminal()
    assert "\x1b[32m" not in _on_a_terminal(NO_COLOR="1")
