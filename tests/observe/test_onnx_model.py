"""What the ONNX front end sees: constants, shapes under open axes, layers of several nodes, bodies."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from bntool.core.reasons import Reason
from bntool.observe.onnx_model import OnnxObservation, observe_onnx
from bntool.observe.onnx_shapes import infer
from bntool.pipeline.onnx_folding import plan_fold_onnx
from tests.onnx_zoo import ONNX_ZOO, OnnxNet

ZOO = {net.name: net for net in ONNX_ZOO}


def parsed(text: str, tensors: dict[str, Any] | None = None, ir_version: int = 8) -> ir.Model:
    model = onnx.parser.parse_model(text)
    model.ir_version = ir_version
    for name, array in (tensors or {}).items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    return ir.from_proto(model)


def graph(body: str, inputs: str = "float[2,4,8,8] x", opset: int = 17, domains: str = "") -> str:
    return f'<ir_version: 8, opset_import: ["": {opset}{domains}]> g ({inputs}) => (float[N] y) {{ {body} }}'


def numbers(*shape: int) -> Any:
    return np.random.default_rng(0).uniform(0.5, 1.5, shape).astype(np.float32)


def norm_tensors(channels: int) -> dict[str, Any]:
    return {name: numbers(channels) for name in ("g", "h", "m", "v")}


def kinds(observed: OnnxObservation) -> list[str]:
    return [op.kind for op in observed.graph.ops]


def reasons(model: ir.Model) -> dict[str, Reason]:
    plan, _ = plan_fold_onnx(model)
    return {skip.name: skip.reason for skip in plan.skips}


@pytest.mark.parametrize("net", ONNX_ZOO, ids=lambda net: net.name)
def test_every_shape_that_is_not_open_is_the_one_that_runs(net: OnnxNet) -> None:
    shapes = infer(ir.from_proto(net.model(np.float64)))
    open_axes = any(isinstance(n, str) for shape in net.inputs.values() for n in shape)
    assert shapes.open == open_axes
    if open_axes or not net.has_reference:
        return
    feed = net.feed(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        results = ReferenceEvaluator(net.model(np.float64)).run(None, feed, intermediate=True)
    ran = {name: np.shape(array) for name, array in results.items() if name and array is not None}
    assert ran.keys() <= shapes.sizes.keys()
    assert {name: shapes.sizes[name] for name in ran} == ran


@pytest.mark.parametrize("net", ONNX_ZOO, ids=lambda net: net.name)
def test_ops_come_after_what_they_read(net: OnnxNet) -> None:
    graph = observe_onnx(ir.from_proto(net.model())).graph
    assert [op.id for op in graph.ops] == list(range(len(graph.ops)))
    assert all(v.producer is None or v.producer < reader for v in graph.values for reader, _ in v.readers)


def test_looking_changes_nothing() -> None:
    model = ir.from_proto(ZOO["dynamic_shuffle"].model())
    before = ir.to_proto(model).SerializeToString()
    plan_fold_onnx(model)
    assert ir.to_proto(model).SerializeToString() == before


def test_open_axes_get_other_sizes_in_each_set() -> None:
    model = ir.from_proto(ZOO["dynamic_image"].model())
    first, second = (observe_onnx(model, sizes=which) for which in (0, 1))
    shapes = [next(iter(o.graph.values)).shape for o in (first, second)]
    assert shapes[0][1] == shapes[1][1] == 4
    assert all(a != b for axis, (a, b) in enumerate(zip(*shapes, strict=True)) if axis != 1)


def test_a_matmul_and_the_add_of_its_bias_are_one_layer() -> None:
    observed = observe_onnx(ir.from_proto(ZOO["matmul_add"].model()))
    assert kinds(observed) == ["matmul", "batch_norm"]
    assert torch.equal(
        observed.graph.tensors["m.bias"],
        torch.from_numpy(
            numpy_helper.to_array(
                next(t for t in ZOO["matmul_add"].model().graph.initializer if t.name == "b")
            )
        ),
    )


def test_elementary_ops_behind_a_convolution_are_one_batch_norm() -> None:
    observed = observe_onnx(ir.from_proto(ZOO["decomposed_in_full"].model()))
    assert kinds(observed) == ["conv", "absorbed", "absorbed", "absorbed", "batch_norm"]
    assert observed.graph.modules["d"].role == "norm"


def test_what_a_body_reads_is_read() -> None:
    model = parsed(
        graph(
            """c = Conv(x, w)
            b = BatchNormalization(c, g, h, m, v)
            y = If(f) <then_branch = t () => (float[N] p) { p = Relu(c) },
                       else_branch = e () => (float[N] q) { q = Relu(b) }>""",
            "float[2,4,8,8] x, bool f",
        ),
        {"w": numbers(6, 4, 3, 3), **norm_tensors(6)},
    )
    observed = observe_onnx(model)
    assert kinds(observed) == ["conv", "batch_norm", "relu", "relu", "If"]
    assert reasons(model) == {"b/BatchNormalization": Reason.OUTPUT_USED_ELSEWHERE}


def test_batch_norms_in_bodies_and_functions_have_a_verdict() -> None:
    model = parsed(
        """<ir_version: 8, opset_import: ["": 17, "own": 1]>
        g (float[2,4,8,8] x, bool f) => (float[2,4,8,8] y)
        <float[4] g = {1,1,1,1}, float[4] h = {0,0,0,0}>
        {
            z = If(f) <then_branch = t () => (float[2,4,8,8] p) { p = BatchNormalization(x, g, h, h, g) },
                       else_branch = e () => (float[2,4,8,8] q) { q = Identity(x) }>
            y = own.normed(z, g, h)
        }
        <domain: "own", opset_import: ["": 17]>
        normed (z, g, h) => (y) { y = BatchNormalization(z, g, h, h, g) }"""
    )
    plan, observed = plan_fold_onnx(model)
    assert kinds(observed) == ["batch_norm", "identity", "If", "own::normed"]
    assert {s.name: s.reason for s in plan.skips} == {
        "p/BatchNormalization": Reason.REACHES_INPUT,
        "y/BatchNormalization": Reason.FUNCTIONAL,
    }
    assert "own::normed" in plan.skips[1].detail


def test_an_initializer_that_the_caller_may_replace_is_no_constant() -> None:
    body = "c = Conv(x, w)\ny = BatchNormalization(c, g, h, m, v)"
    model = parsed(
        graph(body, "float[2,4,8,8] x, float[6,4,3,3] w"), {"w": numbers(6, 4, 3, 3), **norm_tensors(6)}
    )
    assert reasons(model) == {"y/BatchNormalization": Reason.WEIGHT_COMPUTED}


def test_a_quantised_weight_is_left_alone() -> None:
    body = "d = DequantizeLinear(q, s)\nc = Conv(x, d)\ny = BatchNormalization(c, g, h, m, v)"
    tensors = {"q": np.ones((6, 4, 3, 3), np.int8), "s": np.float32(0.1), **norm_tensors(6)}
    assert reasons(parsed(graph(body), tensors)) == {"y/BatchNormalization": Reason.QUANTIZED}


def test_quantised_data_stops_every_map() -> None:
    body = """c = Conv(x, w)
    q = QuantizeLinear(c, s)
    d = DequantizeLinear(q, s)
    y = BatchNormalization(d, g, h, m, v)"""
    tensors = {"w": numbers(6, 4, 3, 3), "s": np.float32(0.1), **norm_tensors(6)}
    assert reasons(parsed(graph(body), tensors)) == {"y/BatchNormalization": Reason.QUANTIZED}


def test_a_convolution_behind_an_unknown_op_still_takes_its_batch_norm() -> None:
    body = "u = own.mystery(x)\nc = Conv(u, w)\ny = BatchNormalization(c, g, h, m, v)"
    model = parsed(graph(body, domains=', "own": 1'), {"w": numbers(6, 4, 3, 3), **norm_tensors(6)})
    plan, observed = plan_fold_onnx(model)
    assert kinds(observed) == ["own::mystery", "conv", "batch_norm"]
    assert observed.open
    assert [site.bn for site in plan.fold_sites] == ["y/BatchNormalization"]


@pytest.mark.parametrize("op", ["relu", "add", "conv", "mean"])
def test_an_op_of_another_domain_is_never_taken_for_one_of_ours(op: str) -> None:
    body = f"c = Conv(x, w)\nr = own.{op}(c, c)\ny = BatchNormalization(r, g, h, m, v)"
    model = parsed(graph(body, domains=', "own": 1'), {"w": numbers(6, 4, 3, 3), **norm_tensors(6)})
    assert reasons(model) == {"y/BatchNormalization": Reason.UNKNOWN_OP}


@pytest.mark.parametrize(
    ("op", "reason"),
    [
        ("Mean", Reason.OUTPUT_USED_ELSEWHERE),
        ("Sum", Reason.OUTPUT_USED_ELSEWHERE),
        ("Max", Reason.NONLINEAR),
    ],
)
def test_an_elementwise_op_of_many_is_no_reduction(op: str, reason: Reason) -> None:
    """Of one value three times: the shift can go to one of them only."""
    body = f"c = Conv(x, w)\nr = {op}(c, c, c)\ny = BatchNormalization(r, g, h, m, v)"
    model = parsed(graph(body), {"w": numbers(6, 4, 3, 3), **norm_tensors(6)})
    assert reasons(model) == {"y/BatchNormalization": reason}


def test_old_opsets_say_by_their_outputs_that_they_train() -> None:
    body = "c = Conv(x, w)\ny, rm, rv, sm, sv = BatchNormalization(c, g, h, m, v)"
    model = parsed(graph(body, opset=9), {"w": numbers(6, 4, 3, 3), **norm_tensors(6)})
    assert reasons(model) == {"y/BatchNormalization": Reason.BATCH_STATISTICS}


def test_statistics_per_element_are_not_per_channel() -> None:
    body = "c = Conv(x, w)\ny = BatchNormalization<spatial=0>(c, g, h, m, v)"
    tensors = {name: numbers(6, 6, 6) for name in ("g", "h", "m", "v")}
    model = parsed(graph(body, opset=7), {"w": numbers(6, 4, 3, 3), **tensors})
    assert reasons(model) == {"y/BatchNormalization": Reason.CUSTOM_FORWARD}


@pytest.mark.parametrize(
    ("resize", "folds"),
    [
        ('<mode="cubic">', True),
        ('<mode="linear", antialias=1>', True),
        ('<mode="nearest", coordinate_transformation_mode="tf_crop_and_resize">', False),
    ],
)
def test_resize_is_a_mean_only_in_plain_modes(resize: str, folds: bool) -> None:
    roi = "roi" if "crop" in resize else ""
    body = f"c = Conv(x, w)\nr = Resize{resize}(c, {roi}, s)\ny = BatchNormalization(r, g, h, m, v)"
    tensors = {"s": np.array([1, 1, 2, 2], np.float32), "roi": np.array([0, 0, 0, 0, 1, 1, 2, 2], np.float32)}
    model = parsed(graph(body, opset=18), {"w": numbers(6, 4, 3, 3), **tensors, **norm_tensors(6)})
    assert bool(plan_fold_onnx(model)[0]) == folds


def test_weights_of_layers_that_read_them_differently_are_left_alone() -> None:
    body = """n = BatchNormalization(x, g, h, m, v)
    a = Gemm(n, w)
    b = Gemm<transB=1>(n, w)
    y = Add(a, b)"""
    model = parsed(graph(body, "float[3,5] x"), {"w": numbers(5, 5), **norm_tensors(5)})
    assert reasons(model) == {"n/BatchNormalization": Reason.REACHES_INPUT}
    plan, _ = plan_fold_onnx(model)
    assert "shares" in plan.skips[0].detail


def test_names_that_nodes_lack_are_made_and_unique() -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], name="r"),
        helper.make_node("Relu", ["a"], ["y"], name="r"),
    ]
    info = helper.make_tensor_value_info
    proto = helper.make_model(
        helper.make_graph(nodes, "g", [info("x", 1, [2])], [info("y", 1, [2])]),
        opset_imports=[helper.make_opsetid("", 17)],
    )
    observed = observe_onnx(ir.from_proto(proto))
    assert [op.scope for op in observed.graph.ops] == ["r", "r_2"]


@pytest.mark.parametrize(
    ("clip", "kind"), [("low", "relu"), ("low, high", "relu6"), ("one", "clamp"), ("", "identity")]
)
def test_clip_from_zero_is_a_relu(clip: str, kind: str) -> None:
    tensors = {"low": np.zeros(1, np.float32), "high": np.float32(6), "one": np.float32(1)}
    observed = observe_onnx(parsed(graph(f"y = Clip(x{', ' + clip if clip else ''})"), tensors))
    assert kinds(observed) == [kind]
