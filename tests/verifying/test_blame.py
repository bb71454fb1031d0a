from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from bntool import api
from bntool.core.blame import Step, first_fault
from bntool.core.errors import BntoolError, CheckFailed, UsageError
from bntool.graph.inputs import Inputs
from bntool.verifying import blaming
from bntool.verifying.checking import check_surgery, seeded_batches
from bntool.verifying.export_checking import check_onnx
from bntool.verifying.reference import Reference
from bntool.verifying.repro import write_repro
from tests import broken
from tests.exports import export_onnx

IMAGE = Inputs((torch.zeros(1, 3, 12, 12),))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_onnx(broken.network(), IMAGE, tmp_path_factory.mktemp("blame") / "net.onnx").path


def step(name: str, reads: str, gives: str) -> Step:
    return Step(name, "op", tuple(reads.split()), tuple(gives.split()))


def test_the_first_step_that_is_fed_alike_is_blamed():
    steps = [step("a", "x", "p"), step("b", "p", "q"), step("c", "q", "r")]
    assert first_fault(steps, {"p": True, "q": False, "r": False}, ["r"]) == (steps[1], "q")
    assert first_fault(steps, {"p": True, "q": True, "r": True}, ["r"]) is None


def test_a_difference_that_every_reader_undoes_is_no_fault():
    steps = [step("conv", "x", "p"), step("bn", "p", "q"), step("head", "q", "r")]
    assert first_fault(steps, {"p": False, "q": True, "r": False}, ["r"]) == (steps[2], "r")
    assert first_fault(steps, {"p": False, "q": True, "r": True}, ["r"]) is None
    # what the model returns is never undone, nor is what one of two readers goes on with
    assert first_fault(steps, {"p": False, "q": True, "r": True}, ["p", "r"]) == (steps[0], "p")
    both = [*steps, step("other", "p", "s")]
    assert first_fault(both, {"p": False, "q": True, "r": True, "s": False}, ["r", "s"]) == (steps[0], "p")


def test_a_value_without_a_counterpart_is_as_good_as_what_it_is_made_from():
    steps = [step("a", "x", "p"), step("b", "p", "q"), step("c", "q", "r"), step("d", "x", "s")]
    assert first_fault(steps, {"p": False, "r": False}, ["r"]) == (steps[0], "p")
    assert first_fault(steps, {"p": True, "r": False, "s": False}, ["r"]) == (steps[2], "r")


@pytest.mark.parametrize("how", broken.MODULES)
def test_a_broken_module_is_caught_and_the_layer_blamed(how: str):
    model = broken.network()
    candidate = broken.broken_module(model, how)
    inputs = seeded_batches(IMAGE)
    (check,) = check_surgery(Reference(model, inputs), candidate, stage="verify")
    assert not check.passed
    found = blaming.blame_modules(model, candidate, inputs, stage="verify")
    assert found is not None
    assert found.blame.name == broken.MODULES[how][1]
    assert found.blame.relative > found.blame.limit


@pytest.mark.parametrize("how", broken.FILES)
def test_a_broken_file_is_caught_and_the_node_blamed(how: str, file: Path, tmp_path: Path):
    model, inputs = broken.network(), seeded_batches(IMAGE)
    candidate = broken.broken_file(file, how, tmp_path / "broken.onnx")
    node = broken.FILES[how][1]
    if not node:
        with pytest.raises(BntoolError):
            check_onnx(Reference(model, inputs), candidate)
        return
    checks = check_onnx(Reference(model, inputs), candidate)
    assert [(c.stage, c.passed) for c in checks] == [("export", False), ("runtime", False)]
    found = blaming.blame_onnx(model, candidate, inputs, checks)
    assert found is not None
    assert (found.blame.stage, found.blame.name) == ("export", node)
    beside = blaming.blame_files(file, candidate, inputs)
    assert beside is not None
    assert beside.blame.name == node


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = broken.network()
        self.other = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.body(x)
        return x, self.other(x)


def test_a_dropped_output_is_caught_and_named(tmp_path: Path):
    model = TwoHeads().eval()
    path = export_onnx(model, IMAGE, tmp_path / "two.onnx").path
    file = onnx.load(path)
    del file.graph.output[1]
    onnx.save(file, path)
    checks = check_onnx(Reference(model, seeded_batches(IMAGE)), path)
    assert not any(check.passed for check in checks)
    assert "output_1: the output is missing" in checks[0].detail


def test_what_is_sound_has_no_one_to_blame(file: Path):
    model, inputs = broken.network(), seeded_batches(IMAGE)
    folded = api.fold(model, IMAGE).model
    assert blaming.blame_modules(model, folded, inputs, stage="verify") is None
    assert blaming.blame_export(model, file, inputs) is None
    assert blaming.blame_files(file, file, inputs) is None
    assert blaming.blame_runtime(file, inputs, device="cpu") is None


@pytest.mark.parametrize("site", ["conv1", "conv2"])
def test_a_wrong_fold_is_blamed_on_its_site_and_shown_after_the_batchnorm(site: str, tmp_path: Path):
    model, inputs = broken.network(), seeded_batches(IMAGE)
    folded = api.fold(model, IMAGE).model
    folded.get_submodule(site).bias.data.zero_()
    found = blaming.blame_modules(model, folded, inputs, stage="verify")
    assert found is not None
    assert (found.blame.name, found.blame.value) == (site, site.replace("conv", "bn"))
    if site == "conv2":
        assert ran(write_repro(found, tmp_path / "repro")) == 1


def test_the_runtime_is_bisected_in_log2_steps(file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A runtime that gets one op wrong when it optimises: what holds the second ReLU is doubled."""
    honest = blaming.OrtRunner
    cuts: list[int] = []

    class Wrong(honest):
        def __init__(self, path: Path, device: str = "auto", *, optimize: bool = True) -> None:
            super().__init__(path, device, optimize=optimize)
            nodes = [node.name for node in onnx.load(path).graph.node]
            self.doubled = optimize and "relu2/Relu" in nodes
            cuts.append(len(nodes))

        def run(self, inputs: Inputs) -> dict[str, torch.Tensor]:
            outputs = super().run(inputs)
            return {n: t * 2 if self.doubled and t.is_floating_point() else t for n, t in outputs.items()}

    monkeypatch.setattr(blaming, "OrtRunner", Wrong)
    found = blaming.blame_runtime(file, [IMAGE.rebatched(2)], device="cpu")
    assert found is not None
    assert (found.blame.stage, found.blame.name) == ("runtime", "relu2/Relu")
    count = len(onnx.load(file).graph.node)
    assert len(cuts) <= 2 * (count.bit_length() + 1)
    # with the real runtime the script finds nothing wrong
    assert ran(write_repro(found, tmp_path / "repro")) == 0


def ran(script: Path) -> int:
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert "max |d|" in done.stdout, done.stderr
    assert len(script.read_text().splitlines()) <= 13
    return done.returncode


@pytest.mark.parametrize("how", ["one weight off by 1e-3", "NaN in one output", "wrong padding"])
def test_a_repro_shows_the_mismatch_by_itself(how: str, file: Path, tmp_path: Path):
    model, inputs = broken.network(), seeded_batches(IMAGE)
    candidate = broken.broken_file(file, how, tmp_path / "broken.onnx")
    found = blaming.blame_export(model, candidate, inputs)
    assert found is not None
    script = write_repro(found, tmp_path / "repro")
    assert sorted(p.name for p in script.parent.iterdir()) == [
        "expected.npy", "inputs.npz", "model.onnx", "run.py"
    ]  # fmt: skip
    assert [node.name for node in onnx.load(script.parent / "model.onnx").graph.node] == [found.blame.name]
    assert ran(script) == 1
    with pytest.raises(UsageError, match="there already"):
        write_repro(found, tmp_path / "repro")


def test_a_repro_that_cannot_be_cut_out_is_refused(tmp_path: Path):
    model, inputs = broken.network(), seeded_batches(IMAGE)
    found = blaming.blame_modules(model, broken.broken_module(model, "wrong eps"), inputs, stage="verify")
    bare = blaming.Found(found.blame, found.feeds, found.expected)
    with pytest.raises(CheckFailed, match="cannot be taken out"):
        write_repro(bare, tmp_path / "repro")
    assert not list(tmp_path.iterdir())


def test_values_that_would_not_fit_into_the_memory_are_not_taken_apart(monkeypatch: pytest.MonkeyPatch):
    model, inputs = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), [Inputs((torch.ones(1, 4),))]
    other = copy.deepcopy(model)
    nn.init.ones_(other[0].weight)
    assert blaming.blame_modules(model, other, inputs, stage="fold") is not None
    monkeypatch.setattr("bntool.verifying.blaming.available_bytes", lambda: 100)
    with pytest.raises(UsageError, match="between the layers take"):
        blaming.blame_modules(model, other, inputs, stage="fold")
    why = blaming.told(lambda: blaming.blame_modules(model, other, inputs, stage="fold"))
    assert why == "the values between the layers take 256 B, and 100 B are free"


def test_why_nothing_can_be_told_is_said_in_words():
    def broken() -> blaming.Found | None:
        raise RuntimeError("shapes do not match\nand more")

    assert blaming.told(broken) == "taken apart, they do not run: shapes do not match"
    assert blaming.told(lambda: None).startswith("they agree layer by layer")


@pytest.mark.parametrize(
    ("bound", "left"), [("3000", 2400), ("500", 0), ("max", None)], ids=["room", "full", "unbounded"]
)
@pytest.mark.parametrize("version", [1, 2])
def test_the_memory_that_is_left_is_that_of_the_container_too(
    version: int, bound: str, left: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from bntool.runtime import memory

    if version == 2:
        group, names, line = "job", ("memory.max", "memory.current", "inactive_file"), "0::/job/step\n"
    else:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        group, line = "memory/job", "4:memory:/job/step\n0::/\n"
    outer = tmp_path / "groups" / group
    (outer / "step").mkdir(parents=True)
    (outer / names[0]).write_text(f"{bound}\n")
    (outer / names[1]).write_text("1000\n")
    (outer / "memory.stat").write_text(f"anon 600\n{names[2]} 400\n")
    (tmp_path / "own").write_text(line)
    monkeypatch.setattr(memory, "_OWN_GROUP", tmp_path / "own")
    monkeypatch.setattr(memory, "_GROUPS", tmp_path / "groups")
    found = memory.available_bytes()
    assert found is None or found > 3000 if left is None else found == left
