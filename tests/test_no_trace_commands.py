"""No command changes the model that it is given: neither the file nor the object that is loaded."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bntool import cli
from bntool.cli import run
from tests import trace_zoo
from tests.test_no_trace import around, made, picture

NAMES = (
    "CacheBySize",
    "CountingBuffer",
    "DrawsOfPython",
    "GlobalList",
    "hook_over_a_list",
    "InitialisesItself",
    "merges_in_eval",
    "WritesAWeight",
    "WritesToItsInput",
)
SIZE = ("--input", "1x3x8x8")
COMMANDS: dict[str, tuple[str, ...]] = {
    "summary": ("summary", "MODEL", *SIZE),
    "fold": ("fold", "MODEL", "-o", "new.pt", "--force", *SIZE),
    "fold and export": ("fold", "MODEL", "-o", "new.pt", "--force", "--export", "onnx", *SIZE),
    "fold, nothing written": ("fold", "MODEL", "--dry-run", *SIZE),
    "insert": ("insert", "MODEL", "-o", "new.pt", "--force", *SIZE),
    "export": ("export", "MODEL", "-o", "new.onnx", "--force", *SIZE),
    "verify": ("verify", "MODEL", "OTHER", *SIZE),
    "calibrate": ("calibrate", "MODEL", "--data", "data.pt", "-o", "new.pt", "--force"),
    "bench": ("bench", "MODEL", "OTHER", "--rounds", "11", "--batch-sizes", "1", *SIZE),
    "inspect": ("inspect", "MODEL"),
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    torch.save(torch.rand(4, 3, 8, 8), "data.pt")
    return tmp_path


def _run(command: str, model: str, other: str) -> int:
    words = [{"MODEL": model, "OTHER": other}.get(word, word) for word in COMMANDS[command]]
    takes_sizes = not model.endswith((".pt2", ".onnx"))
    return run([word for word in words if takes_sizes or word not in SIZE])


def _left(*models: nn.Module) -> Any:
    """What the models and the zoo's globals hold; the random numbers of a command are its own."""
    return [*map(picture, models), around()[0]]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("place")
def test_the_object_that_is_loaded_stays_as_it_was(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = made(name, training=False), made(name, training=False)
    monkeypatch.setattr(trace_zoo, "given", model, raising=False)
    monkeypatch.setattr(trace_zoo, "other", other, raising=False)
    costly = name not in ("CountingBuffer", "InitialisesItself")
    for command in COMMANDS:
        if command == "inspect" or (costly and command in ("bench", "export", "fold and export")):
            continue
        before = _left(model, other)
        code = _run(command, "tests.trace_zoo:given", "tests.trace_zoo:other")
        # it may be kept, not be exported, or not be written since it is not to be pickled
        assert code in ((0, 1, 2, 4, 6) if name == "hook_over_a_list" else (0, 1, 4, 6)), command
        assert _left(model, other) == before, f"{command} changed what it was given"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["CountingBuffer", "GlobalList", "InitialisesItself", "WritesToItsInput"])
def test_what_two_trainings_are_given_stays_as_it_was(
    name: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bntool.experiment.plots.write_plots", lambda found, folder: [])
    x, y = np.random.default_rng(0).random((8, 3, 8, 8), np.float32), np.arange(8) % 4
    np.savez(place / "d.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    data = (place / "d.npz").read_bytes()
    head = (nn.Conv2d(4, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(made(name, training=False), *head)
    monkeypatch.setattr(trace_zoo, "given", model, raising=False)
    before = _left(model)
    words = ("compare", "tests.trace_zoo:given", "--data", "d.npz", "--epochs", "1", "--batch-size", "4")
    assert run(words) == 0
    assert _left(model) == before
    assert (place / "d.npz").read_bytes() == data


def test_every_command_that_runs_a_model_is_held_to_it() -> None:
    run_none = {"completion", "demo", "doctor", "explain", "report"}
    assert {words[0] for words in COMMANDS.values()} | {"compare"} | run_none == set(cli._COMMANDS)


def _saved(kind: str, model: nn.Module) -> str:
    x = torch.rand(2, 3, 8, 8)
    if kind == "module":
        torch.save(model, "m.pt")
    elif kind == "script":
        torch.jit.script(model).save("m.pt")
    elif kind == "program":
        torch.export.save(torch.export.export(model, (x,)), "m.pt2")
    else:
        import bntool

        bntool.export_onnx(model, x, "m.onnx")
    return {"program": "m.pt2", "onnx": "m.onnx"}.get(kind, "m.pt")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["module", "program", "script", "onnx"])
def test_the_file_stays_as_it_was(kind: str, place: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    name = _saved(kind, model)
    (place / "other").write_bytes(Path(name).read_bytes())
    other = f"other{Path(name).suffix}"
    (place / "other").rename(other)

    def content() -> Any:
        files = (Path(name), Path(other))
        return [
            (hashlib.sha256(f.read_bytes()).hexdigest(), f.stat().st_mtime_ns, f.stat().st_ino) for f in files
        ]

    before, done = content(), 0
    for command in COMMANDS:
        if command in ("bench", "fold and export", "calibrate"):
            continue
        done += _run(command, name, other) == 0
        assert content() == before, f"{command} changed the file"
    assert done >= 2
