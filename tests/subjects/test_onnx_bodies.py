"""BatchNorms in the bodies of If, Loop and Scan fold there, and every branch is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from bntool.pipeline.onnx_folding import fold_onnx, insert_onnx
from bntool.surgery import onnx_wiring

node, info = helper.make_node, helper.make_tensor_value_info
FLOAT = TensorProto.FLOAT
IMAGE = ["n", 4, "h", "w"]


def tensors(stem: str, shape: tuple[int, ...], seed: int) -> list[TensorProto]:
    random = np.random.default_rng(seed)
    made = {f"{stem}.W": random.normal(size=shape) * 0.3}
    made |= {f"{stem}.{k}": random.uniform(0.5, 2, shape[0]) for k in "gbmv"}
    return [numpy_helper.from_array(array.astype(np.float32), name) for name, array in made.items()]


def block(stem: str, source: str, result: str) -> list[Any]:
    """A convolution, its BatchNorm and a Relu; both branches of an If call their values alike."""
    return [
        node("Conv", [source, f"{stem}.W"], ["c"], name=f"{stem}.conv", pads=[1, 1, 1, 1]),
        node("BatchNormalization", ["c", *(f"{stem}.{k}" for k in "gbmv")], ["d"], name=f"{stem}.bn"),
        node("Relu", ["d"], [result], name=f"{stem}.relu"),
    ]


def of_if() -> tuple[Any, list[Any]]:
    bodies = [
        helper.make_graph(
            block(stem, "x", "out"), stem, [], [info("out", FLOAT, IMAGE)], tensors(stem, (4, 4, 3, 3), seed)
        )
        for seed, stem in enumerate(("then", "else"))
    ]
    one = node("If", ["always"], ["y"], name="if", then_branch=bodies[0], else_branch=bodies[1])
    return one, [numpy_helper.from_array(np.array(True), "always")]


def of_loop() -> tuple[Any, list[Any]]:
    inputs = [info("i", TensorProto.INT64, []), info("go", TensorProto.BOOL, []), info("s", FLOAT, IMAGE)]
    nodes = [*block("loop", "s", "t"), node("Identity", ["go"], ["on"])]
    body = helper.make_graph(
        nodes, "body", inputs, [info("on", TensorProto.BOOL, []), info("t", FLOAT, IMAGE)]
    )
    numbers = {"count": np.array(3), "always": np.array(True)}
    stored = [numpy_helper.from_array(array, name) for name, array in numbers.items()]
    # captured from around it
    return node("Loop", ["count", "always", "x"], ["y"], name="loop", body=body), [
        *stored,
        *tensors("loop", (4, 4, 3, 3), 2),
    ]


def of_scan() -> tuple[Any, list[Any]]:
    body = helper.make_graph(
        block("scan", "s", "t"),
        "body",
        [info("s", FLOAT, [4, 4, "h", "w"])],
        [info("t", FLOAT, [4, 4, "h", "w"])],
        tensors("scan", (4, 4, 3, 3), 3),
    )
    return node("Scan", ["x5"], ["y5"], name="scan", body=body, num_scan_inputs=1), []


def save(path: Path, kind: str) -> Path:
    one, stored = {"if": of_if, "loop": of_loop, "scan": of_scan}[kind]()
    nodes = [one]
    if kind == "scan":
        axes = [numpy_helper.from_array(np.array([0]), "axis")]
        stored += axes
        nodes = [node("Unsqueeze", ["x", "axis"], ["x5"]), one, node("Squeeze", ["y5", "axis"], ["y"])]
    image: list[Any] = [4, 4, "h", "w"] if kind == "scan" else IMAGE
    graph = helper.make_graph(nodes, "g", [info("x", FLOAT, image)], [info("y", FLOAT, image)], stored)
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def ops_inside(path: Path) -> list[str]:
    graphs = [a.g for n in onnx.load(path).graph.node for a in n.attribute if a.HasField("g")]
    return [n.op_type for graph in graphs for n in graph.node if n.op_type != "Identity"]


@pytest.mark.parametrize("kind", ["if", "loop", "scan"])
def test_a_batch_norm_in_a_body_folds_there_and_goes_in_again(tmp_path: Path, kind: str) -> None:
    path = save(tmp_path / "m.onnx", kind)
    result = fold_onnx(path, tmp_path / "folded.onnx")
    bodies = 2 if kind == "if" else 1
    assert (len(result.sites), result.skips) == (bodies, ())
    assert ops_inside(tmp_path / "folded.onnx") == ["Conv", "Relu"] * bodies
    assert len(insert_onnx(tmp_path / "folded.onnx", tmp_path / "again.onnx").sites) == bodies
    assert ops_inside(tmp_path / "again.onnx") == ["Conv", "BatchNormalization", "Relu"] * bodies


def test_a_branch_that_does_not_run_is_proved_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The condition is always true; the fold in the else-branch is spoilt."""
    store = onnx_wiring.Wiring.store

    def spoilt(self: Any, old: Any, places: Any, tensor: Any) -> None:
        store(self, old, places, tensor * (1.01 if "else" in str(old.name) else 1))

    monkeypatch.setattr(onnx_wiring.Wiring, "store", spoilt)
    path = save(tmp_path / "m.onnx", "if")
    result = fold_onnx(path, tmp_path / "folded.onnx")
    assert [(skip.name, str(skip.reason)) for skip in result.skips] == [("else.bn", "not-proved")]
    assert [site.bn for site in result.plan.fold_sites] == ["then.bn"]
