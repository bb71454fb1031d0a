"""`--json`: one document for each command, with the same keys for every kind of model and every outcome."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

import bntool
from bntool.core.documents import DOCUMENTS, SCHEMA_VERSION, schema
from tests.cli import nets
from tests.cli.conftest import Shell

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("m.pt", "m.pt2", "m.onnx", "s.pt")
OUTCOMES = {
    "fold": ("done", ("fold", "{}", "--force")),
    "fold, dry": ("done", ("fold", "{}", "--dry-run")),
    "fold, nothing to do": ("none", ("fold", "{}")),
    "fold, unknown option": ("done", ("fold", "{}", "--every", "2")),
    "insert": ("bare", ("insert", "{}", "--force")),
    "insert, dry": ("bare", ("insert", "{}", "--dry-run")),
    "insert, nothing to do": ("none", ("insert", "{}")),
    "summary": ("done", ("summary", "{}")),
    "export": ("done", ("export", "{}", "-o", "e.onnx", "--force")),
    "inspect": ("done", ("inspect", "{}")),
    "calibrate": ("done", ("calibrate", "{}", "--data", "x.npy", "--force")),
    "verify": ("done", ("verify", "{}", "same {}")),
    "bench": ("done", ("bench", "{}", "{}", "--rounds", "11", "--batch-sizes", "2")),
    "missing": ("done", ("fold", "no such file.pt")),
}
MODELS = {
    "done": nets.normalised,
    "none": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.BatchNorm2d(8), nn.Tanh()),
    "bare": nets.plain,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each model as each kind of file, and data for them."""
    root = tmp_path_factory.mktemp("models")
    for name, make in MODELS.items():
        folder = root / name
        folder.mkdir()
        model: Any = make().eval()
        shape = [int(n) for n in nets.INPUT[1].split("x")[1:]] if name != "none" else [3, 12, 12]
        x = torch.randn(2, *shape)
        torch.save(model, folder / "m.pt")
        torch.export.save(torch.export.export(model, (x,)), folder / "m.pt2")
        bntool.export_onnx(model, x, folder / "m.onnx")
        torch.jit.save(torch.jit.trace(model, x), folder / "s.pt")
        for kind in KINDS:
            shutil.copyfile(folder / kind, folder / f"same {kind}")
        np.save(folder / "x.npy", torch.randn(8, *shape).numpy())
    return root


@pytest.fixture
def models(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy, in which a command is typed."""
    shutil.copytree(made, tmp_path / "models")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "models"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("outcome", OUTCOMES)
def test_the_same_keys_for_every_kind(
    bntool: Shell, models: Path, outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, words = OUTCOMES[outcome]
    monkeypatch.chdir(models / folder)
    command = words[0]
    keys = set(msgspec.structs.asdict(DOCUMENTS[command]()))
    for kind in KINDS:
        shape = ("--input", "2x3x12x12") if kind == "s.pt" and command in ("fold", "export") else ()
        said = bntool(*(word.format(kind) for word in words), *shape, "--json")
        document = json.loads(said.out)
        assert set(document) == keys, (kind, said.err)
        found = msgspec.convert(document, DOCUMENTS[command])
        assert found.schema_version == SCHEMA_VERSION
        assert found.command == command
        assert (said.code == 0) == (found.error is None) == (found.status == "ok")


def test_the_published_schema_is_that_of_the_documents() -> None:
    published = json.loads((ROOT / "docs" / "reference" / "schema.json").read_text(encoding="utf-8"))
    assert published == schema(), "python tools/docs/make_reference.py writes it anew"
