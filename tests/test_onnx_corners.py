"""Corners of the format: outputs that are inputs, masks of a Dropout, weights that are dequantised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from bntool.core.options import InsertOptions
from bntool.graph.inputs import Inputs
from bntool.pipeline.onnx_folding import fold_onnx, insert_onnx
from bntool.runtime.ort_runner import OrtRunner

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
