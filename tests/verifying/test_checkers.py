"""Every checker against faults that it must see: a checker that never fails is worth nothing."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bntool.core.verdicts import Check
from bntool.graph.inputs import Inputs
from bntool.runtime.ort_runner import OrtRunner
from bntool.verifying.algebra import Redone
from bntool.verifying.checking import check_surgery, seeded_batches
from bntool.verifying.comparing import compare, noise_limits
from bntool.verifying.conditions import Conditions
from bntool.verifying.export_checking import check_onnx
from bntool.verifying.onnx_checking import OnnxReference, check_onnx_unchanged
from bntool.verifying.onnx_verifying import check_files, check_itself
from bntool.verifying.reference import Reference
from tests.exports import export_onnx

Run = dict[str, Tensor]
BATCHES = (1, 2, 100)
IMAGE = Inputs((torch.zeros(1, 3, 6, 6),))
OFF = 1.001
"""A thousandth, where networks like these carry some 1e-7 of rounding."""


class Two(nn.Module):
    """A network with two outputs: maps and scores."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = torch.relu(self.norm(self.conv(x)))
        return {"maps": maps, "scores": self.head(maps.mean((2, 3)))}


def network() -> Two:
    torch.manual_seed(0)
    net = Two().eval()
    nn.init.uniform_(net.norm.weight, 0.5, 1.5)
    nn.init.normal_(net.norm.bias)
    return net


def wrong_weight(net: Two) -> None:
    net.head.weight.data[2] *= OFF


def one_wrong_number(net: Two) -> None:
    net.conv.weight.data[1, 2, 0, 1] += 0.01


def swapped_channels(net: Two) -> None:
    net.conv.weight.data = net.conv.weight.data[[1, 0, *range(2, 8)]]


def forgotten_shift(net: Two) -> None:
    net.norm.bias.data[3] = 0.0


IN_WEIGHTS = [wrong_weight, one_wrong_number, swapped_channels, forgotten_shift]


def maps_off(run: Run) -> None:
    run["maps"] = run["maps"] * OFF


def put(number: float) -> Callable[[Run], None]:
    def fault(run: Run) -> None:
        run["maps"] = run["maps"].clone()
        run["maps"][-1, 3, 1, 2] = number

    return fault


def one_sample(run: Run) -> None:
    run["scores"] = run["scores"].clone()
    run["scores"][len(run["scores"]) // 2] *= 1.01


def rows_turned(run: Run) -> None:
    run["scores"] = run["scores"].roll(1, 0)


def one_gone(run: Run) -> None:
    del run["scores"]


IN_RUNS: dict[str, tuple[int, Callable[[Run], None]]] = {
    "one batch of several: the first": (1, maps_off),
    "one batch of several: the second": (2, maps_off),
    "one batch of several: the last": (100, maps_off),
    "NaN": (2, put(math.nan)),
    "Inf": (2, put(math.inf)),
    "-Inf": (2, put(-math.inf)),
    "one sample in a hundred": (100, one_sample),
    "samples in another order": (100, rows_turned),
    "one output gone": (1, one_gone),
}
"""Faults of what a run returns, and the batch size whose run has them."""
ONE_OUTPUT = {"scores": lambda run: run.update(scores=run["scores"] * OFF), "maps": maps_off}


class Faulty(nn.Module):
    """A network whose run on one batch size has a fault."""

    def __init__(self, inner: nn.Module, batch: int, fault: Callable[[Run], None]) -> None:
        super().__init__()
        self.inner, self.batch, self.fault = inner, batch, fault

    def forward(self, x: Tensor) -> Run:
        run: Run = self.inner(x)
        if len(x) == self.batch:
            self.fault(run)
        return run


def failed(rows: list[Check]) -> list[bool]:
    return [not row.passed for row in rows]


# -- a model against a model ----------------------------------------------------------------------------


def test_the_same_network_passes() -> None:
    net = network()
    rows = check_surgery(
        Reference(net, seeded_batches(IMAGE, BATCHES)),
        copy.deepcopy(net),
        stage="fold",
        redone=Redone(network().double()),
    )
    assert failed(rows) == [False, False]


@pytest.mark.parametrize("fault", IN_WEIGHTS)
def test_a_fault_in_the_weights_fails_in_both_precisions(fault: Callable[[Two], None]) -> None:
    wrong = network()
    fault(wrong)
    rows = check_surgery(
        Reference(network(), seeded_batches(IMAGE, BATCHES)),
        wrong,
        stage="fold",
        redone=Redone(copy.deepcopy(wrong).double()),
    )
    assert failed(rows) == [True, True]


@pytest.mark.parametrize("name", IN_RUNS)
def test_a_fault_in_a_run_fails(name: str) -> None:
    wrong = Faulty(network(), *IN_RUNS[name])
    (row,) = check_surgery(Reference(network(), seeded_batches(IMAGE, BATCHES)), wrong, stage="fold")
    assert not row.passed


@pytest.mark.parametrize("output", ONE_OUTPUT)
def test_a_fault_in_one_output_of_several_fails_and_is_named(output: str) -> None:
    wrong = Faulty(network(), 2, ONE_OUTPUT[output])
    (row,) = check_surgery(Reference(network(), seeded_batches(IMAGE, BATCHES)), wrong, stage="fold")
    assert not row.passed
    assert row.worst[0] == output


@pytest.mark.parametrize("factor", [1 + 1e-8, math.nan])
def test_the_algebra_is_run_on_the_second_input_which_has_other_sizes(factor: float) -> None:
    wide = Faulty(network().double(), 2, lambda run: run.update(maps=run["maps"] * factor))
    row, algebra = check_surgery(
        Reference(network(), seeded_batches(IMAGE, BATCHES)), network(), stage="fold", redone=Redone(wide)
    )
    assert row.passed
    assert not algebra.passed


# -- a model against a file, and files against each other -----------------------------------------------


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_onnx(network(), IMAGE, tmp_path_factory.mktemp("files") / "net.onnx").path


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have ONNX Runtime return a fault on one batch size, with optimisations on, off or in both cases."""

    def spoil(batch: int, fault: Callable[[Run], None], optimised: tuple[Any, ...] = (True, False)) -> None:
        honest = OrtRunner.run

        def run(self: OrtRunner, inputs: Inputs) -> Run:
            found = honest(self, inputs)
            if self._optimize in optimised and len(next(iter(found.values()))) == batch:
                fault(found)
            return found

        monkeypatch.setattr(OrtRunner, "run", run)

    return spoil


@pytest.mark.parametrize("fault", IN_WEIGHTS)
def test_a_file_with_a_fault_in_its_weights_fails(
    fault: Callable[[Two], None], file: Path, tmp_path: Path
) -> None:
    wrong, batches = network(), seeded_batches(IMAGE, BATCHES)
    fault(wrong)
    other = export_onnx(wrong, IMAGE, tmp_path / "wrong.onnx").path
    named = [Inputs((), {"x": inputs.args[0]}) for inputs in batches]
    assert failed(check_onnx(Reference(network(), batches), file)) == [False, False]
    assert failed(check_onnx(Reference(network(), batches), other)) == [True, True]
    assert failed(check_files(file, file, named, how=Conditions("cpu"))) == [False, False]
    assert failed(check_files(file, other, named, how=Conditions("cpu"))) == [True, True]
    assert failed(OnnxReference(file, 5).checks(file)) == [False, False]
    assert failed(OnnxReference(file, 5).checks(other)) == [True, True]
    assert failed([check_onnx_unchanged(file, other, named)]) == [True]


@pytest.mark.parametrize("optimised", [True, False])
@pytest.mark.parametrize("name", IN_RUNS)
def test_a_fault_in_a_run_of_a_file_fails_its_stage(
    name: str, optimised: bool, file: Path, spoil: Callable[..., None]
) -> None:
    spoil(*IN_RUNS[name], (optimised,))
    rows = check_onnx(Reference(network(), seeded_batches(IMAGE, BATCHES)), file)
    assert failed(rows) == [not optimised, optimised]


@pytest.mark.parametrize("output", ONE_OUTPUT)
def test_one_output_of_a_file_fails_and_is_named(output: str, file: Path, spoil: Callable[..., None]) -> None:
    spoil(2, ONE_OUTPUT[output])
    rows = check_onnx(Reference(network(), seeded_batches(IMAGE, BATCHES)), file)
    assert [(row.passed, row.worst[0]) for row in rows] == [(False, output)] * 2


@pytest.mark.parametrize("name", [name for name in IN_RUNS if name != "one output gone"])
def test_a_file_that_the_optimiser_breaks_fails_against_itself(
    name: str, file: Path, spoil: Callable[..., None]
) -> None:
    spoil(*IN_RUNS[name], (True, "extended"))
    named = [Inputs((), {"x": inputs.args[0]}) for inputs in seeded_batches(IMAGE, BATCHES)]
    assert failed(check_itself(file, named, how=Conditions("cpu"))) == [False, True, True]
    assert failed(check_files(file, file, named, how=Conditions("cpu"))) == [False, True]


# -- the arithmetic -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", IN_RUNS)
def test_a_fault_fails_whatever_else_is_compared(name: str) -> None:
    batch, fault = IN_RUNS[name]
    generator = torch.Generator().manual_seed(0)
    exact = [
        {
            "maps": torch.randn(n, 4, 2, 3, generator=generator, dtype=torch.float64),
            "scores": torch.randn(n, 5, generator=generator, dtype=torch.float64),
            "labels": torch.arange(n),
        }
        for n in BATCHES
    ]
    own = [{k: t.float() if t.is_floating_point() else t for k, t in run.items()} for run in exact]
    limits = noise_limits(exact, own, 3, torch.finfo(torch.float32).eps)
    how = {"stage": "fold", "device": "cpu", "provider": "torch"}
    assert compare(exact, own, limits, **how).passed
    wrong = [dict(run) for run in own]
    fault(wrong[BATCHES.index(batch)])
    assert not compare(exact, wrong, limits, **how).passed
    wrong = [dict(run) for run in own]
    wrong[2]["labels"] = wrong[2]["labels"].clone()
    wrong[2]["labels"][57] = 0
    assert not compare(exact, wrong, limits, **how).passed
