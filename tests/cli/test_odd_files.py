"""What is no ordinary file, or has no ordinary name or place: an answer at once, no bug, no wait."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

from bntool.api import load
from bntool.core.errors import LoadError
from bntool.files.detect import detect
from tests.cli import nets
from tests.cli.conftest import Said, Shell

pytestmark = pytest.mark.skipif(os.name != "posix", reason="Windows has no such files")
IN_BYTES = pytest.mark.skipif(sys.platform != "linux", reason="other systems keep names in UTF-8")
LATIN = os.fsdecode(b"caf\xe9")
LONGEST = 255


@pytest.fixture(autouse=True)
def _no_waiting() -> Iterator[None]:
    """A command that waits for a pipe would wait for ever."""

    def late(*_: object) -> None:
        raise RuntimeError("it waited")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def _socket(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path)


def _link_to_a_pipe(path: str) -> None:
    os.mkfifo("pipe")
    Path(path).symlink_to("pipe")


def _holes(path: str) -> None:
    with Path(path).open("wb") as file:
        file.truncate(1 << 40)


ODD: dict[str, Callable[[str], object]] = {
    "pipe": os.mkfifo,
    "socket": _socket,
    "folder": os.mkdir,
    "link to a pipe": _link_to_a_pipe,
    "endless device": lambda path: Path(path).symlink_to("/dev/zero"),
    "empty device": lambda path: Path(path).symlink_to("/dev/null"),
    "loop": lambda path: Path(path).symlink_to(path),
    "broken link": lambda path: Path(path).symlink_to("nowhere"),
    "a terabyte of nothing": _holes,
    "empty": lambda path: Path(path).write_bytes(b""),
}


@pytest.fixture
def told(bntool: Shell) -> Callable[..., Said]:
    """A line that must end in one error with a next step."""

    def shell(*words: str, codes: tuple[int, ...] = (2, 3)) -> Said:
        said = bntool(*words)
        assert said.code in codes, (words, said)
        assert said.err.count("error: ") == 1, said
        assert "\n  next:  " in said.err
        return said

    return shell


def _show_any_name() -> None:
    """How a name that is no text is shown is not asked here."""
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


@pytest.fixture(autouse=True)
def _good() -> None:
    nets.save(nets.normalised(), "good.pt")
    nets.save(nets.normalised().state_dict(), "weights.pt")
    Path("net.py").write_text("from tests.cli import nets\n\n\ndef make():\n    return nets.normalised()\n")


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("ending", ["pt", "onnx", "safetensors", "npy"])
def test_no_file_to_read(told: Callable[..., Said], kind: str, ending: str) -> None:
    odd = f"odd.{ending}"
    ODD[kind](odd)
    there = set(Path().iterdir())
    for line in (
        ["inspect", odd],
        ["summary", odd],
        ["fold", odd],
        ["insert", odd],
        ["export", odd],
        ["calibrate", odd, "--data", "good.pt"],
        ["verify", "good.pt", odd],
        ["verify", odd, "good.pt"],
        ["bench", odd, "good.pt"],
        ["summary", "good.pt", "--baseline", odd, *nets.INPUT],
        ["summary", "net.py:make", "--weights", odd],
        ["calibrate", "good.pt", "--data", odd, *nets.INPUT],
        ["verify", "good.pt", "good.pt", "--inputs", odd, *nets.INPUT],
        ["fold", "weights.pt", "--plan", odd, "-o", "out.safetensors"],
        ["insert", "good.pt", "--sites", odd, *nets.INPUT],
        ["report", odd, "-o", "out.html"],
    ):
        told(*line)
    assert set(Path().iterdir()) == there


@pytest.mark.parametrize("kind", [kind for kind in ODD if kind not in ("a terabyte of nothing", "empty")])
def test_a_side_file_that_is_no_file_is_none(bntool: Shell, kind: str) -> None:
    ODD[kind]("good.pt.bntool.json")
    ODD[kind]("weights.pt.bntool.json") if kind != "link to a pipe" else None
    assert bntool("summary", "good.pt", *nets.INPUT).code == 0
    assert bntool("summary", "weights.pt", "--arch", "net.py:make", *nets.INPUT).code == 0


@pytest.mark.parametrize("kind", ["a terabyte of nothing", "empty"])
def test_a_side_file_that_holds_nothing(told: Callable[..., Said], kind: str) -> None:
    ODD[kind]("weights.pt.bntool.json")
    said = told("summary", "weights.pt", "--arch", "net.py:make", *nets.INPUT, codes=(3,))
    assert "weights.pt.bntool.json" in said.err


def test_a_shard_that_is_a_pipe(told: Callable[..., Said]) -> None:
    os.mkfifo("a.safetensors")
    Path("m.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "a.safetensors"}}))
    for command in ("inspect", "summary"):
        assert "a.safetensors" in told(command, "m.safetensors.index.json", codes=(3,)).err


def test_a_file_that_becomes_a_pipe_after_it_was_looked_at(
    told: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Path.stat
    os.mkfifo("pipe.pt")
    monkeypatch.setattr(
        Path, "stat", lambda self, **o: seen(Path("good.pt") if self.name == "pipe.pt" else self, **o)
    )
    assert "not a regular file" in told("inspect", "pipe.pt").err


@pytest.mark.parametrize("what", [["a", "b"], [b"a"], [1 + 2j], np.zeros(3, "M8[s]"), np.zeros(3, "f4,i4")])
def test_arrays_that_are_no_numbers(told: Callable[..., Said], what: object) -> None:
    np.save("data.npy", np.array(what))
    told("verify", "good.pt", "good.pt", "--inputs", "data.npy", *nets.INPUT)
    told("calibrate", "good.pt", "--data", "data.npy", *nets.INPUT)


# -- names ---------------------------------------------------------------------------------------------------

NAMES = [
    "two words.pt",
    "a\nb.pt",
    "tab\t.pt",
    "a:b.pt",
    "torchvision:resnet18",
    "net.py:make",
    "é.pt",
    "-x.pt",
    "*.pt",
]


@pytest.mark.parametrize("name", [*NAMES, pytest.param(f"{LATIN}.pt", marks=IN_BYTES)])
def test_a_file_by_any_name(bntool: Shell, name: str) -> None:
    _show_any_name()
    shutil.copy("good.pt", name)
    assert bntool("inspect", "--json", "--", name).document["kind"] == "torch-zip"
    said = bntool("fold", *nets.INPUT, "--export", "onnx", "--", name)
    assert said.code == 0, said
    assert bntool("summary").code == 0
    (document,) = Path().glob("*.bntool.json")
    assert json.loads(document.read_text())["command"] == "fold"


@IN_BYTES
def test_names_that_are_not_utf8(bntool: Shell, folder: Path) -> None:
    _show_any_name()
    save_file(nets.normalised().state_dict(), "w.safetensors")
    Path("w.safetensors").rename(f"{LATIN}.safetensors")
    onnx = f"{LATIN}.onnx"
    assert bntool("export", "good.pt", *nets.INPUT, "-o", onnx).code == 0
    assert bntool("inspect", onnx).code == 0
    assert bntool("fold", onnx, "-o", f"{LATIN}2.onnx").code == 0
    assert bntool("verify", "good.pt", f"{LATIN}2.onnx", *nets.INPUT).code == 0
    assert bntool("verify", onnx, f"{LATIN}2.onnx").code == 0
    arguments = [f"{LATIN}.safetensors", "--arch", "net.py:make", *nets.INPUT]
    assert bntool("fold", *arguments, "-o", f"{LATIN}3.safetensors").code == 0
    plan = f"{LATIN}3.safetensors.bntool.json"
    assert bntool("fold", arguments[0], "--plan", plan, "-o", "4.safetensors").code == 0
    Path(LATIN).mkdir()
    os.chdir(LATIN)
    shutil.copy(folder / "good.pt", "x.pt")
    assert bntool("fold", "x.pt", *nets.INPUT, "--export", "onnx").code == 0
    assert bntool("summary").code == 0
    assert bntool("verify", "x.pt", "x_folded.onnx", *nets.INPUT).code == 0


def test_the_longest_name_there_can_be(bntool: Shell, told: Callable[..., Said]) -> None:
    name = f"{'n' * (LONGEST - 3)}.pt"
    shutil.copy("good.pt", name)
    assert bntool("summary", name).code == 0
    assert bntool("fold", name, *nets.INPUT, "-o", "out.pt").code == 0
    assert "too long" in told("fold", name, *nets.INPUT).err
    told("summary", f"{'n' * LONGEST}.pt")
    with pytest.raises(LoadError):
        load(f"{'n' * LONGEST}.pt")
    with pytest.raises(LoadError):
        detect("zero\0byte.pt")


@pytest.mark.parametrize("line", [["summary", "a\0b.pt"], ["fold", "good.pt", "-o", "a\0.pt"]])
def test_a_zero_byte_in_a_name(told: Callable[..., Said], line: list[str]) -> None:
    assert "zero byte" in told(*line, codes=(2,)).err


# -- places --------------------------------------------------------------------------------------------------


def _elsewhere(words: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).resolve().parents[2])
    variables = {"PATH": os.environ["PATH"], "PYTHONPATH": root, **environment}
    return subprocess.run(
        words, check=False, cwd=folder, env=variables, capture_output=True, text=True, timeout=120
    )


def test_a_working_folder_that_is_gone(folder: Path) -> None:
    for line in (f"fold {folder}/good.pt -o {folder}/out.pt", "summary", "inspect x", "doctor"):
        ran = _elsewhere(
            ["sh", "-c", f"mkdir gone; cd gone; rmdir ../gone; {sys.executable} -m bntool {line}"], folder
        )
        assert ran.returncode == 2
        assert ran.stderr.startswith("error: the folder that bntool was started in is gone\n  next:  ")
    assert not (folder / "out.pt").exists()


def test_no_home_and_no_place_for_drafts(folder: Path) -> None:
    line = [sys.executable, "-m", "bntool", "fold", "good.pt", *nets.INPUT, "--export", "onnx"]
    ran = _elsewhere(line, folder, HOME="/dev/null", TMPDIR=f"{folder}/nowhere")
    assert ran.returncode == 0, ran.stderr
    assert (folder / "good_folded.onnx").exists()


@pytest.mark.parametrize("how", ["hard", "out"])
def test_onnx_data_with_a_second_name(bntool: Shell, told: Callable[..., Said], how: str) -> None:
    assert bntool("export", "good.pt", *nets.INPUT, "-o", "net.onnx", "--external-data", "always").code == 0
    Path("copy").mkdir()
    shutil.copy("net.onnx", "copy")
    if how == "hard":
        os.link("net.onnx.data", "copy/net.onnx.data")
    else:
        Path("copy/net.onnx.data").symlink_to("../net.onnx.data")
    says = "(a hard link)" if how == "hard" else "through a link out of its folder"
    for line in (["fold"], ["insert"], ["verify"], ["verify", "net.onnx"]):
        assert says in told(*line, "copy/net.onnx", codes=(3,)).err
    told("inspect", "copy/net.onnx", codes=(3,))
    if how == "hard":
        step = told("fold", "copy/net.onnx").err.partition("next:  ")[2]
        subprocess.run(["sh", "-c", step], check=True)
        assert bntool("fold", "copy/net.onnx").code == 0


def test_onnx_data_through_a_link_in_its_folder(bntool: Shell) -> None:
    assert bntool("export", "good.pt", *nets.INPUT, "-o", "net.onnx", "--external-data", "always").code == 0
    Path("net.onnx.data").rename("data.bin")
    Path("net.onnx.data").symlink_to("data.bin")
    assert bntool("inspect", "net.onnx").code == 0
    assert bntool("fold", "net.onnx").code == 0
