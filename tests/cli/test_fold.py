from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bntool.pipeline import bisecting
from bntool.subjects import module_folding, proving
from bntool.surgery import fold_modules
from tests.cli import nets
from tests.cli.conftest import Said, Shell, contents


def test_the_document(bntool: Shell) -> None:
    nets.save(nets.normalised(), "model.pt")
    said = bntool("fold", "model.pt", *nets.INPUT, "--export", "onnx", "--json")
    document = said.document
    assert (said.code, said.err, document["status"]) == (0, "", "ok")
    assert (document["output"], document["onnx"]) == ("model_folded.pt", "model_folded.onnx")
    assert Path("model_folded.onnx").stat().st_size > 0
    assert (document["bn_total"], document["bn_folded"], document["skips"]) == (2, 2, [])
    assert [(site["bn"], site["into"]) for site in document["sites"]] == [("1", ["0"]), ("4", ["3"])]
    assert all(site["laws"] for site in document["sites"])
    keys = {"stage", "device", "provider", "passed", "max_abs", "relative", "noise_floor", "ratio"}
    assert all(keys <= set(check) for check in document["checks"])
    stages = [(check["stage"], check["precision"]) for check in document["checks"]]
    assert stages == [("fold", ""), ("fold", "float64"), ("export", ""), ("runtime", "")]
    assert all(check["passed"] and check["device"] for check in document["checks"])


def test_the_delta_is_a_recount_of_the_files(bntool: Shell) -> None:
    nets.save(nets.normalised(), "model.pt")
    delta = bntool("fold", "model.pt", *nets.INPUT, "--json").document["parameters"]["delta"]
    before, after = nets.counted("model.pt"), nets.counted("model_folded.pt")
    assert (delta["trainable"], delta["buffers"]) == (after[0] - before[0], after[1] - before[1])
    # The first convolution had no bias: it gets one of four values.
    assert delta["conv_bias"] == 4


def test_what_is_kept_has_a_reason(bntool: Shell, refused: Shell) -> None:
    nets.save(nets.partly_foldable(), "model.pt")
    refused("fold", "model.pt", "--require-all", code=4, says="bntool explain ")
    document = refused("fold", "model.pt", "--require-all", "--json", code=4).document
    assert document["status"] == "nothing-to-do"
    assert [skip["bn"] for skip in document["skips"]] == ["3"]
    said = bntool("fold", "model.pt")
    assert said.code == 0
    assert "kept 1 " in said.out
    assert "1 of 2 BatchNorm layers folded" in said.out


def test_what_float16_cannot_hold_is_folded_in_float32_on_request(bntool: Shell, refused: Shell) -> None:
    model = nets.normalised()[:2].half()
    with torch.no_grad():
        model[0].weight.fill_(10.0)
        model[1].weight.fill_(6e4)
        model[1].running_var.fill_(100.0 * 100.0)
        model[1].weight[0] = 6.5e4
        model[1].running_var[0] = 1.0
    nets.save(model, "model.pt")
    said = refused("fold", "model.pt", *nets.INPUT, code=4, says="bntool explain overflow")
    assert "reaches" in said.out
    assert not Path("model_folded.pt").exists()
    document = bntool("fold", "model.pt", *nets.INPUT, "--dtype", "float32", "--json").document
    assert (document["bn_folded"], document["skips"]) == (1, [])
    assert all(check["passed"] for check in document["checks"])
    folded = torch.load("model_folded.pt", weights_only=False)
    assert {p.dtype for p in folded.parameters()} == {torch.float32}
    assert float(folded[0].weight.detach().abs().max()) > 65504
    assert {p.dtype for p in torch.load("model.pt", weights_only=False).parameters()} == {torch.float16}


def test_a_graph_keeps_its_types(bntool: Shell, refused: Shell) -> None:
    nets.save(nets.normalised(), "model.pt")
    assert bntool("export", "model.pt", *nets.INPUT).code == 0
    refused("fold", "model.onnx", "--dtype", "float32", code=2, says="--dtype")
    torch.export.save(torch.export.export(nets.normalised(), (torch.randn(1, 3, 12, 12),)), "model.pt2")
    refused("fold", "model.pt2", "--dtype", "float32", code=2, says="--dtype")
    assert not Path("model_folded.pt2").exists()


def test_twice_in_a_row_there_is_nothing_left(bntool: Shell, refused: Shell) -> None:
    nets.save(nets.normalised(), "model.pt")
    assert bntool("fold", "model.pt", *nets.INPUT).code == 0
    refused("fold", code=4, says="the model has no BatchNorm")
    assert bntool("fold", "--json").document["status"] == "nothing-to-do"


def test_a_model_without_batchnorm(refused: Shell) -> None:
    nets.save(nets.plain(), "model.pt")
    refused("fold", "model.pt", code=4, says="bntool export model.pt")


def test_patterns_that_leave_everything_out(refused: Shell) -> None:
    nets.save(nets.normalised(), "model.pt")
    refused("fold", "model.pt", "--include", "features.*", code=4, says="leave out all 2")


@pytest.mark.parametrize(
    ("index", "channel", "value"), [(1, 2, float("nan")), (4, 0, -1.0), (1, 3, float("inf"))]
)
def test_bad_statistics_are_named(refused: Shell, index: int, channel: int, value: float) -> None:
    model = nets.normalised()
    model[index].running_var[channel] = value
    nets.save(model, "model.pt")
    for form in ([], ["--json"]):
        said = refused("fold", "model.pt", "--export", "onnx", *form, code=7, says=f"BatchNorm {index} ")
        assert f"channel {channel}" in (said.err or said.out)
    assert refused("fold", "model.pt", "--json", code=7).document["status"] == "bad-state"


def test_bad_statistics_can_be_left_out(bntool: Shell) -> None:
    model = nets.normalised()
    model[4].running_var[0] = float("nan")
    nets.save(model, "model.pt")
    said = bntool("fold", "model.pt", "--exclude", "4", "--check", "none", "--json")
    assert said.code == 0
    assert said.document["bn_folded"] == 1


def test_an_output_of_nothing_but_nan_proves_nothing(refused: Shell) -> None:
    model = nets.normalised()
    nn.init.constant_(model[0].weight, float("nan"))
    nets.save(model, "model.pt")
    refused("fold", "model.pt", *nets.INPUT, code=7, says="NaN")
    broken = nets.plain()
    nn.init.constant_(broken[0].weight, float("nan"))
    nets.save(broken, "plain.pt")
    refused("insert", "plain.pt", *nets.INPUT, code=7, says="NaN")
    refused("export", "plain.pt", *nets.INPUT, code=7, says="NaN")


def _corrupt(monkeypatch: pytest.MonkeyPatch, layer: str) -> None:
    """From here on every fold has one weight of `layer` wrong."""
    honest = fold_modules.apply_exactly

    def apply_exactly(model: nn.Module, plan: Any, **how: Any) -> Any:
        folded, numbers = honest(model, plan, **how)
        if any(site.bn == layer for site in plan.fold_sites):
            target = folded.get_submodule(next(s for s in plan.fold_sites if s.bn == layer).into[0])
            target.weight = nn.Parameter(target.weight.detach() * 1.01)
        return folded, numbers

    for user in (fold_modules, module_folding, proving):
        monkeypatch.setattr(user, "apply_exactly", apply_exactly)


@pytest.mark.parametrize("layer", ["1", "4"])
def test_a_fold_that_comes_out_wrong_is_not_done(
    bntool: Shell, monkeypatch: pytest.MonkeyPatch, layer: str
) -> None:
    nets.save(nets.normalised(), "model.pt")
    _corrupt(monkeypatch, layer)
    document = bntool("fold", "model.pt", *nets.INPUT, "--json").document
    assert [(skip["bn"], skip["reason"]) for skip in document["skips"]] == [(layer, "not-proved")]
    assert "differs from the original" in document["skips"][0]["detail"]
    assert document["bn_folded"] == 1
    assert all(check["passed"] for check in document["checks"])


def test_a_fold_that_nothing_can_prove_is_a_failed_check(
    refused: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    nets.save(nets.normalised(), "model.pt")
    _corrupt(monkeypatch, "1")
    monkeypatch.setattr(bisecting, "first_at_fault", lambda *_: "")
    for form in ([], ["--json"]):
        words = ["fold", "model.pt", *nets.INPUT, "--export", "onnx", *form]
        refused(*words, code=1, says="differs from the original")


def test_a_dry_run_writes_nothing_and_remembers_nothing(bntool: Shell, folder: Path) -> None:
    nets.save(nets.normalised(), "model.pt")
    before = contents(folder.parent)
    document = bntool("fold", "model.pt", "--dry-run", "--export", "onnx", "--json").document
    assert (document["output"], document["onnx"], document["dry_run"]) == (None, None, True)
    assert document["checks"]
    assert contents(folder.parent) == before


def test_no_check_is_said(bntool: Shell) -> None:
    nets.save(nets.normalised(), "model.pt")
    said = bntool("fold", "model.pt", "--check", "none", "-o", "a.pt")
    assert "not verified (--check none)" in said.out
    assert "nothing was verified" in said.out
    document = bntool("fold", "model.pt", "--check", "none", "-o", "b.pt", "--json").document
    assert document["checks"] == []
    assert "not verified (--check none)" in document["notes"]


def test_the_fast_check_is_one_input(bntool: Shell) -> None:
    nets.save(nets.normalised(), "model.pt")
    document = bntool("fold", "model.pt", "--check", "fast", *nets.INPUT, "--json").document
    assert {check["batches"] for check in document["checks"]} == {1}


def test_the_folded_model_computes_the_same(bntool: Shell) -> None:
    nets.save(nets.normalised(), "model.pt")
    assert bntool("fold", "model.pt", *nets.INPUT).code == 0
    images = torch.randn(4, 3, 12, 12, dtype=torch.float64)
    folded = torch.load("model_folded.pt", weights_only=False)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    with torch.no_grad():
        before, after = nets.normalised().double()(images), folded.double()(images)
    # Folded weights are rounded once to float32: at most eps/2 of each of the 27 + 36 terms of an output,
    # which the second layer's weights (all below 1 in sum of squares) do not enlarge.
    assert float((before - after).abs().max() / before.abs().max()) < 64 * torch.finfo(torch.float32).eps


def test_the_double_ending_of_a_checkpoint_is_kept(bntool: Shell) -> None:
    nets.save(nets.normalised(), "best.pth.tar")
    document = bntool("fold", "best.pth.tar", *nets.INPUT, "--export", "onnx", "--json").document
    assert (document["output"], document["onnx"]) == ("best_folded.pth.tar", "best_folded.onnx")


def test_cuda_that_is_not_there(refused: Callable[..., Said]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    nets.save(nets.normalised(), "model.pt")
    for words in (["fold", "--export", "onnx"], ["fold"], ["fold", "--check", "none"], ["export"]):
        said = refused(
            words[0], "model.pt", *words[1:], "--device", "cuda", code=5, says="CUDA was asked for"
        )
        where = said.err.splitlines()[1]
        assert "lib" in where or "without CUDA" in where
        assert said.out == ""
    document = refused("fold", "model.pt", "--device", "cuda", "--json", code=5).document
    assert document["status"] == "device-unavailable"


def test_auto_says_that_it_used_the_cpu(bntool: Shell) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    nets.save(nets.normalised(), "model.pt")
    checks = bntool("fold", "model.pt", *nets.INPUT, "--export", "onnx", "--json").document["checks"]
    served = [check for check in checks if check["stage"] in ("export", "runtime")]
    assert {check["provider"] for check in served} == {"CPUExecutionProvider"}
    assert all(check["detail"].startswith("CPU used: ") for check in served)


def test_a_model_that_cannot_be_pickled_gives_its_file_and_its_weights(bntool: Shell) -> None:
    """A parametrized layer: torch saves such a model only as a state_dict."""
    Path("net.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3))\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), normed).eval()\n"
    )
    said = bntool("fold", "net.py:make", "--input", "1x3x9x9", "--export", "onnx")
    assert said.code == 0
    assert "make_folded.pt holds the state_dict and loads with --arch net.py:make" in said.out
    assert Path("make_folded.onnx").is_file()
    held = torch.load("make_folded.pt")
    assert "0.bias" in held
    assert not any(key.startswith("1.") for key in held)
    assert bntool("verify", "make_folded.onnx", "make_folded.pt", "--arch", "net.py:make").code == 0
