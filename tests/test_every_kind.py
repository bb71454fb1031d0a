"""One function for one thing, whatever the kind of model; what a kind does not know is one sentence."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import bntool
from bntool.cli import run
from bntool.core.command_options import BenchOptions, LoadOptions
from bntool.core.errors import UsageError
from bntool.core.option import Options
from bntool.core.options import CheckOptions, ExportOptions, FoldOptions, InsertOptions, PlaceOptions
from bntool.core.refusals import KINDS, require_known
from bntool.pipeline.summarising import summarized
from bntool.subjects.base import Checking, Subject
from tests.fold_zoo import enliven

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def _net() -> nn.Module:
    torch.manual_seed(0)
    return enliven(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)).eval())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("kinds")
    model = _net()
    program = torch.export.export(model, (X,))
    torch.save(model, folder / "m.pt")
    torch.export.save(program, folder / "m.pt2")
    bntool.export_onnx(model, X, folder / "m.onnx")
    files = {path.name: path for path in folder.iterdir()}
    return {"module": model, "program": program, **files}


FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "fold": lambda model: bntool.fold(model, (X,)),
    "insert": lambda model: bntool.insert(model, (X,)),
    "plan_fold": lambda model: bntool.plan_fold(model, (X,)),
    "plan_insert": lambda model: bntool.plan_insert(model, (X,)),
    "summary": lambda model: bntool.summary(model, (X,)),
    "verify": lambda model: bntool.verify(model, model, (X,)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_takes_every_kind(models: dict[str, Any], name: str) -> None:
    for kind, model in models.items():
        found = FUNCTIONS[name](model)
        if name not in ("summary", "verify"):
            assert len(found.sites) == 1, kind
        assert found, kind


def _of_any(model: Any, tmp_path: Path) -> dict[str, Callable[[], Any]]:
    """Every public function that takes a model, asked for `model`."""
    plan, out = bntool.plan_fold(_net(), X), tmp_path / "out.onnx"
    return {
        **{name: functools.partial(function, model) for name, function in FUNCTIONS.items()},
        "verify, candidate": lambda: bntool.verify(_net(), model, X),
        "summary, baseline": lambda: bntool.summary(_net(), X, baseline=model),
        "apply": lambda: bntool.apply(model, plan, X),
        "bench": lambda: bntool.bench(model, _net(), example_inputs=X),
        "export_onnx": lambda: bntool.export_onnx(model, X, out),
        "fold_to_onnx": lambda: bntool.fold_to_onnx(model, out, X),
        "load": lambda: bntool.load(model),
        "calibrate": lambda: bntool.calibrate(model, [X]),
        "compare": lambda: bntool.compare(model, [X], epochs=1),
    }


@pytest.mark.parametrize("model", [42, {"a": 1}, nn.Linear, b"m.pt", [_net()], bntool.plan_fold(_net(), X)])
def test_what_is_no_model_is_told_in_one_sentence_by_every_function(model: Any, tmp_path: Path) -> None:
    for name, function in _of_any(model, tmp_path).items():
        with pytest.raises(UsageError) as raised:
            function()
        told = f"the model is of type {type(model).__name__}, of which bntool knows no kind of model"
        assert (raised.value.what, raised.value.exit_code) == (told, 2), name
        assert "pass an nn.Module" in raised.value.next_step


@pytest.mark.parametrize("content", [b"hello", b"", None])
def test_a_path_that_is_no_model_is_told_in_one_sentence_by_every_function(
    content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is text, empty, or a folder."""
    path = tmp_path / "a"
    path.mkdir() if content is None else path.write_bytes(content)
    told: set[tuple[str, int]] = set()
    for name, function in _of_any(path, tmp_path).items():
        if name not in ("calibrate", "compare"):  # which take no path
            with pytest.raises(bntool.LoadError) as raised:
                function()
            told.add((raised.value.what, raised.value.exit_code))
    assert len(told) == 1
    monkeypatch.chdir(tmp_path)
    for command in ("summary", "fold", "insert", "export"):
        assert run([command, "a"]) == 3


def test_a_kind_that_is_not_written_out_refuses_what_it_does_not_do(tmp_path: Path) -> None:
    class Odd(Subject):
        kind: Any = "odd"
        name, model, on_torch = "a.odd", object(), False

    odd = Odd()
    require_known(odd.kind, FoldOptions(bake=True))
    for refused in (
        odd.graph,
        odd.counted,
        lambda: odd.plan_fold(FoldOptions(), thorough=False),
        lambda: odd.folded(bntool.plan_fold(_net(), X)),
        lambda: odd.proof(Checking()),
        lambda: odd.inserted(InsertOptions()),
        lambda: odd.export(tmp_path / "o.onnx", ExportOptions(), {}),
        lambda: summarized(odd),
    ):
        with pytest.raises(UsageError, match=r"a\.odd is of the kind 'odd', and bntool does not"):
            refused()


def test_what_only_a_module_can_do_is_refused_to_a_program(models: dict[str, Any]) -> None:
    for refused in (bntool.calibrate, lambda model, data: bntool.compare(model, data, epochs=1)):
        with pytest.raises(UsageError, match="is an exported program, and bntool does not"):
            refused(models["program"], [X])


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is")
@pytest.mark.parametrize("kind", ["module", "program", "m.pt", "m.pt2", "script"])
def test_every_kind_that_torch_exports_is_written_as_onnx(
    models: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    model = torch.jit.script(models["module"]) if kind == "script" else models[kind]
    path = bntool.export_onnx(model, (X,), tmp_path / "written.onnx")
    assert bntool.verify(models["module"], path, (X,))


def test_an_onnx_file_is_written_in_another_opset(models: dict[str, Any], tmp_path: Path) -> None:
    path = bntool.export_onnx(models["m.onnx"], None, tmp_path / "written.onnx", opset=20)
    assert onnx.load(path).opset_import[0].version == 20
    assert bntool.verify(models["m.onnx"], path)


@pytest.mark.filterwarnings("ignore:.torch.jit")
@pytest.mark.parametrize("how", ["traced", "scripted", "frozen"])
def test_every_function_answers_torchscript_or_refuses_it_in_one_sentence(
    models: dict[str, Any], how: str, tmp_path: Path
) -> None:
    model = models["module"]
    script = torch.jit.trace(model, X) if how == "traced" else torch.jit.script(model)
    script = torch.jit.freeze(script) if how == "frozen" else script
    assert bntool.summary(script, (X,)).layers
    assert bntool.verify(model, script, (X,))
    assert bntool.verify(script, script, (X,))
    bntool.plan_fold(script)
    for refused in (
        lambda: bntool.insert(script, (X,)),
        lambda: bntool.plan_insert(script, (X,)),
        lambda: bntool.apply(script, bntool.plan_fold(model, (X,)), (X,)),
        lambda: bntool.calibrate(script, [X]),
        lambda: bntool.compare(script, [X], epochs=1),
    ):
        with pytest.raises(UsageError, match="is TorchScript, and bntool does not") as raised:
            refused()
        assert "the nn.Module that it was made from" in raised.value.next_step


def test_what_a_kind_cannot_be_exported_as_is_said_and_nothing_is_written(
    models: dict[str, Any], tmp_path: Path
) -> None:
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        ("module", {"keep_io": True}, "--keep-io goes with --dtype"),
        ("module", {"opset": 0}, "opset is 0"),
        ("program", {"dtype": "fp16"}, "--dtype is not for an exported program"),
        ("program", {"dynamic": {"input": (2,)}}, "--dynamic is not for an exported program"),
        ("m.onnx", {}, "is an ONNX file already"),
    ]
    for kind, options, told in wrong:
        with pytest.raises(UsageError, match=told):
            bntool.export_onnx(models[kind], (X,), tmp_path / "w.onnx", **options)
    with pytest.raises(UsageError, match="--dtype is not for an exported program"):
        bntool.fold_to_onnx(models["program"], tmp_path / "w.onnx", export=ExportOptions(dtype="fp16"))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["module", "program", "m.pt", "m.pt2"])
def test_the_whole_way_is_a_function(models: dict[str, Any], kind: str, tmp_path: Path) -> None:
    result = bntool.fold_to_onnx(models[kind], tmp_path / "out.onnx", (X,))
    assert [check.stage for check in result.checks] == ["fold", "fold", "export", "runtime"]
    assert all(check.passed for check in result.checks)
    assert result.export is not None
    assert result.export.path == tmp_path / "out.onnx"
    assert "BatchNormalization" not in result.export.nodes


@pytest.mark.parametrize("kind", ["m.pt", "m.pt2"])
def test_the_whole_way_never_writes_over_what_it_read(models: dict[str, Any], kind: str) -> None:
    before = models[kind].read_bytes()
    with pytest.raises(UsageError, match="is the input itself"):
        bntool.fold_to_onnx(models[kind], models[kind], (X,), force=True)
    assert models[kind].read_bytes() == before


OPTIONS = (
    LoadOptions(arch="x", weights="w", key="k", allow=("a",), pretrained=True, inputs=("1x3",)),
    FoldOptions(include=("a",), exclude=("b",), merge=False, unshare=True),
    InsertOptions(init="default"),
    ExportOptions(opset=17, ir_version=8, static_batch=True, dynamic=("0",), keep_io=True, exporter="legacy"),
    CheckOptions(tf32="both", atol=1.0, rtol=1.0),
    PlaceOptions(device="cuda", providers=("P",)),
    BenchOptions(rounds=11),
)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_kind_does_not_know_is_said_in_one_sentence(kind: str) -> None:
    refused = 0
    for options in OPTIONS:
        for name in options.chosen():
            alone = type(options)(**{name: getattr(options, name)})
            error = _refusal(kind, alone)
            if error is not None:
                refused += 1
                alone_it_may_not = kind == "module" and name == "keep_io"
                assert alone_it_may_not or f" is not for {KINDS[kind]}: " in error.what
                assert error.next_step
                assert error.exit_code == 2
    assert refused >= (0 if kind == "module" else 5)


def _refusal(kind: str, options: Options) -> UsageError | None:
    try:
        require_known(kind, options, name="FILE")
    except UsageError as error:
        return error
    return None


def test_a_fold_with_its_export_plans_and_applies_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The float64 proof too runs what was applied."""
    counts: Counter[str] = Counter()

    def counted(module: str, name: str) -> None:
        found = __import__(module, fromlist=[name])
        used = getattr(found, name)

        def call(*args: Any, **options: Any) -> Any:
            counts[name] += 1
            return used(*args, **options)

        monkeypatch.setattr(found, name, call)

    counted("bntool.subjects.module_folding", "plan_fold")
    counted("bntool.surgery.fold_modules", "apply_edits")
    counted("bntool.cli.session", "Session")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    torch.save(_net(), "m.pt")
    assert run(["fold", "m.pt", "--export", "onnx", "-q"]) == 0
    assert counts == {"plan_fold": 1, "apply_edits": 1, "Session": 1}


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.n, self.o = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return (self.n(self.a(x)) + self.o(self.b(x))).relu()


def test_branches_of_a_program_stay_apart_in_its_file_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    torch.manual_seed(0)
    program = torch.export.export(enliven(Branches().eval()), (torch.randn(2, 4, 8, 8),))
    torch.export.save(program, "m.pt2")
    for options, convolutions in ((["--no-merge"], 2), ([], 1)):
        assert run(["fold", "m.pt2", "--export", "onnx", "-q", "--force", *options]) == 0
        nodes = onnx.load("m_folded.onnx").graph.node
        assert sum(node.op_type == "Conv" for node in nodes) == convolutions


@pytest.mark.parametrize("kind", ["module", "program", "m.pt", "m.pt2", "m.onnx"])
@pytest.mark.parametrize("plan_of", [bntool.plan_fold, bntool.plan_insert])
def test_a_plan_is_replayed_on_its_kind_and_refused_on_another_model(
    models: dict[str, Any], kind: str, plan_of: Callable[..., bntool.Plan], tmp_path: Path
) -> None:
    (tmp_path / "plan.json").write_text(plan_of(models[kind], (X,)).to_json(), encoding="utf-8")
    result = bntool.apply(models[kind], tmp_path / "plan.json", (X,))
    assert [site.bn for site in result.sites] == [site.bn for site in plan_of(models[kind], (X,)).sites]
    assert result.checks
    assert all(check.passed for check in result.checks)
    if kind in ("program", "m.onnx"):
        other: Any = torch.export.export(nn.Sequential(nn.Conv2d(3, 8, 3)).eval(), (X,))
        if kind == "m.onnx":
            other = bntool.export_onnx(other, (X,), tmp_path / "other.onnx")
        with pytest.raises(bntool.PlanError, match="made for another model"):
            bntool.apply(other, tmp_path / "plan.json", (X,))


def test_every_public_name_is_there() -> None:
    for name in bntool.__all__:
        assert getattr(bntool, name) is not None, name
