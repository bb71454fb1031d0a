"""No command loses a byte of what it reads, and without --force none of what was there.

A matrix: every command that writes x every file it reads x every way to name that file as something to be
written: the output, the report, a link to it where a side file or a data file goes.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file

from bntool.files.placing import Placed, place
from tests.cli import nets
from tests.cli.conftest import Shell, contents


@dataclasses.dataclass(frozen=True)
class Line:
    """A command, the file that -o names when it goes well, and every file that it reads."""

    words: tuple[str, ...]
    output: str
    reads: tuple[str, ...]
    side: str = ""

    def __str__(self) -> str:
        return " ".join(self.words[:2])


LINES = [
    Line(("insert", "plain.pt", *nets.INPUT), "o.pt", ("plain.pt",), "o.pt.bntool.json"),
    Line(("insert", "plain.pt", "--sites", "sites.json", *nets.INPUT), "o.pt", ("plain.pt", "sites.json")),
    Line(
        ("insert", "plain.pt", "--init", "calibrate", "--data", "data.npy", *nets.INPUT),
        "o.pt", ("plain.pt", "data.npy"), "o.pt.bntool.json",
    ),
    Line(("insert", "plain.pt", "--plan", "plan.json", *nets.INPUT), "o.pt", ("plain.pt", "plan.json")),
    Line(
        ("insert", "user_net.py:Net", *nets.INPUT), "o.pt", ("user_net.py", "helper.py"), "o.pt.bntool.json"
    ),
    Line(("insert", "user_net.py:Net", "--source", *nets.INPUT), "o.py", ("user_net.py", "helper.py")),
    Line(("insert", "plain.onnx"), "o.onnx", ("plain.onnx", "plain.bin")),
    Line(("fold", "norm.pt", *nets.INPUT), "o.pt", ("norm.pt", "norm.pt.bntool.json"), "o.pt.bntool.json"),
    Line(("fold", "hard.pt", "--export", "onnx", *nets.INPUT), "o.pt", ("hard.pt", "norm.pt"), "o.onnx"),
    Line(("fold", "link.pt", *nets.INPUT), "o.pt", ("link.pt", "norm.pt"), "o.pt.bntool.json"),
    Line(
        ("fold", "weights.pt", "--arch", "user_net.py:Normalised", *nets.INPUT),
        "o.pt", ("weights.pt", "user_net.py", "helper.py"), "o.pt.bntool.json",
    ),
    Line(
        ("fold", "user_net.py:Normalised", "--weights", "weights.safetensors", *nets.INPUT),
        "o.pt", ("weights.safetensors", "user_net.py"), "o.pt.bntool.json",
    ),
    Line(
        ("fold", "weights.safetensors", "--plan", "folded.json"),
        "o.safetensors", ("weights.safetensors", "folded.json"), "o.safetensors.bntool.json",
    ),
    Line(("fold", "norm.onnx"), "o.onnx", ("norm.onnx", "norm.bin")),
    Line(("fold", "norm.pt2"), "o.pt2", ("norm.pt2",), "o.pt2.bntool.json"),
    Line(("calibrate", "norm.pt", "--data", "data.npy"), "o.pt", ("norm.pt", "data.npy"), "o.pt.bntool.json"),
    Line(("export", "norm.pt", *nets.INPUT), "o.onnx", ("norm.pt",)),
    Line(("report", "report.json"), "o.html", ("report.json",)),
]  # fmt: skip

HELPER = "from torch import nn\n\n\ndef norm(width):\n    return nn.BatchNorm2d(width)\n"
NORMALISED = """

from helper import norm


def Normalised():
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), norm(4), nn.ReLU(), nn.Conv2d(4, 2, 3), norm(2))
"""


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file of every kind that a command reads."""
    from bntool.cli import run

    home = tmp_path_factory.mktemp("shelf")
    before = Path.cwd()
    os.chdir(home)
    try:
        nets.save(nets.plain(), "plain.pt")
        nets.save(nets.normalised(), "norm.pt")
        Path("link.pt").symlink_to("norm.pt")
        state = nets.normalised().state_dict()
        torch.save(state, "weights.pt")
        save_file(state, "weights.safetensors")
        np.save("data.npy", np.random.default_rng(0).normal(size=(8, 3, 12, 12)).astype(np.float32))
        Path("sites.json").write_text('["0"]')
        Path("user_net.py").write_text(nets.USER_CODE + NORMALISED)
        Path("helper.py").write_text(HELPER)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(nets.normalised(), (torch.zeros(1, 3, 12, 12),))
        torch.export.save(program, "norm.pt2")
        lines = [
            ("insert", "plain.pt", "-o", "planned.pt", *nets.INPUT),
            ("fold", "norm.pt", "-o", "folded.pt", *nets.INPUT),
            ("export", "norm.pt", "-o", "whole_norm.onnx", *nets.INPUT),
            ("export", "plain.pt", "-o", "whole_plain.onnx", *nets.INPUT),
        ]
        for line in lines:
            assert run([*line, "-q"]) == 0
        Path("planned.pt.bntool.json").rename("plan.json")
        shutil.copy("folded.pt.bntool.json", "folded.json")
        shutil.copy("folded.pt.bntool.json", "report.json")
        Path("folded.pt.bntool.json").rename("norm.pt.bntool.json")
        for name in ("norm", "plain"):
            onnx.save(
                onnx.load(f"whole_{name}.onnx"), f"{name}.onnx", save_as_external_data=True,
                location=f"{name}.bin", size_threshold=0,
            )  # fmt: skip
        for name in ("planned.pt", "folded.pt", "whole_norm.onnx", "whole_plain.onnx"):
            Path(name).unlink()
    finally:
        os.chdir(before)
    return home


@pytest.fixture
def folder_of_all(folder: Path, shelf: Path) -> Path:
    for path in shelf.iterdir():
        if path.is_symlink():
            Path(path.name).symlink_to(path.readlink())
        elif path.is_file():
            shutil.copy(path, path.name)
    os.link("norm.pt", "hard.pt")
    return folder


def _ways(line: Line, read: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each way to have `read` written over: what to type, after a link was laid where one is needed."""
    yield "output", (*line.words, "-o", read)
    Path("to.link").symlink_to(read)
    yield "output by a link", (*line.words, "-o", "to.link")
    if line.words[0] in ("insert", "fold"):
        yield "report", (*line.words, "-o", line.output, "--report", read)
    if line.side:
        Path(line.side).symlink_to(read)
        yield "side file by a link", (*line.words, "-o", line.output)


@pytest.mark.parametrize(("line", "read"), [(line, read) for line in LINES for read in line.reads], ids=str)
def test_nothing_that_is_read_is_written_over(
    bntool: Shell, folder_of_all: Path, line: Line, read: str
) -> None:
    for way, words in _ways(line, read):
        for force in ([], ["--force"]):
            before = contents(folder_of_all)
            said = bntool(*words, *force)
            assert said.code == 2, (way, said)
            assert "\n  next:  " in said.err, way
            assert contents(folder_of_all) == before, way


@pytest.mark.parametrize("line", LINES, ids=str)
def test_nothing_that_exists_is_lost_without_force(bntool: Shell, folder_of_all: Path, line: Line) -> None:
    """Whatever stands at any name that a command could choose stays; with --force too if it is not named."""
    names = [line.output, line.side, "o.onnx", "o.onnx.data", "o.onnx.data.1", "o.unverified.onnx"]
    for name in dict.fromkeys(filter(None, names)):
        if not Path(name).exists():
            Path(name).write_bytes(b"precious")
    before = contents(folder_of_all)
    assert bntool(*line.words, "-o", line.output).code == 2
    assert contents(folder_of_all) == before
    exported = "--export" in line.words
    bntool(*line.words, "-o", line.output, "--force")
    named = {line.output, "o.onnx"} if exported else {line.output}
    after = contents(folder_of_all)
    assert {name for name, held in before.items() if after.get(name) != held} <= named


@pytest.mark.parametrize("line", LINES, ids=str)
def test_each_of_these_lines_goes_well_by_itself(bntool: Shell, folder_of_all: Path, line: Line) -> None:
    """Without which the matrix would show nothing."""
    before = contents(folder_of_all)
    said = bntool(*line.words, "-o", line.output)
    assert said.code == 0, said
    after = contents(folder_of_all)
    assert line.output in after
    assert before.items() <= after.items()
    for _ in range(2):  # the data of an ONNX file goes from one name to another and back
        again = bntool(*line.words, "-o", line.output, "--force")
        assert again.code == 0, again
        assert len(contents(folder_of_all)) == len(after)
    assert contents(folder_of_all) == after


def test_a_file_of_the_data_folder_is_no_output(bntool: Shell, folder_of_all: Path) -> None:
    for name in ("a", "b"):
        Path("photos", name).mkdir(parents=True)
        for number in range(4):
            from PIL import Image

            Image.new("RGB", (12, 12), (60 * number, 0, 0)).save(f"photos/{name}/{number}.png")
    before = contents(folder_of_all)
    said = bntool("calibrate", "norm.pt", "--data", "photos", *nets.INPUT, "-o", "photos/a/1.png", "--force")
    assert said.code == 2
    assert "photos, which is read" in said.err
    assert contents(folder_of_all) == before
    assert bntool("calibrate", "norm.pt", "--data", "photos", *nets.INPUT, "-o", "photos/new.pt").code == 0


def test_two_outputs_are_never_one_file(bntool: Shell, folder_of_all: Path) -> None:
    Path("o.html").symlink_to("o.pt")
    for force in ([], ["--force"]):
        said = bntool("fold", "norm.pt", *nets.INPUT, "-o", "o.pt", "--report", "o.html", *force)
        assert said.code == 2
        assert "written twice" in said.err


def test_a_folder_that_is_no_comparison_is_left_alone(bntool: Shell, folder_of_all: Path) -> None:
    Path("runs_of_mine", "runs").mkdir(parents=True)
    Path("runs_of_mine", "settings.json").write_text('{"epochs": 3}')
    Path("runs_of_mine", "runs", "best.pt").write_bytes(b"precious")
    before = contents(folder_of_all)
    line = ("compare", "norm.pt", "--data", "data.npy", "-o", "runs_of_mine", "--epochs", "1", *nets.INPUT)
    for force in ([], ["--force"]):
        assert bntool(*line, *force).code in (2, 3)
        assert contents(folder_of_all) == before


def test_a_disk_that_fills_between_model_and_side_file_leaves_neither(
    bntool: Shell, folder_of_all: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(draft: Path, text: str) -> None:
        draft.write_text(text[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bntool.files.sidecar.write_text", full)
    before = contents(folder_of_all)
    said = bntool("fold", "norm.pt", *nets.INPUT, "-o", "o.pt")
    assert said.code == 2
    assert "cannot write" in said.err
    assert "No space left on device" in said.err
    assert contents(folder_of_all) == before


def test_a_later_file_that_cannot_be_placed_takes_the_earlier_back(
    bntool: Shell, folder_of_all: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bntool("fold", "norm.pt", *nets.INPUT, "-o", "o.pt", "--export", "onnx").code == 0
    before = contents(folder_of_all)
    for victim in ("o.onnx", "o.pt", "o.pt.bntool.json"):

        def failing(draft: Path, path: Path, *, replace: bool, victim: str = victim) -> Placed:
            if path == folder_of_all / victim:
                raise OSError(5, "Input/output error")
            return place(draft, path, replace=replace)

        monkeypatch.setattr("bntool.files.drafting.place", failing)
        line = ("fold", "norm.pt", *nets.INPUT, "-o", "o.pt", "--export", "onnx", "--exclude", "4", "--force")
        said = bntool(*line)
        assert said.code == 2, said
        assert "Input/output error" in said.err
        assert contents(folder_of_all) == before
