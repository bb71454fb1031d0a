"""Folding an ONNX file: options, results, and plans that may not rely on a size that is not fixed."""

from __future__ import annotations

import dataclasses
import glob
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from bntool.core.errors import CheckFailed
from bntool.core.plan import Plan
from bntool.core.reasons import Reason
from bntool.core.tolerances import DRAWS, K_NOISE, Limit
from bntool.folding import agreement, plan_fold
from bntool.graph.inputs import Inputs
from bntool.pipeline.onnx_folding import fold_onnx, plan_fold_onnx
from bntool.verifying import onnx_checking
from bntool.verifying.onnx_checking import OnnxReference, Run, file_limits
from tests.onnx_zoo import ONNX_ZOO

ZOO = {net.name: net for net in ONNX_ZOO}


def saved(tmp_path: Path, name: str) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(ZOO[name].model(), path)
    return path


def test_include_and_exclude_match_node_names(tmp_path: Path) -> None:
    path = saved(tmp_path, "several_in_turn")
    plans = [
        fold_onnx(path, None, include=("b*",)).plan,
        fold_onnx(path, None, exclude=("y",)).plan,
    ]
    for plan in plans:
        assert [site.bn for site in plan.fold_sites] == ["b1"]
        assert [(skip.name, skip.reason) for skip in plan.skips] == [("y", Reason.EXCLUDED)]


def test_without_an_output_nothing_is_written(tmp_path: Path) -> None:
    result = fold_onnx(saved(tmp_path, "conv"), None)
    assert result.modified
    assert result.path is None
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_where_nothing_folds_nothing_is_written(tmp_path: Path) -> None:
    result = fold_onnx(saved(tmp_path, "through_sigmoid"), tmp_path / "out.onnx")
    assert not result.modified
    assert result.path is None
    assert not (tmp_path / "out.onnx").exists()


def test_the_result_counts_and_goes_to_json(tmp_path: Path) -> None:
    result = fold_onnx(saved(tmp_path, "conv"), tmp_path / "out.onnx")
    document = json.loads(json.dumps(result.to_dict()))
    # 4 · 6 numbers of the BatchNorm go, a bias of 6 comes.
    counts = document["parameters"]
    assert [counts[when]["frozen"] for when in ("before", "after", "delta")] == [6 * 40, 6 * 37, 6 - 24]
    assert [counts[when]["bytes"] for when in ("before", "after", "delta")] == [4 * 240, 4 * 222, -4 * 18]
    assert (document["status"], document["kind"]) == ("ok", "onnx")
    assert (document["bn_total"], document["bn_folded"]) == (1, 1)
    assert result.path == tmp_path / "out.onnx"
    plan = json.loads(json.dumps(result.plan.to_dict()))
    assert Plan.from_dict(plan).to_dict() == result.plan.to_dict()
    (site,) = result.plan.fold_sites
    assert (site.bn, site.into, site.level) == ("y", ("c",), "graph")


def test_folding_a_folded_file_finds_nothing(tmp_path: Path) -> None:
    fold_onnx(saved(tmp_path, "several_in_turn"), tmp_path / "once.onnx")
    again = fold_onnx(tmp_path / "once.onnx", tmp_path / "twice.onnx")
    assert (again.plan.sites, again.plan.skips) == ((), ())


def test_a_fold_that_needs_a_made_up_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the plans under two sets of sizes differ, the BatchNorm stays, and the others fold."""
    calls = []

    def plan_as_if_sizes_mattered(graph: object, **options: object) -> Plan:
        plan = plan_fold(graph, **options)  # type: ignore[arg-type]
        calls.append(graph)
        if len({id(g) for g in calls}) > 1 and graph is not calls[0]:
            sites = tuple(
                dataclasses.replace(site, into=("elsewhere",)) if site.bn == "b1" else site
                for site in plan.fold_sites
            )
            plan = dataclasses.replace(plan, sites=sites)
        return plan

    monkeypatch.setattr(agreement, "plan_fold", plan_as_if_sizes_mattered)
    proto = ZOO["several_in_turn"].model()
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "N"
    plan, _ = plan_fold_onnx(ir.from_proto(proto))
    assert [site.bn for site in plan.fold_sites] == ["y"]
    assert [(skip.name, skip.reason) for skip in plan.skips] == [("b1", Reason.AXIS_MISMATCH)]
    assert "of other sizes" in plan.skips[0].detail
    assert plan.options["exclude"] == []


def test_a_made_up_size_is_not_taken_for_the_channels() -> None:
    """Nothing tells what comes out of a reshape by an input: no map has the sizes that stand in for it."""
    proto = ZOO["pre_activation"].model()
    proto.graph.input.append(onnx.helper.make_tensor_value_info("shape", onnx.TensorProto.INT64, [4]))
    proto.graph.node.insert(0, onnx.helper.make_node("Reshape", ["x", "shape"], ["reshaped"]))
    proto.graph.node[1].input[0] = "reshaped"
    del proto.graph.value_info[:]
    plan, _ = plan_fold_onnx(ir.from_proto(proto))
    assert [(skip.name, skip.reason) for skip in plan.skips] == [("n", Reason.AXIS_MISMATCH)]


def test_a_name_with_a_pattern_in_it_is_a_name() -> None:
    proto = ZOO["conv"].model()
    proto.graph.node[1].name = "layer[0]*"
    plan, _ = plan_fold_onnx(ir.from_proto(proto))
    assert [site.bn for site in plan.fold_sites] == ["layer[0]*"]
    plan, _ = plan_fold_onnx(ir.from_proto(proto), exclude=[glob.escape("layer[0]*")])
    assert [skip.reason for skip in plan.skips] == [Reason.EXCLUDED]


def test_a_file_that_onnx_runtime_refuses_is_checked_by_the_reference(tmp_path: Path) -> None:
    """ONNX Runtime has no float64 convolution on the CPU, and lags behind the newest opset."""
    wide, newest = ZOO["conv"].model(np.float64), ZOO["conv"].model()
    newest.opset_import[0].version = onnx.defs.onnx_opset_version()
    for name, model in (("wide", wide), ("newest", newest)):
        onnx.save(model, tmp_path / f"{name}.onnx")
        result = fold_onnx(tmp_path / f"{name}.onnx", None)
        assert [site.bn for site in result.plan.fold_sites] == ["y"]
        assert {check.stage for check in result.checks} <= {"fold", "runtime"}
        assert result.checks[0].passed
    assert fold_onnx(tmp_path / "wide.onnx", None).checks[0].provider == "onnx.reference"


def test_bfloat16_is_checked_too(tmp_path: Path) -> None:
    proto = ZOO["conv"].model()
    for tensor in proto.graph.initializer:
        numbers = onnx.numpy_helper.to_array(tensor).astype(ml_dtypes.bfloat16)
        tensor.CopyFrom(onnx.numpy_helper.from_array(numbers, tensor.name))
    del proto.graph.value_info[:]
    for info in (*proto.graph.input, *proto.graph.output):
        info.type.tensor_type.elem_type = onnx.TensorProto.BFLOAT16
    proto.opset_import[0].version = 22
    onnx.save(proto, tmp_path / "model.onnx")
    result = fold_onnx(tmp_path / "model.onnx", tmp_path / "out.onnx")
    assert [check.passed for check in result.checks] == [True]
    stored = {t.name: t.data_type for t in onnx.load(tmp_path / "out.onnx").graph.initializer}
    assert set(stored.values()) == {onnx.TensorProto.BFLOAT16}


@pytest.mark.parametrize("name", ["w", "y.weight"])
def test_a_default_that_the_caller_may_replace_is_no_constant(tmp_path: Path, name: str) -> None:
    """From IR version 4 on, an initializer that is also an input."""
    proto = ZOO["conv"].model()
    tensor = next(t for t in proto.graph.initializer if t.name == name)
    proto.graph.input.append(onnx.helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims)))
    onnx.save(proto, tmp_path / "model.onnx")
    plan = fold_onnx(tmp_path / "model.onnx", tmp_path / "out.onnx").plan
    assert [(skip.name, skip.reason) for skip in plan.skips] == [("y", Reason.WEIGHT_COMPUTED)]
    assert not (tmp_path / "out.onnx").exists()


def test_where_rounding_alone_decides_the_output_nothing_is_proved_and_that_is_said(tmp_path: Path) -> None:
    proto = ZOO["conv"].model()
    last = proto.graph.output[0].name
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(1e8), "amplified"))
    proto.graph.node.append(onnx.helper.make_node("Mul", [last, "amplified"], ["large"]))
    proto.graph.node.append(onnx.helper.make_node("Sin", ["large"], ["wild"]))
    proto.graph.output[0].name = "wild"
    onnx.save(proto, tmp_path / "model.onnx")
    with pytest.raises(CheckFailed, match="rounding alone moves this output") as raised:
        fold_onnx(tmp_path / "model.onnx", tmp_path / "out.onnx")
    assert "--check none" in str(raised.value.next_step)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


UNTOLD: Any = SimpleNamespace(eps={}, slack={})
"""A file that says nothing of its outputs."""


def test_a_few_integers_that_no_rounding_moves_may_not_move_and_many_may_by_ten() -> None:
    few, many = ([{"n": torch.arange(count)}] for count in (999, 1000))
    assert file_limits(few, [Run(few)], 9, UNTOLD)["n"].limit == 0.0
    assert file_limits(many, [Run(many)], 9, UNTOLD)["n"] == Limit(1e-3, 10 * 1e-3)


def test_a_rounding_is_as_large_as_that_of_the_coarsest_type_on_the_way() -> None:
    own = [{"y": torch.tensor([1.0, -2.0])}]
    told: Any = SimpleNamespace(eps={"y": 2.0**-10}, slack={"y": 1e-7})
    found = file_limits(own, [Run(own, 2.0**-10)], 9, told)["y"]
    assert (found.noise_floor, found.absolute) == (2.0**-10 * 3 / 2, 1e-7)
    # what a coarser type moves says nothing of an output that never had it
    moved = [{"y": torch.tensor([1.0, -1.0])}]
    fine: Any = SimpleNamespace(eps={"y": 2.0**-23}, slack={})
    assert not file_limits(own, [Run(moved, 2.0**-10)], 9, fine)["y"].undecidable


def test_the_limits_of_a_file_are_a_walk_of_its_roundings_or_what_they_move() -> None:
    own = [{"y": torch.tensor([1.0, -2.0]), "n": torch.tensor([1])}]
    walk = torch.finfo(torch.float32).eps * 3 / 2  # of nine nodes

    def limit(moved: float) -> Limit:
        again = [{"y": torch.tensor([1.0 + moved, -2.0]), "n": torch.tensor([2])}]
        limits = file_limits(own, [Run(again)], 9, UNTOLD)
        assert limits["n"] == Limit(1.0, 0.5, "rounding alone changes 100% of these integers")
        return limits["y"]

    assert limit(0.0) == Limit(walk, (K_NOISE + 2) * walk)
    assert limit(2.0**-12).noise_floor == 2.0**-13  # of the peak, which is 2
    assert not limit(2.0**-12).undecidable
    assert limit(0.5).noise_floor == walk
    assert "by 0.25 of its peak" in limit(0.5).undecidable
    assert "decides" in limit(float("nan")).undecidable


def test_an_input_that_cannot_be_made_up_is_said(tmp_path: Path) -> None:
    proto = ZOO["conv"].model()
    text = onnx.helper.make_tensor_value_info("words", onnx.TensorProto.STRING, [1])
    proto.graph.input.append(text)
    onnx.save(proto, tmp_path / "model.onnx")
    with pytest.raises(CheckFailed, match="words"):
        fold_onnx(tmp_path / "model.onnx", tmp_path / "out.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    assert fold_onnx(tmp_path / "model.onnx", tmp_path / "out.onnx", check="none").path is not None


def test_a_lucky_draw_of_the_rounding_is_drawn_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, "conv")
    drawn: list[int] = []

    def lucky(inputs: Inputs, seed: int = 0, _eps: float = 0.0) -> Inputs:
        """The first draw does not move the numbers; the others show what they are moved by."""
        drawn.append(seed)
        return inputs if seed == 0 else inputs.map(lambda tensor: tensor * (1 + 1e-4))

    monkeypatch.setattr(onnx_checking, "nudged", lucky)
    reference = OnnxReference(path, 2)
    assert set(drawn) == {0}
    limits, more = reference.limits["y"], reference.redrawn_limits["y"]
    assert set(drawn) == {*range(DRAWS + 1)}
    assert limits.noise_floor < 1e-6
    assert 1e-6 < more.noise_floor < 1e-3
    assert all(row.passed for row in reference.checks(path))
