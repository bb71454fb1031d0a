"""Sizes that no inference tells: they are seen in runs of the file, on what the user asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from bntool.cli import run
from bntool.files.onnx_files import open_onnx
from bntool.observe.onnx_shapes import infer, sizes_of
from bntool.subjects.onnx import OnnxSubject
from tests.subjects.test_onnx_corners import CONV, NORM, RELU, nodes_of, stored
from tests.subjects.test_onnx_forms import Y

node, info = helper.make_node, helper.make_tensor_value_info


def integers(name: str, *numbers: int) -> TensorProto:
    return numpy_helper.from_array(np.array(numbers, dtype=np.int64), name)


def save(path: Path, nodes: list[Any], tensors: list[TensorProto], shape: Any = ("n", 3, "h", "w")) -> Path:
    x = info("x", TensorProto.FLOAT, shape)
    graph = helper.make_graph(nodes, "g", [x], [Y], [*stored(), *tensors])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def folded(path: Path, *words: str) -> int:
    return run(["fold", str(path), "--force", "-o", str(path.with_name("folded.onnx")), *words])


@pytest.mark.parametrize("shape", [("n", "c", "h", "w"), None], ids=["channels", "rank"])
def test_what_an_input_leaves_open_is_what_its_layer_asks_for(tmp_path: Path, shape: Any) -> None:
    path = save(tmp_path / "m.onnx", [CONV, NORM, RELU], [], shape)
    assert folded(path) == 0
    assert nodes_of(tmp_path / "folded.onnx") == ["Conv", "Relu"]
    assert run(["verify", str(path)]) == 0


def only_of_one_size(path: Path) -> Path:
    """The map is 8·20·30 numbers, or the file does not run."""
    nodes = [CONV, node("Reshape", ["c", "flat"], ["f"]), node("Reshape", ["f", "map"], ["e"])]
    norm = node("BatchNormalization", ["e", *"gbmv"], ["d"], name="bn")
    shapes = [integers("flat", -1, 8, 600), integers("map", -1, 8, 20, 30)]
    return save(path, [*nodes, norm, RELU], shapes)


def test_a_file_that_takes_one_size_folds_on_the_input_that_is_given(tmp_path: Path) -> None:
    path = only_of_one_size(tmp_path / "m.onnx")
    assert folded(path) == 4
    assert folded(path, "--input", "1x3x22x32") == 0
    assert nodes_of(tmp_path / "folded.onnx") == ["Conv", "Reshape", "Reshape", "Relu"]


@pytest.mark.parametrize("line", ["--input y:1x3x22x32", "--input 1x3x22x32 --input 1x2"])
def test_an_input_that_the_file_has_not_is_an_error(tmp_path: Path, line: str) -> None:
    assert folded(only_of_one_size(tmp_path / "m.onnx"), *line.split()) == 2


def test_what_inference_does_not_tell_is_seen_in_a_run(tmp_path: Path) -> None:
    """An op of another domain in the middle, whose readers ask nothing."""
    nodes = [
        node("BiasGelu", ["x", "bias"], ["q"], domain="com.microsoft"),
        node("Relu", ["q"], ["r"]),
        node("Conv", ["r", "W"], ["c"], name="conv"),
        NORM,
        RELU,
    ]
    path = save(
        tmp_path / "m.onnx", nodes, [numpy_helper.from_array(np.ones(9, np.float32), "bias")], (1, 3, 9, 9)
    )
    assert "r" in infer(open_onnx(path).model).unsure
    subject = OnnxSubject(path)
    assert subject.observed.graph.of_kind("conv")
    shapes = sizes_of(subject.file.model, 0, subject._seen())
    assert (shapes.sizes["r"], shapes.sizes["c"], shapes.unsure) == ((1, 3, 9, 9), (1, 8, 7, 7), set())
    assert "Relu" not in [op.kind for op in subject.observed.graph.ops]
    subject.read_as(run=False)
    assert "Relu" in [op.kind for op in subject.observed.graph.ops]
    assert folded(path) == 0
