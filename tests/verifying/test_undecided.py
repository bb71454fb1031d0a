"""Outputs that do not answer to the inputs prove nothing: the verdict is `undecided`, for every kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bntool
from bntool.cli import run
from bntool.core.tolerances import Limit, Tolerance
from bntool.core.verdicts import nothing_shown
from bntool.verifying.comparing import compare


def _net(kind: str) -> nn.Module:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())
    body[1].running_mean.normal_()
    body[1].bias.data.normal_()
    head = nn.Conv2d(4, 5, 1)
    if kind in ("zero", "constant"):
        head.weight.data.zero_()
    if kind == "zero":
        head.bias.data.zero_()
    if kind == "dead":
        body[3].weight.data.zero_()
        body[3].bias.data.fill_(-1)
    return nn.Sequential(nn.Sequential(body, head)).eval()


KINDS = ("zero", "constant", "dead")


def _compared(outputs: list[Tensor], *, noise: float = 1e-7, **more: Any) -> Any:
    runs = [{"y": tensor} for tensor in outputs]
    how: dict[str, Any] = {"stage": "verify", "device": "cpu", "provider": "torch"}
    return compare(runs, runs, {"y": Limit(noise, 8 * noise, **more)}, **how)


def test_a_row_is_undecided_where_no_output_answers() -> None:
    row = torch.rand(1, 5)
    for outputs in ([torch.zeros(2, 5)], [torch.full((1, 5), 3.0)], [row, row.repeat(2, 1)]):
        check = _compared(outputs)
        assert (check.verdict, check.passed, check.agrees) == ("undecided", False, True)
        assert "which proves nothing" in check.detail
        assert nothing_shown([check]) is check
    # what moves by less than the model's own rounding is no answer
    assert _compared([row, row * (1 + 1e-8)]).verdict == "undecided"
    assert _compared([row, row * (1 + 1e-6)]).verdict == "passed"
    # one sample tells nothing of others
    assert _compared([row]).verdict == "passed"


def test_one_output_that_answers_is_enough_and_one_that_differs_is_a_failure() -> None:
    ours = [{"y": torch.zeros(2, 5), "z": torch.rand(2, 5)}]
    limits = {"y": Limit(1e-7, 1e-6), "z": Limit(1e-7, 1e-6)}
    how: dict[str, Any] = {"stage": "verify", "device": "cpu", "provider": "torch"}
    assert compare(ours, ours, limits, **how).verdict == "passed"
    theirs = [{"y": torch.ones(2, 5), "z": ours[0]["z"]}]
    assert compare(ours, theirs, limits, **how).verdict == "failed"


def test_what_rounding_decides_is_undecided_and_does_not_agree() -> None:
    ours, theirs = [{"y": torch.rand(2, 5)}], [{"y": torch.rand(2, 5)}]
    how: dict[str, Any] = {"stage": "verify", "device": "cpu", "provider": "torch"}
    row = compare(ours, theirs, {"y": Limit(1e-3, 1e-2, "rounding decides it")}, **how)
    assert (row.verdict, row.agrees, row.undecided) == ("undecided", False, "y: rounding decides it")
    row = compare(
        ours, theirs, {"y": Limit(1e-3, 1e-2, "rounding decides it")}, tolerance=Tolerance(atol=1e-3), **how
    )
    assert row.verdict == "failed"  # the user has set a limit


@pytest.mark.parametrize("kind", KINDS)
def test_functions_say_undecided(kind: str) -> None:
    model, x = _net(kind), torch.rand(2, 3, 12, 12)
    folded = bntool.fold(model, x)
    assert folded.status == "undecided"
    assert {check.verdict for check in folded.checks} == {"undecided"}
    assert not bntool.verify(model, folded.model, x)
    inserted = bntool.insert(model, x)
    assert inserted.status == "undecided"


def _as_file(kind: str, model: nn.Module, path: Path) -> str:
    x = torch.rand(2, 3, 12, 12)
    if kind == "module":
        torch.save(model, path / "m.pt")
        return "m.pt"
    if kind == "program":
        torch.export.save(torch.export.export(model, (x,)), path / "m.pt2")
        return "m.pt2"
    if kind == "script":
        torch.jit.script(model).save(str(path / "m.pt"))
        return "m.pt"
    bntool.export_onnx(model, x, path / "m.onnx")
    return "m.onnx"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["module", "program", "script", "onnx"])
def test_the_command_line_ends_with_a_code_of_its_own(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    name = _as_file(kind, _net("zero"), tmp_path)
    new = f"new{Path(name).suffix}"
    call: Callable[..., int] = lambda *words: run([*words, "--json"])  # noqa: E731
    shape = [] if kind in ("onnx", "program") else ["--input", "1x3x12x12"]
    assert call("fold", name, "-o", new, *shape) == 10
    document = json.loads(capsys.readouterr().out)
    assert document["status"] == "undecided"
    assert document["bn_folded"] == 1
    assert all(check["undecided"] and not check["passed"] for check in document["checks"])
    assert f"bntool verify {name} {new} --inputs FILE" in document["error"]["next"]
    assert Path(new).exists()
    if kind == "script":  # which is only folded
        return
    assert call("verify", name, new, *shape) == 10
    assert json.loads(capsys.readouterr().out)["status"] == "undecided"
    if kind != "onnx":
        assert call("export", name, "-o", "x.onnx", *shape) == 10
        assert json.loads(capsys.readouterr().out)["status"] == "undecided"
    if kind == "program":
        return
    assert call("insert", new, "-o", f"i{Path(name).suffix}", *shape) == 10
    assert json.loads(capsys.readouterr().out)["status"] == "undecided"


def test_real_inputs_are_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU()).eval()
    model[0].weight.data.fill_(1.0)
    model[0].bias.data.fill_(-90.0)  # answers to bright images alone
    torch.save(model, "m.pt")
    assert run(["fold", "m.pt", "-o", "n.pt", "--input", "1x1x8x8"]) == 10
    np.save("real.npy", np.random.default_rng(0).uniform(20, 60, (4, 1, 8, 8)).astype(np.float32))
    assert run(["verify", "m.pt", "n.pt", "--inputs", "real.npy"]) == 0


def test_a_head_that_starts_at_zero_is_folded_and_the_way_out_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(_net("zero"), "m.pt")
    assert run(["fold", "m.pt", "-o", "n.pt", "--input", "1x3x12x12"]) == 10
    told = " ".join(capsys.readouterr().err.split())
    assert "nothing was shown" in told
    assert "one whose head is zero answers once it is trained" in told
    trained = _net("zero")
    nn.init.normal_(trained[0][1].weight)
    torch.save(trained, "trained.pt")
    assert run(["fold", "trained.pt", "-o", "n2.pt", "--input", "1x3x12x12"]) == 0
    old, new = (bntool.load(name).model.state_dict() for name in ("n.pt", "n2.pt"))
    assert all(torch.equal(old[key], new[key]) for key in old if not key.startswith("0.1."))
