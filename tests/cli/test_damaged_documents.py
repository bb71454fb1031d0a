"""Documents that commands read back, damaged: one error, with the place, and the documented exit code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from bntool.core.errors import LoadError
from bntool.experiment.folder import open_folder
from tests.cli import nets
from tests.cli.conftest import Shell

torchvision = pytest.importorskip("torchvision")
SIDE = Path("f.safetensors.bntool.json")


@pytest.fixture
def folded(bntool: Shell) -> dict[str, Any]:
    """A file of weights whose side file says how its architecture is to be folded."""
    save_file(torchvision.models.resnet18(num_classes=1000).state_dict(), "r.safetensors")
    line = ["fold", "r.safetensors", "--arch", "torchvision:resnet18", "--input", "1x3x32x32"]
    assert bntool(*line, "-o", "f.safetensors", "--check", "none").code == 0
    assert bntool("summary", "f.safetensors").code == 0
    document: dict[str, Any] = json.loads(SIDE.read_text())
    return document


def test_a_side_file_that_names_what_is_not_there(refused: Shell, folded: dict[str, Any]) -> None:
    whole = json.dumps(folded)
    damages: dict[str, Callable[[dict[str, Any]], Any]] = {
        "edits[0].weight": lambda edit: edit.update(weight="no.such.weight"),
        "edits[0].map": lambda edit: edit.update(map=["embed", ["bn", "bn1"], 0, 10**13, 0, 1, 1]),
        "edits[0].kind": lambda edit: edit.update(kind="call"),
    }
    for place, damage in damages.items():
        document = json.loads(whole)
        damage(document["plan"]["sites"][0]["edits"][0])
        SIDE.write_text(json.dumps(document))
        said = refused("summary", "f.safetensors", code=3, says="f.safetensors.bntool.json is damaged")
        assert f"plan.sites[0].{place}" in said.err
    SIDE.write_text(whole.replace('"signature": {', '"signature": {"more": [1], ', 1))
    said = refused("summary", "f.safetensors", code=3, says="it has no tensor 'more'")
    assert SIDE.name in said.err
    SIDE.write_text(whole.replace('"plan": {"schema_version": 1', '"plan": {"schema_version": 99', 1))
    assert "pip install --upgrade bntool" in refused("summary", "f.safetensors", code=3, says="99").err
    SIDE.write_text("{")
    refused("summary", "f.safetensors", code=3, says="is damaged: it is not JSON")


def test_a_damaged_plan_file(bntool: Shell, refused: Shell) -> None:
    nets.save(nets.plain(), "model.pt")
    assert bntool("insert", "model.pt", "-o", "two.pt").code == 0
    document = json.loads(Path("two.pt.bntool.json").read_text())
    document["plan"]["sites"][0]["channels"] = -1
    Path("plan.json").write_text(json.dumps(document))
    said = refused("insert", "model.pt", "--plan", "plan.json", "-o", "x.pt", code=3, says="plan is damaged")
    assert "plan.json, plan.sites[0].channels" in said.err
    Path("plan.json").write_text("[" * 100_000)
    refused("insert", "model.pt", "--plan", "plan.json", "-o", "x.pt", code=3, says="nested too deeply")
    assert not Path("x.pt").exists()


@pytest.mark.parametrize(
    ("name", "text", "place"),
    [
        ("sites.json", '["0", 1]', "[1]"),
        ("sites.json", '{"sites": ["0", {}]}', "sites[1]"),
        ("sites.json", "{}", "sites"),
        ("sites.json", "[]", ""),
        ("sites.json", "[" * 100_000, ""),
        ("sites.toml", 'sites = ["0", 1]', "sites[1]"),
        ("sites.toml", "sites = [" + "[" * 100_000, ""),
        ("sites.toml", "sites = 3 = 4", ""),
    ],
    ids=str,
)
def test_a_damaged_list_of_sites(refused: Shell, name: str, text: str, place: str) -> None:
    nets.save(nets.plain(), "model.pt")
    Path(name).write_text(text)
    said = refused("insert", "model.pt", "--sites", name, code=2, says="list of")
    assert (f"{name}, {place}" if place else name) in said.err


def test_a_damaged_comparison_folder_is_told() -> None:
    folder = Path("runs_of_mine")
    open_folder(folder, {"epochs": 1, "lr": [0.1]}, force=False)
    open_folder(folder, {"epochs": 1, "lr": [0.1]}, force=False)
    for text, place in (("{", ""), ('{"epochs": {}}', "[...]"), ("[1]", "")):
        (folder / "settings.json").write_text(text)
        for force in (False, True):  # it may be somebody else's
            with pytest.raises(LoadError, match=r"settings\.json is damaged") as caught:
                open_folder(folder, {"epochs": 1}, force=force)
            assert place in caught.value.where
        assert (folder / "settings.json").read_text() == text
