"""The forms of an exported file: versions, open axes, one file or two, half precision, the older exporter."""

from __future__ import annotations

import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import nn
from torch.nn import functional as F

from bntool.core.errors import CheckFailed, ExportError, UsageError
from bntool.export import onnx_writing
from bntool.export.dynamic_axes import DynamicAxes, resized
from bntool.export.onnx_versions import chosen_ir_version, loads_in
from bntool.export.onnx_writing import append_metadata
from bntool.graph.inputs import Inputs
from bntool.precision.casting import stored_as
from bntool.verifying.checking import seeded_batches
from bntool.verifying.export_checking import check_onnx
from bntool.verifying.reference import Reference
from tests.exports import export_onnx

IMAGE = Inputs((torch.zeros(1, 3, 8, 8),))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.ConvTranspose2d(8, 8, 2, bias=False), nn.BatchNorm2d(8),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    ).eval()  # fmt: skip
    for layer in (model[1], model[4]):
        nn.init.normal_(layer.running_mean)
        nn.init.uniform_(layer.running_var, 0.5, 2)
    return model


def passes(model: nn.Module, path, inputs: Inputs = IMAGE, *more: Inputs) -> bool:
    return all(c.passed for c in check_onnx(Reference(model, [*seeded_batches(inputs), *more]), path))


def dims(value: onnx.ValueInfoProto) -> list[str | int]:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


# -- versions ---------------------------------------------------------------------------------------------


def test_the_lowest_versions_that_work_are_the_default(tmp_path):
    result = export_onnx(network(), IMAGE, tmp_path / "m.onnx")
    assert (result.opset, result.ir_version, result.loads_in) == (18, 8, "1.14")
    file = onnx.load(result.path)
    assert (file.opset_import[0].version, file.ir_version) == (18, 8)


def test_an_op_that_needs_a_later_opset_gets_the_lowest_that_has_it(tmp_path, monkeypatch):
    from bntool.export import capturing

    honest = capturing._convert_to
    tried = []

    def from_20(program, opset):
        tried.append(opset)
        if opset < 20:
            raise ExportError("no such op")
        return honest(program, opset)

    monkeypatch.setattr(capturing, "_convert_to", from_20)
    result = export_onnx(network(), IMAGE, tmp_path / "m.onnx")
    assert (tried, result.opset, result.ir_version, result.loads_in) == ([18, 20], 20, 9, "1.17")


def test_ir_versions_follow_the_opset(tmp_path):
    assert [chosen_ir_version(opset, None) for opset in (13, 17, 18, 19, 20, 21, 22)] == [
        7,
        8,
        8,
        9,
        9,
        10,
        10,
    ]
    assert chosen_ir_version(18, 10) == 10
    for wrong in (7, 99):
        with pytest.raises(UsageError, match=f"IR version {wrong} does not go with opset 18"):
            chosen_ir_version(18, wrong)
    result = export_onnx(network(), IMAGE, tmp_path / "m.onnx", ir_version=10)
    assert (onnx.load(result.path).ir_version, result.loads_in) == (10, "1.18")


def test_the_table_of_runtimes():
    assert [loads_in(*pair) for pair in ((13, 7), (17, 8), (18, 8), (18, 9), (21, 10))] == [
        "1.7", "1.12", "1.14", "1.16", "1.18",
    ]  # fmt: skip
    assert loads_in(99, 99) == ""


# -- open axes --------------------------------------------------------------------------------------------


def test_axes_asked_for_are_open_and_named(tmp_path):
    model = network()
    result = export_onnx(model, IMAGE, tmp_path / "m.onnx", dynamic={"input": (2, 3)})
    assert dims(onnx.load(result.path).graph.input[0]) == ["batch", 3, "input_2", "input_3"]
    assert passes(model, result.path, IMAGE, resized(IMAGE, {"input": (2, 3)}, by=5))


def test_axes_of_several_inputs_that_must_be_equal(tmp_path):
    class Adds(nn.Module):
        def forward(self, a, b):
            return {"sum": a + b, "a": a * 2}

    inputs = Inputs((torch.zeros(1, 4), torch.zeros(1, 4)))
    result = export_onnx(Adds(), inputs, tmp_path / "m.onnx", dynamic={"input_0": (1,), "input_1": (1,)})
    graph = onnx.load(result.path).graph
    assert [dims(v) for v in (*graph.input, *graph.output)] == [["batch", "input_0_1"]] * 4
    assert passes(Adds(), result.path, inputs, resized(inputs, {"input_0": (1,), "input_1": (1,)}, by=3))


def test_an_axis_that_cannot_be_open_is_refused_when_asked_for(tmp_path):
    class Splits(nn.Module):
        def forward(self, x):
            return x[:, :4] + x[:, x.shape[1] - 4 :] if x.shape[1] == 8 else x

    with pytest.raises(ExportError, match="cannot leave input:1 open") as caught:
        export_onnx(Splits(), torch.zeros(2, 8), tmp_path / "m.onnx", dynamic={"input": (1,)})
    assert "--dynamic" in caught.value.next_step
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("asked", "says"), [({"inptu": (0,)}, "no input named inptu"), ({"input": (4,)}, "has no axis 4")]
)
def test_an_axis_that_is_not_there_is_a_usage_error(tmp_path, asked, says):
    with pytest.raises(UsageError, match=says) as caught:
        export_onnx(network(), IMAGE, tmp_path / "m.onnx", dynamic=asked)
    assert caught.value.next_step
    assert list(tmp_path.iterdir()) == []


def test_longer_inputs_keep_everything_else():
    inputs = Inputs((torch.zeros(1, 3, 8, 8),), {"tokens": torch.tensor([[1, 5]])})
    longer = resized(inputs, {"tokens": (1,)}, by=4)
    assert longer.args[0].shape == (1, 3, 8, 8)
    assert longer.kwargs["tokens"].shape == (1, 6)
    assert set(longer.kwargs["tokens"].flatten().tolist()) <= {1, 5}
    assert DynamicAxes(asked={"tokens": [1, 1]}).named_for(inputs) == {"tokens": (1,)}


# -- one file or two --------------------------------------------------------------------------------------


def test_external_data_always_and_never(tmp_path, monkeypatch):
    model = network()
    always = export_onnx(model, IMAGE, tmp_path / "m.onnx", external_data="always")
    assert always.data_path == tmp_path / "m.onnx.data"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert passes(model, always.path)
    monkeypatch.setattr(onnx_writing, "SINGLE_FILE_LIMIT", 1000)
    with pytest.raises(ExportError, match="do not fit a single ONNX file"):
        export_onnx(model, IMAGE, tmp_path / "n.onnx", external_data="never")
    assert not (tmp_path / "n.onnx").exists()


def test_metadata_is_added_without_reading_the_file(tmp_path):
    model = network()
    path = export_onnx(model, IMAGE, tmp_path / "m.onnx", metadata={"a": "1"}).path
    before = onnx.load(path)
    append_metadata(path, {"c": "3", "b": "2"})
    after = onnx.load(path)
    assert [(p.key, p.value) for p in after.metadata_props] == [("a", "1"), ("b", "2"), ("c", "3")]
    assert after.graph == before.graph
    assert passes(model, path)


def test_a_full_disk_during_the_export(tmp_path):
    resource = pytest.importorskip("resource")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, old[1]))
    try:
        with pytest.raises(ExportError, match="cannot write the file") as caught:
            export_onnx(network(), IMAGE, tmp_path / "m.onnx")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert caught.value.exit_code == 6
    assert "space" in caught.value.next_step
    assert list(tmp_path.iterdir()) == []


# -- half precision ---------------------------------------------------------------------------------------


def narrow_checks(model, path, dtype=torch.float16):
    reference = Reference(model, seeded_batches(IMAGE)).in_arithmetic(stored_as(dtype))
    return check_onnx(reference, path)


def test_float16_is_judged_by_the_noise_of_float16(tmp_path):
    model = network()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = export_onnx(model, IMAGE, tmp_path / "m.onnx", dtype="fp16")
    assert result.dtype == "fp16"
    graph = onnx.load(result.path).graph
    assert {v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)} == {TensorProto.FLOAT16}
    assert {i.data_type for i in graph.initializer if i.name in before} == {TensorProto.FLOAT16}
    assert all(
        torch.equal(before[k], v) and v.dtype == before[k].dtype for k, v in model.state_dict().items()
    )
    checks = narrow_checks(model, result.path)
    assert all(c.passed for c in checks)
    # float16 rounds at 2^-11: its noise floor lies between half of that, of one op, and a few ops' worth.
    assert all(2**-12 <= c.noise_floor < 2**-7 for c in checks)
    assert torch.get_default_dtype() == torch.float32


def test_a_wrong_float16_file_fails(tmp_path):
    model = network()
    path = export_onnx(model, IMAGE, tmp_path / "m.onnx", dtype="fp16").path
    file = onnx.load(path)
    weight = next(i for i in file.graph.initializer if i.name == "3.weight")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight)[::-1].copy(), weight.name))
    onnx.save(file, path)
    assert not any(c.passed for c in narrow_checks(model, path))


def test_inputs_and_outputs_may_stay_float32(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x, scale, at):
            y = self.net(x) * scale
            return {"y": y, "picked": y[:, at], "same": x}

    model = Two().eval()
    inputs = Inputs((IMAGE.args[0], torch.ones(1, 1), torch.tensor([1, 2])))
    result = export_onnx(model, inputs, tmp_path / "m.onnx", dtype="fp16", keep_io=True, dynamic_batch=False)
    graph = onnx.load(result.path).graph
    kinds = [v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)]
    assert kinds == [TensorProto.FLOAT, TensorProto.FLOAT, TensorProto.INT64, *[TensorProto.FLOAT] * 3]
    assert result.input_names == ("input_0", "input_1", "input_2")
    assert result.output_names == ("y", "picked", "same")
    assert {i.data_type for i in graph.initializer if i.name.startswith("net.")} == {TensorProto.FLOAT16}
    reference = Reference(model, [inputs]).in_arithmetic(stored_as(torch.float16))
    assert all(c.passed for c in check_onnx(reference, result.path))
    with pytest.raises(UsageError, match="--dtype"):
        export_onnx(model, inputs, tmp_path / "n.onnx", keep_io=True)


def test_a_weight_out_of_range_is_named(tmp_path):
    model = network()
    with torch.no_grad():
        model[3].weight[0, 0, 0, 0] = 1e5
    with pytest.raises(ExportError, match=r"3\.weight does not fit float16: it holds 1e\+05") as caught:
        export_onnx(model, IMAGE, tmp_path / "m.onnx", dtype="fp16")
    assert "bf16" in caught.value.next_step
    assert list(tmp_path.iterdir()) == []


def test_activations_out_of_range_are_no_pass(tmp_path):
    model = network()
    with torch.no_grad():
        model[1].weight.fill_(1e4)
        model[4].weight.fill_(1e4)
    path = export_onnx(model, IMAGE, tmp_path / "m.onnx", dtype="fp16").path
    checks = narrow_checks(model, path)
    assert not any(c.passed for c in checks)
    assert "precision does not hold this output" in checks[0].detail


def test_bfloat16_is_written_in_the_opset_that_knows_it(tmp_path):
    result = export_onnx(network(), IMAGE, tmp_path / "m.onnx", dtype="bf16", keep_io=True)
    graph = onnx.load(result.path).graph
    assert result.opset == 22
    own = network().state_dict().keys()
    assert {i.data_type for i in graph.initializer if i.name in own} == {TensorProto.BFLOAT16}
    assert {v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)} == {TensorProto.FLOAT}


# -- the older exporter -----------------------------------------------------------------------------------


class Decides(nn.Module):
    """A decision on a value, a module's own names, equal weights, a keyword, nested outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.volume = nn.Conv3d(3, 4, 3, bias=False)
        self.first, self.second = nn.BatchNorm3d(4), nn.BatchNorm3d(4, affine=False)
        self.head = nn.Linear(4, 2)

    def forward(self, x, *, scale):
        y = self.second(self.first(self.volume(x)))
        if y.abs().sum() > 0:
            y = y * scale
        return {"logits": self.head(y.mean((2, 3, 4))), "a": [y, (y + 1,)]}


VOLUME = Inputs((torch.randn(1, 3, 6, 6, 6),), {"scale": torch.tensor(2.0)})


def test_the_older_exporter_takes_what_torch_export_cannot(tmp_path):
    model = Decides().eval()
    with pytest.raises(ExportError, match="cannot capture") as caught:
        export_onnx(model, VOLUME, tmp_path / "m.onnx")
    assert "--exporter legacy" in caught.value.next_step
    result = export_onnx(model, VOLUME, tmp_path / "m.onnx", exporter="legacy")
    graph = onnx.load(result.path).graph
    assert result.nodes["BatchNormalization"] == 2
    assert result.output_names == ("logits", "a.0", "a.1.0")
    assert result.input_names == ("input", "scale")
    assert dims(graph.input[0]) == ["batch", 3, 6, 6, 6]
    nodes = {node.name: list(node.input) for node in graph.node}
    assert nodes["volume/Conv"] == ["input", "volume.weight"]
    assert nodes["first/BatchNormalization"][1:] == [
        "first.weight", "first.bias", "first.running_mean", "first.running_var",
    ]  # fmt: skip
    assert "second/BatchNormalization" in nodes
    (note,) = result.notes
    assert f"{__file__}, line " in note
    assert not any(module.training for module in model.modules())
    assert passes(model, result.path, VOLUME)
    again = export_onnx(model, VOLUME, tmp_path / "again.onnx", exporter="legacy")
    assert again.path.read_bytes() == result.path.read_bytes()


def test_the_older_exporter_writes_older_opsets(tmp_path, capfd):
    model = network()
    result = export_onnx(
        model, IMAGE, tmp_path / "m.onnx", opset=13, exporter="legacy", dynamic={"input": (2,)}
    )
    assert (result.opset, result.ir_version, result.loads_in) == (13, 7, "1.7")
    assert dims(onnx.load(result.path).graph.input[0]) == ["batch", 3, "input_2", 8]
    assert passes(model, result.path, IMAGE, resized(IMAGE, {"input": (2,)}, by=4))
    assert capfd.readouterr() == ("", "")
    with pytest.raises(ExportError, match="legacy exporter refuses"):
        export_onnx(model, IMAGE, tmp_path / "n.onnx", opset=3, exporter="legacy")


def test_a_refusal_of_the_older_exporter_is_the_error_alone(tmp_path, capfd):
    """torch writes its graph to the process's standard output, where a JSON document may go."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ChannelShuffle(2))
    with pytest.raises(ExportError, match="channel_shuffle"):
        export_onnx(model, IMAGE, tmp_path / "m.onnx", exporter="legacy")
    assert capfd.readouterr() == ("", "")


def test_calls_that_do_the_same_are_one_node_of_a_trace(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            norm = self.norm
            y = F.batch_norm(
                running_mean=norm.running_mean, running_var=norm.running_var, input=x[:, [0, 1, 2, 2]]
            )
            return norm(self.conv(x)) + norm(self.conv(x)).relu() + norm(self.conv(x + 1)) + y

    model = Twice().eval()
    result = export_onnx(model, IMAGE, tmp_path / "m.onnx", exporter="legacy")
    assert result.nodes["BatchNormalization"] == 3
    assert passes(model, result.path, IMAGE)


def test_a_trace_of_inputs_without_a_common_axis_and_of_tied_weights(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight

        def forward(self, x, y):
            return self.second(self.first(x)) + y

    inputs = Inputs((torch.randn(2, 4), torch.randn(1, 4)))
    model = Tied().eval()
    result = export_onnx(model, inputs, tmp_path / "m.onnx", exporter="legacy")
    graph = onnx.load(result.path).graph
    assert [dims(value) for value in graph.input] == [[2, 4], [1, 4]]
    assert any("no common leading axis" in note for note in result.notes)
    assert {"first.weight", "first.bias", "second.bias"} == {i.name for i in graph.initializer}
    assert all(c.passed for c in check_onnx(Reference(model, [inputs]), result.path))


def test_a_batch_that_a_trace_froze_is_caught_by_the_check(tmp_path):
    class Freezes(nn.Module):
        def forward(self, x):
            return x + float(x.shape[0])

    inputs = Inputs((torch.zeros(2, 4),))
    path = export_onnx(Freezes(), inputs, tmp_path / "m.onnx", exporter="legacy").path
    try:
        passed = passes(Freezes(), path, inputs)
    except (ExportError, CheckFailed):
        passed = False
    assert not passed


# -- a layer left in train mode ---------------------------------------------------------------------------


def test_a_batchnorm_left_in_train_mode_is_named(tmp_path):
    model = network()
    model[4].train()
    result = export_onnx(model, IMAGE, tmp_path / "m.onnx")
    assert result.notes == (
        "1 module(s) were in train mode, 4 (a BatchNorm) among them; exported in eval mode",
    )
    assert model[4].training
