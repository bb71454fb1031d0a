"""Every net of the ONNX zoo gets exactly its verdicts, and computes in ONNX Runtime what it did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from tests.onnx_zoo import FOLDED, ONNX_ZOO, OnnxNet

from bntool.comparing import difference, noise_limits
from bntool.onnx_folding import fold_onnx, plan_fold_onnx
from bntool.plan import Plan
from bntool.surgery.fold_onnx import apply_fold_onnx

EXACT = 1e-10
"""Relative to peak, in float64: some hundred roundings of 1e-16 each, and room for the condition of a net."""
EPS = float(np.finfo(np.float32).eps)


def verdicts_of(plan: Plan) -> dict[str, Any]:
    found: dict[str, Any] = {site.bn: FOLDED for site in plan.fold_sites}
    found.update({skip.name: skip.reason for skip in plan.skips})
    return found


def run(path: Path, feed: dict[str, Any]) -> dict[str, torch.Tensor]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return {n: torch.from_numpy(np.asarray(a)) for n, a in zip(names, session.run(names, feed), strict=True)}


def run_exactly(model: onnx.ModelProto, feed: dict[str, Any]) -> dict[str, torch.Tensor]:
    with np.errstate(all="ignore"):
        results = ReferenceEvaluator(model).run(None, feed)
    names = [output.name for output in model.graph.output]
    return {n: torch.from_numpy(np.asarray(a)) for n, a in zip(names, results, strict=True)}


def norm_count(model: onnx.ModelProto) -> int:
    return sum(node.op_type == "BatchNormalization" for node in model.graph.node)


@pytest.mark.parametrize("net", ONNX_ZOO, ids=lambda net: net.name)
def test_zoo(net: OnnxNet, tmp_path: Path) -> None:
    before, after = tmp_path / "before.onnx", tmp_path / "after.onnx"
    onnx.save(net.model(), before)
    content = before.read_bytes()
    result = fold_onnx(before, after)
    assert verdicts_of(result.plan) == dict(net.verdicts)
    assert before.read_bytes() == content
    assert after.exists() == bool(result.plan) == (FOLDED in net.verdicts.values())
    if not result.plan:
        return
    exact = run_exactly(net.model(np.float64), net.feed(np.float64))
    own, folded = run(before, net.feed()), run(after, net.feed())
    assert own.keys() == folded.keys() == exact.keys()
    limits = noise_limits([exact], [own], len(net.body.splitlines()), EPS)
    for name, expected in exact.items():
        assert not limits[name].undecidable
        assert difference(expected, folded[name]).relative <= limits[name].limit, name


@pytest.mark.parametrize(
    "net", [net for net in ONNX_ZOO if FOLDED in net.verdicts.values()], ids=lambda net: net.name
)
def test_the_algebra_is_exact_in_float64(net: OnnxNet) -> None:
    original = net.model(np.float64)
    model = ir.from_proto(net.model(np.float64))
    plan, observed = plan_fold_onnx(model)
    assert verdicts_of(plan) == dict(net.verdicts)
    apply_fold_onnx(observed, plan)
    folded = ir.to_proto(model)
    onnx.checker.check_model(folded, full_check=True)
    expected, got = (run_exactly(m, net.feed(np.float64)) for m in (original, folded))
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        assert difference(tensor, got[name]).relative <= EXACT, name
    again, _ = plan_fold_onnx(model)
    assert not again
