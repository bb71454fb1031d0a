from __future__ import annotations

import onnx
import pytest
import torch
from torch import nn

from bntool.core.errors import CheckFailed, DeviceError, ExportError
from bntool.graph.inputs import Inputs
from bntool.runtime import providers
from bntool.runtime.assignments import NodeAssignment, prove_heavy_nodes
from bntool.runtime.libraries import CPU, CUDA, explain_missing_cuda
from bntool.runtime.ort_runner import OrtRunner
from bntool.runtime.providers import open_session
from bntool.runtime.torch_runner import TorchRunner, float32_products
from tests.recorded import Recorded


@pytest.fixture
def onnx_file(tmp_path):
    helper, proto = onnx.helper, onnx.TensorProto
    weight = onnx.numpy_helper.from_array(torch.ones(2, 1, 3, 3).numpy(), "w")
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"], name="conv"), helper.make_node("Relu", ["y"], ["z"])],
        "g",
        [helper.make_tensor_value_info("x", proto.FLOAT, ["batch", 1, 4, 4])],
        [helper.make_tensor_value_info("z", proto.FLOAT, None)],
        [weight],
    )
    path = tmp_path / "tiny.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_strict_session_proves_all_nodes_on_cuda(capfd):
    ort = Recorded(honours=True, nodes={"Conv": CUDA, "Relu": CUDA}, strict_works=True)
    opened = open_session("m.onnx", "cuda", optimize=True, ort=ort)
    assert (opened.provider, opened.cpu_nodes) == (CUDA, ())
    (asked, config), *more = ort.created
    assert not more
    assert asked == [(CUDA, {"device_id": "0", "use_tf32": "0", "cudnn_conv_algo_search": "DEFAULT"})]
    assert config["session.disable_cpu_ep_fallback"] == "1"
    assert capfd.readouterr().out == ""


def test_shape_ops_on_the_cpu_are_listed_and_allowed():
    ort = Recorded(honours=True, nodes={"Conv": CUDA, "Shape": CPU, "Gather": CPU}, strict_works=False)
    opened = open_session("m.onnx", "cuda", optimize=True, ort=ort)
    assert opened.provider == CUDA
    assert opened.cpu_nodes == ("Shape Shape_1", "Gather Gather_1")
    assert "session.disable_cpu_ep_fallback" not in ort.created[1][1]


@pytest.mark.parametrize(
    "op",
    ["Conv", "ConvTranspose", "Gemm", "MatMul", "BatchNormalization", "FusedConv", "FusedMatMul", "NhwcConv"],
)
def test_a_heavy_node_on_the_cpu_is_a_device_error(op):
    ort = Recorded(honours=True, nodes={"Relu": CUDA, op: CPU}, strict_works=False)
    with pytest.raises(DeviceError, match=op) as caught:
        open_session("m.onnx", "cuda", optimize=True, ort=ort)
    assert caught.value.exit_code == 5
    assert caught.value.where == f"{op}_1"


def test_no_recorded_assignment_is_no_proof():
    with pytest.raises(DeviceError, match="not proved"):
        prove_heavy_nodes([], CUDA)
    assert prove_heavy_nodes([NodeAssignment("Convolve", "a", CPU)], CUDA) == ("Convolve a",)


def test_cuda_that_quietly_becomes_cpu_is_a_device_error(capfd):
    ort = Recorded(honours=False, nodes={"Conv": CPU}, strict_works=False)
    with pytest.raises(DeviceError, match="built a CPUExecutionProvider session") as caught:
        open_session("m.onnx", "cuda", optimize=True, ort=ort)
    assert "onnxruntime-gpu[cuda,cudnn]" in caught.value.next_step
    assert "--device cpu" in caught.value.next_step
    assert caught.value.where
    assert capfd.readouterr().out == ""


def test_an_option_that_cuda_did_not_take_is_a_device_error():
    ort = Recorded(honours=True, nodes={"Conv": CUDA}, strict_works=True, tf32="1")
    with pytest.raises(DeviceError, match="use_tf32=0"):
        open_session("m.onnx", "cuda", optimize=True, ort=ort)
    assert open_session("m.onnx", "cuda", optimize=True, tf32=True, ort=ort).provider == CUDA


def test_auto_says_why_it_took_the_cpu(monkeypatch):
    monkeypatch.setattr(providers, "why_no_cuda", lambda: "no driver")
    ort = Recorded(honours=True, nodes={"Conv": CPU}, strict_works=True)
    opened = open_session("m.onnx", "auto", optimize=True, ort=ort)
    assert (opened.provider, opened.note) == (CPU, "CPU used: no driver")
    monkeypatch.setattr(providers, "why_no_cuda", lambda: "")
    opened = open_session("m.onnx", "auto", optimize=True, ort=ort)
    assert opened.provider == CPU  # the recorded Conv is on the CPU, so CUDA is not proved
    assert "heavy node" in opened.note


def test_an_unknown_device_is_refused():
    with pytest.raises(DeviceError, match="unknown device"):
        open_session("m.onnx", "tpu", optimize=True)


def test_the_missing_library_is_named():
    ort = Recorded(honours=False, nodes={}, strict_works=False)
    assert "libonnxruntime_providers_shared" in explain_missing_cuda(ort) or ".dll" in explain_missing_cuda(
        ort
    )
    ort.get_available_providers = lambda: [CPU]
    assert "without CUDA" in explain_missing_cuda(ort)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_cuda_is_refused_and_auto_uses_the_cpu(onnx_file, capfd):
    with pytest.raises(DeviceError) as caught:
        OrtRunner(onnx_file, "cuda")
    assert caught.value.where
    runner = OrtRunner(onnx_file, "auto")
    assert (runner.device, runner.provider) == ("cpu", CPU)
    assert runner.note.startswith("CPU used: ")
    with pytest.raises(DeviceError, match="torch cannot use it"):
        TorchRunner(nn.Linear(2, 2), "cuda")
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("optimize", [False, True])
def test_ort_runs_and_reads_back_its_provider(onnx_file, optimize):
    runner = OrtRunner(onnx_file, "cpu", optimize=optimize)
    x = torch.ones(2, 1, 4, 4)
    (y,) = runner.run(Inputs((x,))).values()
    assert torch.equal(y, torch.full((2, 2, 2, 2), 9.0))  # nine ones, summed exactly
    assert runner.provider == CPU
    assert runner.label.endswith(f"(optimisations {'on' if optimize else 'off'})")
    assert runner.accepts(Inputs((x,)))
    assert not runner.accepts(Inputs((torch.ones(2, 1, 5, 5),)))


def test_inputs_are_matched_by_name_and_else_in_order(onnx_file):
    runner = OrtRunner(onnx_file, "cpu")
    x = torch.rand(1, 1, 4, 4)
    (by_name,) = runner.run(Inputs((), {"unused": torch.zeros(3), "x": x})).values()
    (in_order,) = runner.run(Inputs((x,))).values()
    assert torch.equal(by_name, in_order)
    with pytest.raises(ExportError, match="the file takes x; given: input_0, input_1"):
        runner.run(Inputs((x, x)))


def test_what_ort_refuses_is_an_export_error_of_one_line(onnx_file, tmp_path):
    junk = tmp_path / "junk.onnx"
    junk.write_bytes(b"not a model")
    with pytest.raises(ExportError, match=r"refuses the model: INVALID_PROTOBUF") as caught:
        OrtRunner(junk, "cpu")
    assert "\n" not in caught.value.what
    with pytest.raises(ExportError, match="cannot run the file on 1x1x5x5"):
        OrtRunner(onnx_file, "cpu").run(Inputs((torch.ones(1, 1, 5, 5),)))


class Modes(nn.Module):
    """Draws a random number in forward, and objects to a call of train()."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(3)
        self.drop = nn.Dropout(0.5)

    def train(self, mode: bool = True) -> Modes:
        raise AssertionError("train() was called")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.bn(x)) + torch.rand(1)


def test_the_torch_runner_leaves_no_trace():
    model = Modes()
    model.bn.training = False
    x = torch.randn(4, 3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state, flags = (
        torch.get_rng_state(),
        [torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()],
    )
    runner = TorchRunner(model)
    first, second = runner.run(Inputs((x,)))["output"], runner.run(Inputs((x,)))["output"]
    assert torch.equal(first, second)
    assert [m.training for m in (model, model.bn, model.drop)] == [True, False, True]
    assert torch.equal(torch.get_rng_state(), state)
    assert [torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()] == flags
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert (runner.device, runner.provider) == ("cpu", "torch")


def test_a_tensor_kept_by_forward_can_still_be_trained_on():
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)
            self.table: torch.Tensor | None = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.table is None:
                self.table = torch.ones(3)
            return self.linear(x * self.table)

    model = Keeps()
    TorchRunner(model).run(Inputs((torch.randn(2, 3),)))
    model(torch.randn(2, 3)).sum().backward()
    assert model.linear.weight.grad is not None


def test_another_dtype_runs_a_copy():
    model = nn.Linear(3, 2)
    out = TorchRunner(model, dtype=torch.float64).run(Inputs((torch.randn(2, 3),)))["output"]
    assert out.dtype == torch.float64
    assert model.weight.dtype == torch.float32


def test_a_model_that_cannot_be_copied_is_an_error_of_the_user():
    class Stubborn(nn.Linear):
        def __deepcopy__(self, memo):
            raise TypeError("not to be copied")

    with pytest.raises(CheckFailed, match="cannot be copied"):
        TorchRunner(Stubborn(3, 2), dtype=torch.float64)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_tf32_is_as_asked_inside_and_restored_after(precision):
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    found = (torch.get_float32_matmul_precision(), matmul.fp32_precision, cudnn.allow_tf32)
    try:
        torch.set_float32_matmul_precision(precision)
        before = (matmul.allow_tf32, matmul.fp32_precision, cudnn.allow_tf32)
        for on, kind in ((False, "ieee"), (True, "tf32")):
            with float32_products(tf32=on):
                assert (matmul.allow_tf32, cudnn.allow_tf32) == (on, on)
                assert (matmul.fp32_precision, cudnn.conv.fp32_precision) == (kind, kind)
        assert torch.get_float32_matmul_precision() == precision
        assert (matmul.allow_tf32, matmul.fp32_precision, cudnn.allow_tf32) == before
    finally:
        torch.set_float32_matmul_precision(found[0])
        matmul.fp32_precision = found[1]
        assert cudnn.allow_tf32 == found[2]


def test_a_cuda_graph_and_threads_are_asked_of_the_session():
    ort = Recorded(honours=True, nodes={"Conv": CUDA}, strict_works=True)
    opened = open_session("m.onnx", "cuda", optimize=True, cuda_graph=True, threads=3, ort=ort)
    assert opened.provider == CUDA
    ((asked, _),) = ort.created
    assert asked[0][1]["enable_cuda_graph"] == "1"
