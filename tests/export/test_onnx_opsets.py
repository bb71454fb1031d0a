"""Opsets: files that are too old are refused with a way out, and `bntool export` converts."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from bntool.cli import run
from tests.subjects.test_onnx_corners import CONV, RELU, nodes_of, stored

info = helper.make_tensor_value_info


def old_file(path: Path, opset: int = 6) -> Path:
    """As files were then: IR version 3, every weight listed among the inputs."""
    tensors = stored()
    norm = helper.make_node("BatchNormalization", ["c", *"gbmv"], ["d"], name="bn", is_test=1)
    inputs = [info("x", 1, [1, 3, 9, 9]), *(info(t.name, 1, list(t.dims)) for t in tensors)]
    graph = helper.make_graph([CONV, norm, RELU], "g", inputs, [info("y", 1, [1, 8, 7, 7])], tensors)
    opsets = [helper.make_opsetid("", opset)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=3), path)
    return path


def test_opset_6_is_refused_and_the_next_step_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    old_file(Path("old.onnx"))
    for command in ("fold", "insert"):
        assert run([command, "old.onnx"]) == 3
        said = capsys.readouterr().err
        assert "opset 6" in said
    assert [p.name for p in tmp_path.iterdir()] == ["old.onnx"]
    line = said.partition("next:  bntool ")[2].partition(" converts")[0]
    assert run(line.split()) == 0
    assert run(["fold", "old_opset17.onnx", "-o", "folded.onnx"]) == 0
    assert nodes_of(Path("folded.onnx")) == ["Conv", "Relu"]


def test_a_file_is_converted_and_held_to_what_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "m.onnx"
    graph = helper.make_graph(
        [CONV, helper.make_node("Relu", ["c"], ["y"])],
        "g",
        [info("x", TensorProto.FLOAT, ["n", 3, "h", "w"])],
        [info("y", 1, None)],
        stored()[:1],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7), path)
    assert run(["export", str(path)]) == 2
    assert run(["export", str(path), "--opset", "21", "-o", str(tmp_path / "new.onnx")]) == 0
    assert "passed" in capsys.readouterr().out
    made = onnx.load(tmp_path / "new.onnx")
    assert (made.opset_import[0].version, made.ir_version) == (21, 10)
    assert run(["export", str(path), "--opset", "999"]) == 2


def test_a_converter_that_fails_is_exit_6_and_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    graph = helper.make_graph(
        [helper.make_node("Gelu", ["x"], ["y"])], "g", [info("x", 1, [2])], [info("y", 1, [2])]
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    assert run(["export", str(path), "--opset", "13"]) == 6
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_inputs_that_have_a_default_are_frozen_when_asked(tmp_path: Path) -> None:
    tensors = stored()
    inputs = [info("x", 1, [1, 3, 9, 9]), *(info(t.name, 1, list(t.dims)) for t in tensors)]
    norm = helper.make_node("BatchNormalization", ["c", *"gbmv"], ["d"], name="bn")
    graph = helper.make_graph([CONV, norm, RELU], "g", inputs, [info("y", 1, [1, 8, 7, 7])], tensors)
    opsets = [helper.make_opsetid("", 17)]
    path, new = tmp_path / "m.onnx", tmp_path / "new.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    assert run(["fold", str(path), "-o", str(new)]) == 4
    assert run(["fold", str(path), "-o", str(new), "--freeze-inputs"]) == 0
    assert nodes_of(new) == ["Conv", "Relu"]
    assert [value.name for value in onnx.load(new).graph.input] == ["x"]
    assert run(["fold", str(path), "--no-run", "--dry-run"]) == 2
    assert run(["fold", str(path), "--no-run", "--check", "none", "--freeze-inputs", "--dry-run"]) == 0
