"""Every net of the ONNX zoo gets exactly its verdicts, and computes in ONNX Runtime what it did."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from bntool.core.plan import Plan
from bntool.core.sites import Edit, FoldSite
from bntool.observe.onnx_constants import to_onnx, to_torch
from bntool.pipeline.onnx_folding import fold_onnx, plan_fold_onnx
from bntool.surgery.fold_onnx import apply_fold_onnx
from bntool.verifying.comparing import noise_limits
from bntool.verifying.differences import difference
from tests.fold_zoo import enliven
from tests.onnx_zoo import FOLDED, ONNX_ZOO, OnnxNet

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
    return {n: torch.from_numpy(np.array(a)) for n, a in zip(names, results, strict=True)}


@pytest.mark.parametrize("net", ONNX_ZOO, ids=lambda net: net.name)
def test_zoo(net: OnnxNet, tmp_path: Path) -> None:
    before, after = tmp_path / "before.onnx", tmp_path / "after.onnx"
    onnx.save(net.model(), before)
    content = before.read_bytes()
    result = fold_onnx(before, after, unshare=False)
    assert verdicts_of(result.plan) == dict(net.verdicts)
    assert before.read_bytes() == content
    assert after.exists() == bool(result.plan) == (FOLDED in net.verdicts.values())
    if not result.plan:
        return
    own, folded = run(before, net.feed()), run(after, net.feed())
    exact = run_exactly(net.model(np.float64), net.feed(np.float64)) if net.has_reference else own
    assert own.keys() == folded.keys() == exact.keys()
    limits = noise_limits([exact], [own], len(net.body.splitlines()), EPS)
    for name, expected in exact.items():
        assert not limits[name].undecidable
        assert difference(expected, folded[name]).relative <= limits[name].limit, name


@pytest.mark.parametrize(
    "net",
    [net for net in ONNX_ZOO if net.has_reference and FOLDED in net.verdicts.values()],
    ids=lambda net: net.name,
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


# -- what stays as it was -------------------------------------------------------------------------------

ZOO = {net.name: net for net in ONNX_ZOO}


def folded_model(model: onnx.ModelProto, *, merge: bool = True) -> onnx.ModelProto:
    subject = ir.from_proto(model)
    plan, observed = plan_fold_onnx(subject, merge=merge)
    apply_fold_onnx(observed, plan)
    return ir.to_proto(subject)


def initializers(model: onnx.ModelProto) -> dict[str, Any]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def test_everything_that_is_not_cut_stays_byte_for_byte() -> None:
    model = ZOO["several_in_turn"].model()
    model.producer_version, model.domain, model.model_version, model.doc_string = "7", "here", 3, "a net"
    model.graph.doc_string = "its graph"
    onnx.helper.set_model_props(model, {"author": "somebody", "stride": "32"})
    model.graph.node[0].doc_string = "the first"
    model.graph.node[2].metadata_props.add(key="k", value="v")
    model.graph.initializer[0].doc_string = "kept too"
    after = folded_model(model)
    kept = [n for n in model.graph.node if n.op_type != "BatchNormalization"]
    assert [n.name for n in after.graph.node] == [n.name for n in kept]
    assert after.graph.node[1].SerializeToString() != kept[1].SerializeToString()  # it reads another value
    assert after.graph.node[1].metadata_props == kept[1].metadata_props
    assert after.graph.node[0].doc_string == "the first"
    assert after.graph.initializer[0].doc_string == "kept too"
    for field in (
        "ir_version",
        "opset_import",
        "producer_name",
        "producer_version",
        "domain",
        "model_version",
        "doc_string",
        "metadata_props",
    ):
        assert getattr(after, field) == getattr(model, field), field
    assert after.graph.input == model.graph.input
    assert after.graph.output == model.graph.output
    assert (after.graph.name, after.graph.doc_string) == (model.graph.name, model.graph.doc_string)
    assert sorted(initializers(after)) == ["v", "v_bias", "w", "w_bias"]


def test_a_missing_bias_is_named_after_the_weight() -> None:
    after = folded_model(ZOO["conv_named_weight"].model())
    assert list(after.graph.node[0].input) == ["x", "conv.weight", "conv.bias"]


def test_a_name_that_is_taken_is_left_to_its_owner() -> None:
    model = ZOO["conv"].model()
    model.graph.node.append(onnx.helper.make_node("Relu", ["y"], ["w_bias"]))
    model.graph.output.append(onnx.helper.make_tensor_value_info("w_bias", 1, [2, 6, 6, 6]))
    after = folded_model(model)
    assert list(after.graph.node[0].input) == ["x", "w", "w_bias_2"]
    onnx.checker.check_model(after, full_check=True)


def test_a_matmul_without_a_bias_gets_an_add_that_bears_its_name() -> None:
    model = ZOO["before_matmul"].model()
    after = folded_model(model)
    assert [n.op_type for n in after.graph.node] == ["Sigmoid", "MatMul", "Add"]
    assert after.graph.node[-1].output[0] == "y"


def test_alpha_and_beta_go_into_the_numbers() -> None:
    after = folded_model(ZOO["gemm_alpha_beta"].model())
    assert [a.name for a in after.graph.node[0].attribute] == ["transB"]
    assert initializers(after)["b"].shape == (1, 6)


def test_a_bias_that_others_read_too_is_kept_for_them() -> None:
    model = ZOO["shared_bias_and_statistics"].model()
    after = folded_model(model, merge=False)
    biases = [n.input[2] for n in after.graph.node if n.op_type == "Conv"]
    assert len(set(biases)) == 2
    assert sorted(initializers(after)) == sorted(["w", "v", *biases])


def test_a_tensor_that_a_body_reads_is_not_overwritten() -> None:
    text = """<ir_version: 8, opset_import: ["": 17]>
    n (float[2,4,8,8] x, bool f) => (float[2,6,8,8] y, float[6] z)
    <float[6] b = {1,2,3,4,5,6}, float[6] g = {2,2,2,2,2,2}, float[6] h = {0,0,0,0,0,0},
     float[6] o = {1,1,1,1,1,1}>
    {
        c = Conv(x, w, b)
        y = BatchNormalization(c, g, h, h, o)
        z = If(f) <then_branch = t () => (float[6] p) { p = Identity(b) },
                   else_branch = e () => (float[6] q) { q = Neg(g) }>
    }"""
    model = onnx.parser.parse_model(text)
    model.graph.initializer.append(numpy_helper.from_array(np.ones((6, 4, 1, 1), np.float32), "w"))
    after = folded_model(model)
    assert [n.op_type for n in after.graph.node] == ["Conv", "If"]
    numbers = initializers(after)
    assert np.array_equal(numbers["b"], np.arange(1, 7))
    assert np.array_equal(numbers["g"], np.full(6, 2))
    assert after.graph.node[0].input[2] not in ("b", "g")
    onnx.checker.check_model(after, full_check=True)


def test_a_norm_in_elementary_ops_that_stays_takes_a_map_in_as_mul_and_add() -> None:
    # The planner prefers the weight before it, so the edit is written by hand.
    net = ZOO["decomposed"]
    subject = ir.from_proto(net.model(np.float64))
    _, observed = plan_fold_onnx(subject)
    edit = Edit("scale_input", "m", ("bn", "m"), "m.weight", "m.bias", "norm")
    apply_fold_onnx(observed, Plan("fold", (FoldSite("m", (), (), (edit,)),), ()))
    after = ir.to_proto(subject)
    onnx.checker.check_model(after, full_check=True)
    assert [n.op_type for n in after.graph.node] == ["Conv", "Mul", "Add"]
    before = initializers(net.model(np.float64))
    scale, shift = before["g"].reshape(6, 1, 1), before["h"].reshape(6, 1, 1)
    x = net.feed(np.float64)
    plain = run_exactly(net.model(np.float64), x)["y"].numpy()
    assert difference(torch.from_numpy(scale * plain + shift), run_exactly(after, x)["y"]).relative <= EXACT


def test_an_identity_batch_norm_on_an_input_leaves_an_identity() -> None:
    text = """<ir_version: 8, opset_import: ["": 17]>
    n (float[2,2] x) => (float[2,2] y)
    <float[2] o = {1,1}, float[2] z = {0,0}> { y = BatchNormalization<epsilon=0.0>(x, o, z, z, o) }"""
    after = folded_model(onnx.parser.parse_model(text))
    assert [(n.op_type, list(n.input), list(n.output)) for n in after.graph.node] == [
        ("Identity", ["x"], ["y"])
    ]
    assert not after.graph.initializer


def test_old_files_list_their_initializers_among_the_inputs() -> None:
    after = folded_model(ZOO["opset_7"].model())
    assert {i.name for i in after.graph.input} == {"x", *initializers(after)}
    assert sorted(initializers(after)) == ["w", "w_bias"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_cast_once(dtype: torch.dtype) -> None:
    model = ir.from_proto(ZOO["conv_bias"].model())
    exact = initializers(folded_model(ZOO["conv_bias"].model(np.float64)))
    for value in model.graph.initializers.values():
        value.const_value = to_onnx(torch.from_numpy(value.const_value.numpy().copy()).to(dtype), value.name)
        value.type = ir.TensorType(value.const_value.dtype)
    for value in (*model.graph.inputs, *model.graph.outputs, *(v for n in model.graph for v in n.outputs)):
        value.type = ir.TensorType(model.graph.initializers["w"].const_value.dtype)
    plan, observed = plan_fold_onnx(model)
    apply_fold_onnx(observed, plan)
    assert [site.bn for site in plan.fold_sites] == ["y"]
    got = to_torch(model.graph.initializers["w"].const_value.numpy())
    assert got is not None
    assert got.dtype == dtype
    # Rounded when stored at first (W, γ, σ²) and when stored anew: four roundings of half an eps each.
    limit = 4 * torch.finfo(dtype).eps / 2
    assert bool(
        (
            (got.double() - torch.from_numpy(exact["w"])).abs() <= limit * torch.from_numpy(exact["w"]).abs()
        ).all()
    )


@pytest.mark.parametrize(
    ("name", "norms"), [("resnet18", 20), ("shufflenet_v2_x0_5", 56), ("mobilenet_v3_small", 34)]
)
def test_what_torch_exports_without_its_optimiser(name: str, norms: int, tmp_path: Path) -> None:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = enliven(torchvision.models.get_model(name, weights=None).eval())
    x = torch.randn(2, 3, 64, 64)
    before, after = tmp_path / "before.onnx", tmp_path / "after.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        torch.onnx.export(
            model,
            (x,),
            str(before),
            dynamo=True,
            optimize=False,
            verbose=False,
            input_names=["x"],
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
        )
    result = fold_onnx(before, after)
    assert (len(result.plan.sites), result.plan.skips) == (norms, ())
    assert result.data_path == tmp_path / "after.onnx.data"
    with torch.no_grad():
        exact = {"y": model.double()(x.double())}
    feed = {"x": x.numpy()}
    own, folded = ({"y": next(iter(run(path, feed).values()))} for path in (before, after))
    limit = noise_limits([exact], [own], 2 * norms, EPS)["y"]
    assert not limit.undecidable
    assert difference(exact["y"], folded["y"]).relative <= limit.limit
