"""The comparison with other folders: what it counts as left, how it judges, and what it found."""

from __future__ import annotations

import copy
import json
import os
import time
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import bntool
from tools.sweeps import peers
from tools.sweeps.fingerprints import Trace, fingerprints, trace_onnx, trace_torch
from tools.sweeps.peer_page import (
    EXPLAINED,
    FILES_RESULTS,
    behind,
    behind_on_files,
    files_section,
    only_bntool,
    only_peers,
    page,
)
from tools.sweeps.peer_tools import BNTOOL, PEERS
from tools.sweeps.processes import in_own_process
from tools.sweeps.sweeping import Results
from tools.sweeps.zoo import randomise


def _net() -> nn.Module:
    """One BatchNorm that folds, one behind a ReLU that does not."""
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 1)
    )
    randomise(net)
    return net.eval()


IMAGE = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def _names(net: nn.Module) -> Any:
    from bntool.graph.inputs import Inputs
    from bntool.observe.eager import observe

    return fingerprints(observe(net, Inputs((IMAGE,))).graph)


def test_a_torch_model_shows_the_batch_norms_that_are_left() -> None:
    net = _net()
    names = _names(net)
    assert list(names) == ["1", "3"]
    assert trace_torch(lambda: net(IMAGE)).left(names) == ["1", "3"]
    folded = bntool.fold(net, IMAGE).model
    trace = trace_torch(lambda: folded(IMAGE))
    assert trace.left(names) == ["3"]
    assert trace.unnamed(names, Trace()) == 0


def test_a_file_shows_the_batch_norms_that_are_left(tmp_path) -> None:
    net = _net()
    names = _names(net)
    path = bntool.export_onnx(net, (IMAGE,), tmp_path / "net.onnx")
    assert trace_onnx(path).left(names) == ["1", "3"]
    folded = bntool.export_onnx(bntool.fold(net, IMAGE).model, (IMAGE,), tmp_path / "folded.onnx")
    assert trace_onnx(folded).left(names) == ["3"]


def _file(tmp_path, nodes: list[Any], **constants: np.ndarray) -> Any:
    value = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 6, None, None]) for name in ("x", "y")
    ]
    tensors = [numpy_helper.from_array(a.astype(np.float32), n) for n, a in constants.items()]
    graph = helper.make_graph(nodes, "g", value[:1], value[1:], tensors)
    path = tmp_path / "made.onnx"
    onnx.save(helper.make_model(graph), path)
    return trace_onnx(path)


SCALE, SHIFT = np.linspace(0.5, 1.0, 6), np.linspace(-0.3, 0.3, 6)
NAMES = {"bn": (SCALE, SHIFT)}
COLUMN = (1, 6, 1, 1)


@pytest.mark.parametrize(
    "node",
    [
        helper.make_node("Mul", ["s", "x"], ["y"]),
        helper.make_node("Conv", ["x", "depthwise"], ["y"], group=6),
        helper.make_node("Div", ["x", "inverse"], ["y"]),
        helper.make_node("Add", ["x", "t"], ["y"]),
    ],
    ids=lambda node: node.op_type,
)
def test_a_batch_norm_in_other_clothes_is_left(tmp_path, node) -> None:
    constants = {
        "s": SCALE.reshape(COLUMN),
        "depthwise": SCALE.reshape(6, 1, 1, 1),
        "inverse": 1 / SCALE.reshape(COLUMN),
        "t": SHIFT.reshape(COLUMN),
    }
    assert _file(tmp_path, [node], **constants).left(NAMES) == ["bn"]


def test_a_shift_right_behind_a_convolution_is_its_bias(tmp_path) -> None:
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"]), helper.make_node("Add", ["c", "t"], ["y"])]
    trace = _file(tmp_path, nodes, w=np.ones((6, 6, 1, 1)), t=SHIFT.reshape(COLUMN))
    assert trace.left(NAMES) == []


def test_a_product_that_is_computed_from_constants_is_seen(tmp_path) -> None:
    nodes = [
        helper.make_node("Reshape", ["s", "shape"], ["column"]),
        helper.make_node("Mul", ["x", "column"], ["y"]),
    ]
    shape = numpy_helper.from_array(np.array(COLUMN, dtype=np.int64), "shape")
    nodes.insert(0, helper.make_node("Constant", [], ["shape"], value=shape))
    assert _file(tmp_path, nodes, s=SCALE).left(NAMES) == ["bn"]


def test_two_layers_composed_are_left_without_a_name(tmp_path) -> None:
    nodes = [helper.make_node("Mul", ["x", "both"], ["y"])]
    trace = _file(tmp_path, nodes, both=(2 * SCALE).reshape(COLUMN))
    assert trace.left(NAMES) == []
    assert trace.unnamed(NAMES, Trace()) == 1
    assert trace.unnamed(NAMES, trace) == 0


def test_a_model_is_measured_and_a_wrong_result_is_not_a_fold(monkeypatch, tmp_path) -> None:
    net = _net()
    monkeypatch.setattr(peers, "make", lambda name, gain: copy.deepcopy(net))
    assert peers.prepare("net", tmp_path)["bn"] == ["1", "3"]
    found = peers.judge("net", "bntool", tmp_path)
    assert (found["status"], found["left"], found["unnamed"]) == ("ok", ["3"], 0)

    def broken(case: Any) -> Any:
        with torch.no_grad():
            case.model[0].weight.mul_(1.001)
        return peers.TOOLS["bntool, module"](case)

    monkeypatch.setitem(peers.TOOLS, "broken", broken)
    assert peers.judge("net", "broken", tmp_path)["status"] == "wrong"


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # said where threads have run before
def test_work_in_a_process_of_its_own_returns_raises_dies_or_runs_out() -> None:
    def broken() -> dict[str, Any]:
        raise ValueError("no")

    assert in_own_process(lambda: {"status": "ok"}, 30) == {"status": "ok"}
    assert in_own_process(broken, 30)["error"] == "ValueError: no"
    assert in_own_process(lambda: os._exit(3), 30)["status"].startswith("died")
    assert in_own_process(lambda: time.sleep(30) or {}, 0.2)["status"] == "time limit"
    large = in_own_process(lambda: {"status": str(torch.zeros(2**32).sum())}, 30, memory=2**33)
    assert large["status"] == "out of memory", large


def _row(**left: Any) -> dict[str, Any]:
    tools: dict[str, Any] = {
        tool: {"status": "ok", "left": ["a", "b"], "unnamed": 0} for tool in (*BNTOOL, *PEERS)
    }
    for tool, found in left.items():
        tools[tool] = {"status": "ok", "left": found, "unnamed": 0} if isinstance(found, list) else found
    return {"model": "zoo:net", "status": "ok", "bn": ["a", "b"], "tools": tools, "versions": {"torch": "2"}}


def test_the_page_says_who_folds_what() -> None:
    ahead = _row(bntool=[])
    assert (only_bntool(ahead), only_peers(ahead), behind(ahead)) == (["a", "b"], {}, False)
    worse = _row(bntool=["a"], ORT=["b"])
    assert (only_bntool(worse), only_peers(worse), behind(worse)) == (["b"], {"a": ["ORT"]}, False)
    assert "not explained" in page({"zoo:net": worse})
    wrong = _row(ORT={"status": "wrong", "left": [], "unnamed": 0, "error_over_noise": 1e6})
    assert (only_peers(wrong), behind(wrong)) == ({}, False)
    assert "| wrong |" in page({"zoo:net": wrong})
    assert behind(_row(ORT=["a"]))


def test_composed_layers_count_as_left() -> None:
    composed = _row(ORT={"status": "ok", "left": [], "unnamed": 2, "error_over_noise": 1.0})
    assert not behind(composed)


SHIPPED = Results(peers.RESULTS).rows


def test_the_shipped_page_is_the_page_of_the_shipped_rows() -> None:
    assert peers.RESULTS.with_suffix(".md").read_text(encoding="utf-8") == page(SHIPPED)


@pytest.mark.parametrize("row", SHIPPED.values(), ids=SHIPPED)
def test_bntool_is_right_and_no_peer_is_ahead(row) -> None:
    assert row["status"] == "ok"
    for tool in BNTOOL:
        assert row["tools"][tool]["status"] == "ok"
    assert not behind(row)
    for name in only_peers(row):
        assert f"{row['model']} {name}" in EXPLAINED


def test_what_rounding_alone_decides_is_measured_with_a_smaller_gain(monkeypatch) -> None:
    gains: list[float] = []

    def examined(name: str, limit: float, gain: float) -> dict[str, Any]:
        gains.append(gain)
        error = "CheckFailed: the fold cannot be checked: rounding alone moves this output by 0.1 of its peak"
        wild = {"status": "failed", "error": error} if name == "wild" else {"status": "undecided"}
        return {"model": name, "tools": {"bntool": {"status": "ok"} if gain < 1 or name == "calm" else wild}}

    monkeypatch.setattr(peers, "_examined", examined)
    assert "gain" not in peers.examine("calm", 1)
    assert peers.examine("wild", 1)["gain"] == peers.examine("undecided", 1)["gain"] == 0.3
    assert gains == [1.0, 1.0, 0.3, 1.0, 0.3]


def _of_file(**left: int | str) -> dict[str, Any]:
    tools = {
        tool: {"status": "ok", "left": n} if isinstance(n, int) else {"status": n} for tool, n in left.items()
    }
    return {"model": "keras-7-0", "status": "ok", "bn": 5, "tools": tools, "versions": {"onnx": "1"}}


def test_a_file_on_which_a_peer_leaves_fewer_is_told() -> None:
    others = dict.fromkeys(("onnxslim", "onnxoptimizer", "ORT", "OpenVINO"), 5)
    good = _of_file(bntool=2, onnxsim="failed", **others)
    bad = _of_file(bntool=2, onnxsim=1, **others)
    wrong = _of_file(bntool="wrong", onnxsim=4, **others)
    assert [behind_on_files(row) for row in (good, bad, wrong)] == [False, True, True]
    assert "leaves at most what the best" in files_section({"keras-7-0": good})
    assert "| onnxsim | 5 | 0 | 1 |" in files_section({"keras-7-0": good})
    assert "left by some peer on: keras-7-0." in files_section({"keras-7-0": bad})


def test_on_no_file_is_bntool_behind() -> None:
    rows = [json.loads(line) for line in FILES_RESULTS.read_text(encoding="utf-8").splitlines()]
    judged = [row for row in rows if row.get("tools")]
    assert len(rows) > 300
    assert not [row["model"] for row in judged if behind_on_files(row)]
    assert not [row["model"] for row in judged if row["tools"]["bntool"]["status"] != "ok"]
