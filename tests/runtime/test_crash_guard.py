"""A file that ends ONNX Runtime by a signal: bntool lives, and says which file and where."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from bntool.cli import run
from bntool.core.errors import ExportError
from bntool.runtime import crash_guard
from bntool.verifying.onnx_cutting import node_that
from tests.subjects.test_onnx_corners import CONV, RELU, stored, write

OUTPUTS: dict[str, tuple[int, list[object]]] = {"y": (TensorProto.FLOAT, [1, 8, 7, 7])}


def test_a_file_that_ends_onnxruntime_is_exit_6(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A BatchNormalization of opset 9 that names its further outputs with nothing, as the format lets it."""
    norm = helper.make_node("BatchNormalization", ["c", *"gbmv"], ["d", "", "", "", ""], name="bn")
    path = write(tmp_path / "m.onnx", [CONV, norm, RELU], stored(), OUTPUTS, opset=9)
    if not crash_guard._ending(path, {}):
        pytest.skip("this ONNX Runtime survives it")
    for command in ("fold", "verify"):
        assert run([command, str(path)]) == 6
        assert "ends ONNX Runtime itself (SIG" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_a_process_that_ends_is_told_and_replaced(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", [CONV, RELU_OF_CONV], stored(), OUTPUTS)
    process = crash_guard._process()
    process.kill()
    with pytest.raises(ExportError, match=r"ends ONNX Runtime itself \(SIGKILL\)") as caught:
        crash_guard.require_survival(path)
    assert caught.value.exit_code == 6
    onnx.save(onnx.load(path), tmp_path / "same.onnx")
    crash_guard.require_survival(tmp_path / "same.onnx")
    assert crash_guard._process() is not process


RELU_OF_CONV = helper.make_node("Relu", ["c"], ["y"], name="relu")


def test_the_node_is_found_by_parts_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", [CONV, RELU_OF_CONV], stored(), OUTPUTS)
    assert node_that(path, lambda part: True) == "at conv, Conv"
    assert node_that(path, lambda part: len(onnx.load(part).graph.node) == 2) == "at relu, Relu"
