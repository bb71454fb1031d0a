"""Providers by ONNX Runtime's own names, on recorded sessions: what a first run on a GPU goes through."""

from __future__ import annotations

import os

import numpy as np
import onnx
import pytest
import torch

from bntool.core.errors import DeviceError, ExportError, UsageError
from bntool.graph.inputs import Inputs
from bntool.runtime import ort_runner, ready
from bntool.runtime.libraries import CPU, CUDA, TENSORRT
from bntool.runtime.naming import named_providers, options_of, require_known, torch_device_of
from bntool.runtime.ort_runner import OrtRunner
from bntool.runtime.providers import OpenSession, open_session, run_tiny_convolution
from tests.recorded import Recorded

BOTH = f"{TENSORRT},{CUDA}"
NINE = np.full((1, 1, 1, 1), 9.0, np.float32)


@pytest.fixture(autouse=True)
def _same_environment(monkeypatch):
    # What tell_tensorrt sets is taken back after each test.
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")


def test_tensorrt_is_opened_with_the_types_of_the_file_and_cuda_beside_it():
    nodes = {"Conv": TENSORRT, "Gemm": CUDA}
    ort = Recorded(honours=(TENSORRT, CUDA), nodes=nodes, strict_works=True)
    opened = open_session("m.onnx", BOTH, optimize=True, ort=ort)
    assert (opened.provider, opened.cpu_nodes) == (TENSORRT, ())
    ((asked, config),) = ort.created
    assert [name for name, _ in asked] == [TENSORRT, CUDA]
    engine = dict(asked)[TENSORRT]
    assert engine["device_id"] == "0"
    assert {engine[f"trt_{kind}_enable"] for kind in ("fp16", "bf16", "int8", "engine_cache")} == {"0"}
    assert config["session.disable_cpu_ep_fallback"] == "1"
    assert os.environ["NVIDIA_TF32_OVERRIDE"] == "0"
    open_session("m.onnx", BOTH, optimize=True, tf32=True, ort=Recorded(
        honours=(TENSORRT, CUDA), nodes=nodes, strict_works=True, tf32="1"))  # fmt: skip
    assert "NVIDIA_TF32_OVERRIDE" not in os.environ


def test_tensorrt_is_allowed_the_types_that_the_file_holds_and_no_others(tmp_path):
    for kind, on in ((np.float16, ["1", "0"]), (np.float32, ["0", "0"])):
        weight = onnx.numpy_helper.from_array(np.ones(2, kind), "w")
        graph = onnx.helper.make_graph([], "g", [], [], [weight])
        path = tmp_path / "m.onnx"
        onnx.save(onnx.helper.make_model(graph), path)
        ort = Recorded(honours=(TENSORRT,), nodes={"Conv": TENSORRT}, strict_works=True)
        open_session(str(path), TENSORRT, optimize=True, ort=ort)
        engine = dict(ort.created[0][0])[TENSORRT]
        assert [engine["trt_fp16_enable"], engine["trt_bf16_enable"]] == on


def test_cpu_that_is_named_is_allowed_and_still_takes_no_heavy_node():
    ort = Recorded(honours=True, nodes={"Conv": CUDA, "Shape": CPU}, strict_works=False)
    assert open_session("m.onnx", f"{CUDA},{CPU}", optimize=True, ort=ort).cpu_nodes == ("Shape Shape_1",)
    ((asked, config),) = ort.created
    assert asked[-1] == CPU
    assert "session.disable_cpu_ep_fallback" not in config
    ort = Recorded(honours=True, nodes={"Conv": CPU, "Relu": CUDA}, strict_works=False)
    with pytest.raises(DeviceError, match="1 heavy node"):
        open_session("m.onnx", f"{CUDA},{CPU}", optimize=True, ort=ort)


def test_a_provider_that_is_left_out_or_takes_nothing_is_a_device_error(capfd):
    ort = Recorded(honours=(CUDA,), nodes={"Conv": CUDA}, strict_works=True)
    with pytest.raises(DeviceError, match=f"{TENSORRT} was asked for, but ONNX Runtime built") as caught:
        open_session("m.onnx", BOTH, optimize=True, ort=ort)
    assert "tensorrt-cu13" in caught.value.next_step
    ort = Recorded(honours=(TENSORRT, CUDA), nodes={"Conv": CUDA}, strict_works=True)
    with pytest.raises(DeviceError, match="took no node") as caught:
        open_session("m.onnx", BOTH, optimize=True, ort=ort)
    assert caught.value.next_step == f"use --providers {CUDA}"
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("name", "meant"),
    [("CudaExecutionProvider", CUDA), ("cuda", CUDA), ("TensorRT", TENSORRT), ("CPUExecutionProvidr", CPU)],
)
def test_an_unknown_provider_names_the_closest(name, meant):
    with pytest.raises(UsageError, match=f"did you mean {meant}\\?") as caught:
        require_known([name], Recorded(honours=False, nodes={}, strict_works=True))
    assert caught.value.exit_code == 2


def test_one_that_this_build_has_not_and_one_that_leaves_nothing():
    ort = Recorded(honours=False, nodes={}, strict_works=True)
    with pytest.raises(DeviceError, match="was built without it"):
        open_session("m.onnx", "OpenVINOExecutionProvider", optimize=True, ort=ort)
    with pytest.raises(UsageError, match="takes every node"):
        open_session("m.onnx", f"{CPU},{CUDA}", optimize=True, ort=ort)
    assert ort.created == []


def test_devices_are_told_from_providers():
    assert [named_providers(d) for d in ("auto", "cpu", "cuda:1")] == [(), (), ()]
    assert named_providers(BOTH) == (TENSORRT, CUDA)
    assert [torch_device_of(n) for n in ([CPU], [TENSORRT], ["CoreMLExecutionProvider"])] == [
        "cpu", "cuda", "cpu"]  # fmt: skip
    assert options_of("CoreMLExecutionProvider", "0", tf32=False, cuda_graph=False) == {}
    assert options_of(CUDA, "1", tf32=True, cuda_graph=False)["device_id"] == "1"


def test_a_file_that_is_refused_is_no_fault_of_the_device():
    ort = Recorded(honours=True, nodes={}, strict_works=True)
    with pytest.raises(ExportError, match=r"refuses the model: INVALID_GRAPH: no such op\n"):
        open_session("broken.onnx", "cuda", optimize=True, ort=ort)


def test_the_index_of_the_gpu_and_the_session_options():
    ort = Recorded(honours=True, nodes={"Conv": CUDA}, strict_works=True)
    open_session("m.onnx", "cuda:1", optimize=False, ort=ort)
    ((asked, config),) = ort.created
    assert asked[0][1]["device_id"] == "1"
    assert config["session.record_ep_graph_assignment_info"] == "1"
    assert ort.told["use_deterministic_compute"] is True
    assert ort.told["graph_optimization_level"] == ort.GraphOptimizationLevel.ORT_DISABLE_ALL


def test_the_tiny_convolution_is_really_run_and_looked_at():
    good = {"honours": True, "nodes": {"Conv": CUDA}, "strict_works": True}
    assert run_tiny_convolution(Recorded(**good, runs=NINE), "cuda") == CUDA
    with pytest.raises(DeviceError, match=r"gives 3\.0, not 9"):
        run_tiny_convolution(Recorded(**good, runs=NINE / 3), "cuda")
    fault = RuntimeError("CUDNN_STATUS_NOT_INITIALIZED ; GPU=0")
    with pytest.raises(DeviceError, match="does not run on CUDAExecutionProvider: CUDNN_STATUS") as caught:
        run_tiny_convolution(Recorded(**good, runs=fault), "cuda")
    assert "cudnn" in caught.value.next_step


class Port:
    def __init__(self, name: str) -> None:
        self.name, self.type, self.shape = name, "tensor(float)", [1, 2]


class Failing:
    """A session that opens, and fails when it runs."""

    def __init__(self, message: str) -> None:
        self._message = message

    def get_inputs(self) -> list[Port]:
        return [Port("x")]

    def get_outputs(self) -> list[Port]:
        return [Port("y")]

    def run_with_ort_values(self, names, fed):
        raise RuntimeError(self._message)


@pytest.mark.parametrize(
    ("message", "provider", "kind", "step"),
    [
        (
            "Non-zero status code: Failed to allocate memory for requested buffer",
            CUDA,
            DeviceError,
            "smaller",
        ),
        ("CUDA failure 2: out of memory ; GPU=0", CUDA, DeviceError, "smaller"),
        ("CUDNN failure 5000: CUDNN_STATUS_EXECUTION_FAILED", CUDA, DeviceError, "onnxruntime-gpu"),
        ("CUDA failure 700: an illegal memory access", TENSORRT, DeviceError, "onnxruntime-gpu"),
        ("Got invalid dimensions for input: x", CUDA, ExportError, "inputs of the shape"),
        ("Failed to allocate memory", CPU, ExportError, "inputs of the shape"),
    ],
)
def test_what_fails_while_running_is_told_by_whose_fault_it_is(monkeypatch, message, provider, kind, step):
    session = OpenSession(Failing(message), provider)
    monkeypatch.setattr(ort_runner, "open_session", lambda *args, **options: session)
    with pytest.raises(kind) as caught:
        OrtRunner("m.onnx", "cuda").run(Inputs((torch.zeros(1, 2),)))
    assert step in caught.value.next_step
    assert "\n" not in caught.value.what


class Graphed:
    """Stands for `OrtRunner` on CUDA; a CUDA graph of it can be captured or not."""

    provider, device, cpu_nodes, captures = CUDA, "cuda:0", (), True

    def __init__(self, path, device, *, threads, tf32, cuda_graph=False) -> None:
        self.cuda_graph = cuda_graph

    def bound(self, inputs, *, fixed_outputs=False):
        def run() -> None:
            if self.cuda_graph and not self.captures:
                raise ExportError("This session cannot use the graph capture feature")

        return run


def test_a_cuda_graph_is_used_where_it_can_be_and_its_absence_is_told(monkeypatch):
    monkeypatch.setattr(ready, "OrtRunner", Graphed)
    runner, _, note = ready._bound("m.onnx", "cuda", None, 0, False)
    assert (runner.cuda_graph, note) == (True, "CUDA graph")
    monkeypatch.setattr(Graphed, "captures", False)
    runner, _, note = ready._bound("m.onnx", "cuda", None, 0, False)
    assert not runner.cuda_graph
    assert note == "no CUDA graph: This session cannot use the graph capture feature"
    monkeypatch.setattr(Graphed, "cpu_nodes", ("Shape",))
    assert ready._bound("m.onnx", "cuda", None, 0, False)[2] == "no CUDA graph: some nodes stay on the CPU"
