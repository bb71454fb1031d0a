"""Corners of the format: outputs that are inputs, masks of a Dropout, weights that are dequantised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import bntool
from bntool.core.options import InsertOptions
from bntool.core.reasons import Reason
from bntool.graph.inputs import Inputs
from bntool.pipeline.onnx_folding import fold_onnx, insert_onnx
from bntool.runtime.onnx_outputs import OutputTraits, error_of
from bntool.runtime.ort_runner import OrtRunner
from bntool.verifying.conditions import Conditions
from bntool.verifying.export_checking import check_onnx
from bntool.verifying.onnx_verifying import check_files, check_itself, seeded_file_inputs
from bntool.verifying.reference import Reference

CONV = helper.make_node("Conv", ["x", "W"], ["c"], name="conv")
NORM = helper.make_node("BatchNormalization", ["c", *"gbmv"], ["d"], name="bn")
RELU = helper.make_node("Relu", ["d"], ["y"], name="relu")


def stored(dtype: str = "float32") -> list[TensorProto]:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(8, 3, 3, 3))
    vectors = {name: rng.uniform(0.5, 2, 8) for name in "gbmv"}
    return [numpy_helper.from_array(t.astype(dtype), name) for name, t in {"W": weight, **vectors}.items()]


def write(
    path: Path,
    nodes: list[Any],
    tensors: list[TensorProto],
    outputs: dict[str, tuple[int, list[Any]]],
    sides: tuple[Any, Any] = (9, 9),
    opset: int = 17,
) -> Path:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, *sides])
    outs = [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in outputs.items()]
    graph = helper.make_graph(nodes, "g", [x], outs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path


def nodes_of(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def test_a_file_whose_input_is_also_an_output_folds_and_takes_batch_norms(tmp_path: Path) -> None:
    outputs = {"y": (1, [1, 8, 7, 7]), "x": (1, [1, 3, 9, 9])}
    path = write(tmp_path / "m.onnx", [CONV, NORM, RELU], stored(), outputs)
    assert not fold_onnx(path, tmp_path / "folded.onnx").skips
    assert nodes_of(tmp_path / "folded.onnx") == ["Conv", "Relu"]
    assert len(insert_onnx(tmp_path / "folded.onnx", tmp_path / "again.onnx").sites) == 1


@pytest.mark.parametrize("seen", [False, True])
def test_the_mask_of_a_dropout_is_no_obstacle(tmp_path: Path, seen: bool) -> None:
    nodes = [
        CONV,
        NORM,
        helper.make_node("Dropout", ["d"], ["e", "mask"]),
        helper.make_node("Identity", ["e"], ["y"]),
    ]
    outputs: dict[str, Any] = {"y": (1, [1, 8, 7, 7])}
    if seen:
        outputs["mask"] = (TensorProto.BOOL, [1, 8, 7, 7])
    path = write(tmp_path / "m.onnx", nodes, stored(), outputs)
    assert not fold_onnx(path, tmp_path / "folded.onnx").skips
    # downstream, past the Dropout
    last = helper.make_node("Conv", ["e", "V"], ["y"], name="last")
    first = helper.make_node("Softmax", ["x"], ["c"], axis=1)
    vectors = [numpy_helper.from_array(numpy_helper.to_array(t)[:3], t.name) for t in stored()[1:]]
    second = numpy_helper.from_array(np.ones((2, 3, 1, 1), "float32"), "V")
    outputs = {name: (kind, [1, 3 if name == "mask" else 2, 9, 9]) for name, (kind, _) in outputs.items()}
    path = write(tmp_path / "n.onnx", [first, NORM, nodes[2], last], [*vectors, second], outputs)
    assert not fold_onnx(path, tmp_path / "down.onnx").skips


def test_a_batch_norm_behind_a_dequantised_weight_has_the_type_of_the_data(tmp_path: Path) -> None:
    whole = np.random.default_rng(0).integers(-90, 90, (8, 3, 3, 3)).astype("int8")
    tensors = {"Wq": whole, "s": np.float32(0.01), "z": np.int8(0)}
    nodes = [
        helper.make_node("DequantizeLinear", ["Wq", "s", "z"], ["W"]),
        CONV,
        helper.make_node("Relu", ["c"], ["y"]),
    ]
    held = [numpy_helper.from_array(np.asarray(t), name) for name, t in tensors.items()]
    path = write(tmp_path / "m.onnx", nodes, held, {"y": (1, [1, 8, 7, 7])})
    assert len(insert_onnx(path, tmp_path / "n.onnx").sites) == 1
    made = {t.name: t.data_type for t in onnx.load(tmp_path / "n.onnx").graph.initializer}
    assert made["conv_bn.weight"] == TensorProto.FLOAT
    x = Inputs((), {"x": torch.randn(1, 3, 9, 9)})
    before, after = (OrtRunner(p, "cpu", optimize=False).run(x)["y"] for p in (path, tmp_path / "n.onnx"))
    assert torch.equal(before, after)


@pytest.mark.parametrize("momentum", [0.03, 0.1])
def test_the_momentum_is_what_onnx_calls_the_rest_of_it(tmp_path: Path, momentum: float) -> None:
    relu = helper.make_node("Relu", ["c"], ["y"])
    path = write(tmp_path / "m.onnx", [CONV, relu], stored()[:1], {"y": (1, [1, 8, 7, 7])})
    insert_onnx(path, tmp_path / "n.onnx", InsertOptions(momentum=momentum))
    (norm,) = [n for n in onnx.load(tmp_path / "n.onnx").graph.node if n.op_type == "BatchNormalization"]
    assert {a.name: a.f for a in norm.attribute}["momentum"] == np.float32(1 - momentum)


HALF = [
    helper.make_node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16),
    helper.make_node("Conv", ["h", "W"], ["c"], name="conv"),
    NORM,
    helper.make_node("Cast", ["d"], ["y"], to=TensorProto.FLOAT),
]
HEAD = [CONV, NORM, helper.make_node("Relu", ["d"], ["e"])]


def test_float16_inside_decides_how_exact_a_float32_output_is(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", HALF, stored("float16"), {"y": (1, [1, 8, "i", "j"])}, ("h", "w"))
    assert not fold_onnx(path, tmp_path / "n.onnx").skips
    assert OutputTraits(path).eps == {"y": 2.0**-10}
    rows = check_itself(path, seeded_file_inputs(path, (1,)), how=Conditions("cpu"))
    assert all(row.passed for row in rows)
    # what is off by more than float16 rounds is still found
    nodes = [HALF[0], HALF[1], helper.make_node("Mul", ["c", "k"], ["d"]), HALF[3]]
    right, off = (
        write(
            tmp_path / f"{factor}.onnx",
            nodes,
            [stored("float16")[0], numpy_helper.from_array(np.float16(factor), "k")],
            {"y": (1, [1, 8, "i", "j"])},
            ("h", "w"),
        )
        for factor in (1.0, 1.05)
    )
    assert not check_files(right, off, seeded_file_inputs(right, (1,)), how=Conditions("cpu"))[0].passed


@pytest.mark.parametrize("kind", ["image", "labels"])
def test_integers_may_fall_the_other_way_as_often_as_rounding_makes_them(tmp_path: Path, kind: str) -> None:
    tensors = [
        *stored(),
        numpy_helper.from_array(np.random.default_rng(1).normal(size=(3, 8, 1, 1)).astype("f") * 0.2, "H"),
        numpy_helper.from_array(np.float32(255), "k"),
    ]
    last = helper.make_node("Conv", ["e", "H"], ["f"])
    ends = {
        "image": [
            helper.make_node("Sigmoid", ["f"], ["s"]),
            helper.make_node("Mul", ["s", "k"], ["t"]),
            helper.make_node("Cast", ["t"], ["y"], to=TensorProto.UINT8),
        ],
        "labels": [helper.make_node("ArgMax", ["f"], ["y"], axis=1)],
    }
    outputs = {"y": (TensorProto.UINT8, [1, 3, "i", "j"]) if kind == "image" else (7, [1, 1, "i", "j"])}
    tensors = tensors if kind == "image" else tensors[:-1]
    path = write(tmp_path / "m.onnx", [*HEAD, last, *ends[kind]], tensors, outputs, ("h", "w"))
    assert not fold_onnx(path, tmp_path / "n.onnx").skips
    moved = [nh for nh in tensors if nh.name != "v"] + [numpy_helper.from_array(np.full(8, 3, "f"), "v")]
    other = write(tmp_path / "other.onnx", [*HEAD, last, *ends[kind]], moved, outputs, ("h", "w"))
    assert not check_files(path, other, seeded_file_inputs(path, (1,)), how=Conditions("cpu"))[0].passed


def test_where_every_output_is_one_number_nothing_is_proved(tmp_path: Path) -> None:
    low = numpy_helper.from_array(np.full((1, 8, 1, 1), -1e4, "f"), "low")
    nodes = [CONV, helper.make_node("Add", ["c", "low"], ["d"]), RELU]
    path = write(tmp_path / "m.onnx", nodes, [stored()[0], low], {"y": (1, [1, 8, 7, 7])})
    inputs = seeded_file_inputs(path, (1,))
    for check in (lambda: check_itself(path, inputs), lambda: check_files(path, path, inputs)):
        assert {row.undecided for row in check()} == {"y: one number everywhere"}


@pytest.mark.parametrize(("bias", "undecided"), [(-4.0, False), (-12.0, True)])
def test_a_head_that_sees_nothing_is_held_to_what_the_runtimes_sigmoid_can(
    tmp_path: Path, bias: float, undecided: bool
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 1, 1), nn.Sigmoid()).eval()
    model[2].bias.data.fill_(bias)
    model[2].weight.data.mul_(0.1)
    path = bntool.export_onnx(model, (torch.randn(1, 3, 16, 16),), tmp_path / "m.onnx")
    inputs = [Inputs((torch.randn(1, 3, 16, 16),))]
    rows = check_onnx(Reference(model, inputs), path)
    assert {row.verdict for row in rows} == {"undecided" if undecided else "passed"}
    assert all(row.agrees for row in rows)
    # a head that is off by more than the runtime errs fails
    model[2].bias.data.add_(4.0)
    assert not check_onnx(Reference(model, inputs), path)[0].passed


def test_only_a_squashing_end_has_slack(tmp_path: Path) -> None:
    end = [helper.make_node("Sigmoid", ["d"], ["s"]), helper.make_node("Transpose", ["s"], ["y"])]
    path = write(tmp_path / "m.onnx", [CONV, NORM, *end], stored(), {"y": (1, [7, 7, 8, 1])})
    assert OutputTraits(path).slack["y"] == 2 * error_of("Sigmoid") < 1e-5
    end = [helper.make_node("Sigmoid", ["d"], ["s"]), helper.make_node("Mul", ["s", "s"], ["y"])]
    path = write(tmp_path / "n.onnx", [CONV, NORM, *end], stored(), {"y": (1, [1, 8, 7, 7])})
    assert OutputTraits(path).slack["y"] == 0.0


def test_weights_that_a_caller_may_replace_are_told_as_that(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", [CONV, NORM, RELU], stored(), {"y": (1, [1, 8, 7, 7])})
    model = onnx.load(path)
    for tensor in stored():
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, 1, list(tensor.dims)))
    onnx.save(model, path)
    (skip,) = fold_onnx(path, tmp_path / "n.onnx").skips
    assert skip.reason is Reason.WEIGHT_COMPUTED
    assert "a caller may replace" in skip.detail


def test_a_constant_behind_a_sigmoid_scales_what_it_may_be_off_by(tmp_path: Path) -> None:
    sigmoid = helper.make_node("Sigmoid", ["c"], ["s"])
    scaled = helper.make_node("Mul", ["k", "s"], ["y"])
    outputs: dict[str, Any] = {"y": (1, [1, 8, 7, 7])}
    constant = numpy_helper.from_array(np.float32(-3), "k")
    path = write(tmp_path / "m.onnx", [CONV, sigmoid, scaled], [stored()[0], constant], outputs)
    plain = write(
        tmp_path / "p.onnx", [CONV, helper.make_node("Sigmoid", ["c"], ["y"])], stored()[:1], outputs
    )
    assert OutputTraits(path).slack["y"] == pytest.approx(3 * OutputTraits(plain).slack["y"])
