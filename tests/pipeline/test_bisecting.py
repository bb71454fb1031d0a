"""What does not stand up when it is run is kept with its reason, in programs and files as in modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import bntool
from bntool.core.errors import CheckFailed
from bntool.core.plan import Plan
from bntool.core.reasons import Reason
from bntool.core.sites import FoldSite, Skip
from bntool.graph.affine import Affine
from bntool.graph.dataflow import Op
from bntool.laws import LAWS, Context, Maps
from bntool.pipeline.bisecting import first_at_fault, settle
from bntool.pipeline.onnx_folding import fold_onnx
from tests.fold_zoo import bn, conv, enliven
from tests.onnx_zoo import OnnxNet, W
from tests.program_zoo import exported


def lie_up(context: Context, op: Op, demands: list[Affine]) -> Maps:
    return {"input": demands[0]}


def lie_down(context: Context, op: Op, maps: Maps) -> list[Affine]:
    return [maps["input"]]


@pytest.fixture
def a_law_that_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    """ReLU lets any map by, as if it were nothing."""
    monkeypatch.setitem(LAWS, "relu", (lie_up, lie_down))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.good, self.second, self.bad = conv(), bn(), nn.Conv2d(6, 6, 3), bn()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bad(self.second(self.good(self.first(x)).sigmoid()).relu())
        return y


@pytest.mark.usefixtures("a_law_that_lies")
@pytest.mark.parametrize("level", ["fast", "full"])
def test_in_a_program_the_one_at_fault_stays_and_the_rest_folds(level: Any) -> None:
    program = exported(enliven(Net().eval()), (torch.randn(2, 4, 8, 8),), {0: "batch"})
    result = bntool.fold(program, check=level)
    assert [site.bn for site in result.plan.fold_sites] == ["good"]
    assert [(skip.name, skip.reason) for skip in result.plan.skips] == [("bad", Reason.NOT_PROVED)]
    assert "differs" in result.plan.skips[0].detail
    assert result.plan.options["exclude"] == []
    assert all(check.passed for check in result.checks)


TWO = OnnxNet(
    "two",
    {},
    "c = Conv(x, w)\ng = BN(c)\ns = Sigmoid(g)\nd = Conv(s, v)\nr = Relu(d)\nb = BN(r)\ny = Sigmoid(b)",
    {"w": W, "g": 6, "v": (6, 6, 3, 3), "b": 6},
    {"x": ("N", 4, "H", "W")},
    ("y",),
    17,
    8,
    {},
    True,
)


@pytest.mark.usefixtures("a_law_that_lies")
def test_in_a_file_the_one_at_fault_stays_and_the_rest_folds(tmp_path: Path) -> None:
    onnx.save(TWO.model(), tmp_path / "two.onnx")
    result = fold_onnx(tmp_path / "two.onnx", tmp_path / "out.onnx")
    assert [site.bn for site in result.plan.fold_sites] == ["g"]
    assert [(skip.name, skip.reason) for skip in result.plan.skips] == [("b", Reason.NOT_PROVED)]
    assert [check.stage for check in result.checks] == ["fold", "runtime"]
    assert all(check.passed for check in result.checks)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.onnx", "two.onnx"]
    unchecked = fold_onnx(tmp_path / "two.onnx", None, check="none")
    assert [site.bn for site in unchecked.plan.fold_sites] == ["g", "b"]


def test_open_axes_get_other_lengths(tmp_path: Path) -> None:
    onnx.save(TWO.model(), tmp_path / "two.onnx")
    checks = fold_onnx(tmp_path / "two.onnx", None, check="full").checks
    assert [check.batches for check in checks] == [3, 3]
    assert "1x4x64x64; 2x4x96x96; 3x4x224x224" in checks[0].detail


def plan_of(*names: str) -> Plan:
    return Plan("fold", tuple(FoldSite(name, (), (), ()) for name in names), ())


@pytest.mark.parametrize("bad", range(7))
def test_bisection_names_the_one_at_fault(bad: int) -> None:
    plan = plan_of(*"abcdefg")
    asked: list[int] = []

    def agrees(part: Plan) -> bool:
        asked.append(len(part.sites))
        return bad >= len(part.sites)

    assert first_at_fault(plan, agrees) == "abcdefg"[bad]
    assert len(asked) <= 5  # all, none, and the halves of 7


def test_a_part_that_cannot_be_run_does_not_stand_up() -> None:
    def agrees(part: Plan) -> bool:
        if len(part.sites) > 1:
            raise CheckFailed("it does not run")
        return True

    assert first_at_fault(plan_of("a", "b"), agrees) == "b"


def test_where_not_even_nothing_stands_up_no_norm_is_at_fault() -> None:
    """A model that differs from run to run, or inputs that it does not take."""
    assert first_at_fault(plan_of("a", "b"), lambda part: False) == ""


def test_inputs_that_a_program_does_not_take_are_a_failed_check() -> None:
    program = exported(enliven(Net().eval()), (torch.randn(2, 4, 8, 8),))
    with pytest.raises(CheckFailed, match="no input that the original can run"):
        bntool.fold(program, example_inputs=(torch.randn(2, 5, 8, 8),))


def test_where_no_norm_is_at_fault_the_check_fails() -> None:
    def carry_out(plan: Plan) -> None:
        raise CheckFailed("something else")

    with pytest.raises(CheckFailed, match="something else"):
        settle(lambda exclude, merge: plan_of("a"), carry_out, lambda part: True)


def test_a_name_with_a_pattern_in_it_is_left_out_by_its_name() -> None:
    asked: list[tuple[str, ...]] = []

    def plan_without(exclude: Any, merge: bool) -> Plan:
        asked.append(tuple(exclude))
        if len(exclude) == 1:
            return plan_of("a[0]")
        return Plan("fold", (), (Skip("a[0]", Reason.EXCLUDED),))

    def carry_out(plan: Plan) -> str:
        if plan:
            raise CheckFailed("wrong")
        return "done"

    plan, done = settle(plan_without, carry_out, lambda part: not part, ("given",))
    assert done == "done"
    assert asked == [("given",), ("given", "a[[]0]")]
    assert [(skip.reason, skip.detail) for skip in plan.skips] == [(Reason.NOT_PROVED, "wrong")]
