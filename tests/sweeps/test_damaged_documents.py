"""A sample of the damages to side files, and that the fuzzer would notice what it looks for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bntool
from bntool.core.errors import DamagedPlan
from bntool.core.plan import Plan
from tools.sweeps import fuzz_documents
from tools.sweeps.fuzz_documents import Subject, X, damage_documents, replayed, subjects


def test_a_damaged_side_file_is_replayed_or_refused_with_its_place(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert damage_documents(120) == 0
    said = capsys.readouterr().out
    assert said.count("'refused'") == said.count("'replayed'") + said.count("file  ") == 6


@pytest.fixture
def fold(tmp_path: Path) -> Subject:
    return next(subjects(tmp_path))


def test_the_fuzzer_notices_a_traceback_and_a_run_that_takes_long(
    tmp_path: Path, fold: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = json.dumps(fold.document)
    assert replayed(text, fold, tmp_path) == "replayed"

    def broken() -> nn.Module:
        raise KeyError("layer")

    assert replayed(text, Subject("broken", fold.document, broken), tmp_path).startswith("FAILED: KeyError")
    monkeypatch.setattr(fuzz_documents, "SECONDS", 0.0)
    assert replayed(text, fold, tmp_path).startswith("FAILED: it took")


def _fold_of(model: nn.Module) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(bntool.plan_fold(model, X).to_json())
    return data


def _applied(model: nn.Module, data: dict[str, Any]) -> DamagedPlan:
    with pytest.raises(DamagedPlan) as caught:
        bntool.apply(model, Plan.from_dict(data), X, check="none")
    return caught.value


def _block() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 1), fuzz_documents.Block()).eval()


@pytest.mark.parametrize(
    "method", ["reparameterize", "fuse", "", "half", "requires_grad_", "__init__", "a.b"]
)
def test_no_method_is_called_but_the_one_that_the_planner_calls(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []
    monkeypatch.setattr(fuzz_documents.Block, "half", lambda self: called.append("half"))
    data = _fold_of(_block())
    (edit,) = (e for s in data["sites"] for e in s["edits"] if e["kind"] == "reparameterize")
    edit["method"] = method
    if method in ("half", "requires_grad_", "__init__", "a.b"):
        with pytest.raises(DamagedPlan) as caught:
            Plan.from_dict(data)
        error = caught.value
    else:
        error = _applied(_block(), data)
    assert error.where == "sites[0].edits[0].method"
    assert not called


def test_a_block_is_merged_once_and_a_method_that_fails_is_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    data = _fold_of(_block())
    data["sites"][0]["edits"] *= 2
    assert _applied(_block(), data).where == "sites[0].edits[1].method"

    def fails(self: nn.Module) -> None:
        raise ZeroDivisionError

    data["sites"][0]["edits"].pop()
    monkeypatch.setattr(fuzz_documents.Block, "switch_to_deploy", fails)
    assert "fails" in str(_applied(_block(), data))


def _two() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1)).eval()


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"weight": "nope.weight"}, "weight"),
        ({"weight": "3.weight"}, "weight"),
        ({"weight": "0.bias"}, "layout"),
        ({"layer": "nope"}, "layer"),
        ({"bias": ""}, "bias"),
        ({"bias": "1.running_mean.x"}, "bias"),
        ({"bias": "0.weight"}, "bias"),
        ({"groups": 2**31}, "groups"),
        ({"layout": "linear"}, "layout"),
        ({"layout": "norm"}, "layer"),
        ({"map": ["bn", "2"]}, "map"),
        ({"map": ["identity", 1]}, "map"),
        ({"map": None}, "map"),
        ({"map": ["concat", 0, [4, 4], ["identity", 1], ["identity", 1], ["identity", 1]]}, "map"),
        ({"kind": "scale_input"}, "map"),
        ({"kind": "remove"}, "layer"),
        ({"kind": "unshare", "weight": "3.weight"}, "weight"),
    ],
)
def test_an_edit_that_the_model_cannot_take_is_told_before_any_is_carried_out(
    change: dict[str, Any], place: str
) -> None:
    model = _two()
    data = _fold_of(model)
    data["sites"][0]["edits"][0] |= change
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert _applied(model, data).where == f"sites[0].edits[0].{place}"
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"conv": "nope"}, "conv"), ({"conv": "1"}, "conv"), ({"channels": 2**31}, "channels"),
        ({"calls": 2**31}, "calls"), ({"dims": 3}, "dims"), ({"form": "node"}, "form"),
        ({"form": "identity", "slot": "0"}, "slot"), ({"form": "identity", "slot": ""}, "slot"),
        ({"form": "wrap", "slot": ""}, "slot"), ({"form": "wrap", "slot": "0"}, "slot"),
        ({"slot": "nope"}, "slot"),
    ],
)  # fmt: skip
def test_a_site_that_the_model_has_not_is_told_without_running_it(change: dict[str, Any], place: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    data = bntool.insert(model, X).plan.to_dict()
    data["sites"][0] |= change
    assert _applied(model, data).where == f"sites[0].{place}"


def test_a_document_of_a_million_sites_is_refused_soon(tmp_path: Path) -> None:
    model = _two()
    data = _fold_of(model)
    site = {**data["sites"][0], "edits": []}
    data["sites"] = [data["sites"][0]] + [site] * 200_000
    assert _applied(model, data).where == "sites[1].bn"
