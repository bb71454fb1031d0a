"""ONNX files in odd forms: each command answers alike, and truly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from bntool.cli import run

Image = helper.make_tensor_value_info("x", 1, ["n", 3, "h", "w"])
Said = Callable[..., tuple[int, str]]


@pytest.fixture
def said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Said:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))

    def ask(*words: str) -> tuple[int, str]:
        code = run(list(words))
        out, err = capsys.readouterr()
        return code, out + err

    return ask


def written(dtype: Any = np.float32, *, norm: bool = True, opset: int = 17, **how: Any) -> onnx.ModelProto:
    """A convolution, a BatchNorm and a ReLU, in `m.onnx`."""
    r = np.random.default_rng(0)
    tensors = [numpy_helper.from_array(r.normal(size=(4, 3, 3, 3)).astype(dtype), "W")]
    tensors += [numpy_helper.from_array(r.uniform(0.5, 2, 4).astype(dtype), k) for k in "gbmv" * norm]
    nodes = [helper.make_node("Conv", ["x", "W"], ["c"], name="conv")]
    if norm:
        old = {"is_test": 1} if opset < 7 else {}
        nodes.append(helper.make_node("BatchNormalization", ["c", *"gbmv"], ["d"], name="bn", **old))
    nodes.append(helper.make_node("Relu", ["d" if norm else "c"], ["y"]))
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    x = helper.make_tensor_value_info("x", kind, how.get("axes", ["n", 3, "h", "w"]))
    ir_version, inputs = (3 if opset < 9 else 8), [x]
    if ir_version < 4:
        inputs += [helper.make_tensor_value_info(t.name, kind, list(t.dims)) for t in tensors]
    y = helper.make_tensor_value_info("y", kind, how.get("out", ["n", 4, "i", "j"]))
    graph = helper.make_graph(nodes, "g", inputs, [y], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)
    onnx.save(model, "m.onnx")
    return model


def test_a_type_that_onnx_runtime_does_not_know_is_judged_by_the_reference_implementation(
    said: Said,
) -> None:
    written(np.float64)
    assert said("fold", "m.onnx")[0] == 0
    code, text = said("verify", "m.onnx", "m_folded.onnx")
    assert (code, "ONNX Runtime cannot run this file" in text) == (0, True), text
    model = onnx.load("m_folded.onnx")
    weight = next(t for t in model.graph.initializer if t.dims == [4, 3, 3, 3])
    off = numpy_helper.to_array(weight).copy()
    off[0] *= 1 + 1e-6
    weight.CopyFrom(numpy_helper.from_array(off, weight.name))
    onnx.save(model, "off.onnx")
    assert said("verify", "m.onnx", "off.onnx")[0] == 1
    written(np.float64, norm=False)
    assert said("insert", "m.onnx", "-o", "i.onnx")[0] == 0


def test_an_axis_of_size_minus_one_is_open(said: Said) -> None:
    written(axes=[-1, 3, -1, -1], out=[-1, 4, -1, -1])
    for words in (
        ("summary", "m.onnx"),
        ("fold", "m.onnx"),
        ("verify", "m.onnx"),
        ("insert", "m_folded.onnx"),
    ):
        code, text = said(*words)
        assert (code, "-1x" in text) == (0, False), text


def test_inputs_of_a_check_are_of_a_size_that_the_file_takes(said: Said) -> None:
    """A recogniser that squeezes the height away takes one height alone, whatever it declares."""
    model = written(norm=False, out=["n", 4, "j"])
    model.graph.node[-1].output[0] = "z"
    model.graph.initializer.append(numpy_helper.from_array(np.array([2], np.int64), "two"))
    model.graph.node.append(helper.make_node("Squeeze", ["z", "two"], ["y"]))
    model.graph.input[0].type.tensor_type.shape.dim[3].dim_value = 20
    onnx.save(model, "m.onnx")
    assert said("insert", "m.onnx")[0] == 1  # none of the heights that are tried
    pooled = helper.make_node("AveragePool", ["x"], ["p"], kernel_shape=[32, 1], strides=[32, 1])
    model.graph.node.insert(0, pooled)
    model.graph.node[1].input[0] = "p"
    onnx.save(model, "m.onnx")
    assert said("insert", "m.onnx")[0] == 0  # 96 is the one that leaves 1


def test_old_opsets_are_refused_alike(said: Said) -> None:
    written(opset=6, axes=[1, 3, 9, 9], out=[1, 4, 7, 7])
    for words in (("fold",), ("insert",), ("verify",)):
        code, text = said(*words, "m.onnx")
        assert (code, "bntool export m.onnx --opset 17 converts it" in text) == (3, True), text
    assert said("export", "m.onnx", "--opset", "17")[0] == 0
    assert said("fold", "m_opset17.onnx")[0] == 0


def test_local_functions_are_converted_with_the_file(said: Said) -> None:
    model = written()
    body = list(model.graph.node)
    del model.graph.node[:]
    names = ["x", "W", *"gbmv"]
    model.graph.node.append(helper.make_node("block", names, ["y"], domain="own"))
    model.opset_import.append(helper.make_opsetid("own", 1))
    imports = [helper.make_opsetid("", 17)]
    model.functions.append(helper.make_function("own", "block", names, ["y"], body, imports))
    onnx.save(model, "m.onnx")
    code, text = said("export", "m.onnx", "--opset", "19")
    assert code == 0, text


def test_data_that_are_cut_and_files_that_are_none_are_told_alike(said: Said) -> None:
    model = written()
    onnx.save(model, "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    with Path("m.data").open("r+b") as file:
        file.truncate(300)
    for command in ("inspect", "summary", "fold", "insert", "verify"):
        code, text = said(command, "m.onnx")
        assert (code, "from beyond the end of m.data" in text) == (3, True), text
        assert "download or copy the data again" in text
    Path("cut.onnx").write_bytes(model.SerializeToString()[:-30])
    for command in ("inspect", "summary", "fold", "insert", "verify"):
        code, text = said(command, "cut.onnx")
        assert (code, "cut.onnx" in text) == (3, True), (command, text)
