from __future__ import annotations

import re

import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import nn

from bntool.core.errors import ExportError
from bntool.export import exporting, onnx_writing
from bntool.graph.inputs import Inputs
from bntool.verifying.checking import seeded_batches
from bntool.verifying.export_checking import check_onnx
from bntool.verifying.reference import Reference
from tests.exports import export_onnx


def convolutions() -> nn.Module:
    """Every convolution with and without bias, each with a BatchNorm after it."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.volume = nn.Conv3d(3, 4, 3, bias=False)
            self.volume_bn = nn.BatchNorm3d(4)
            self.line = nn.Conv1d(4, 6, 3, bias=False, padding=1, padding_mode="circular")
            self.line_bn = nn.BatchNorm1d(6, affine=False)
            self.up = nn.ConvTranspose1d(6, 6, 2, groups=2, bias=False)
            self.image = nn.Conv2d(1, 2, 3, bias=False)
            self.image_bn = nn.BatchNorm2d(2)
            self.biased = nn.Conv2d(2, 2, 1)
            nn.init.zeros_(self.biased.bias)  # a bias of zeros that is the model's own stays
            self.head = nn.Linear(6, 5)
            self.head_bn = nn.BatchNorm1d(5)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            y = self.volume_bn(self.volume(x)).mean((3, 4))
            y = self.up(self.line_bn(self.line(y)))
            z = self.biased(self.image_bn(self.image(y.unsqueeze(1))))
            return {"logits": self.head_bn(self.head(y.mean(2))), "map": z}

    torch.manual_seed(0)
    model = Net().eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model


VOLUME = Inputs((torch.zeros(1, 3, 8, 8, 8),))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    model = convolutions()
    path = tmp_path_factory.mktemp("exported") / "net.onnx"
    return model, export_onnx(model, VOLUME, path, metadata={"bntool": "1", "a": "b"})


def test_every_batchnorm_stays_and_no_bias_is_made_up(exported):
    _, result = exported
    proto = onnx.load(result.path)
    assert result.nodes["BatchNormalization"] == 4
    assert result.nodes["Conv"] == 4
    assert result.nodes["ConvTranspose"] == 1
    assert not {"Expand", "CastLike", "Constant", "Identity"} & result.nodes.keys()
    inputs = {node.name: list(node.input) for node in proto.graph.node}
    assert inputs["volume/Conv"] == ["input", "volume.weight"]
    assert len(inputs["image/Conv"]) == len(inputs["line/Conv"]) == 2
    assert inputs["biased/Conv"][1:] == ["biased.weight", "biased.bias"]
    assert inputs["volume_bn/BatchNormalization"][1:] == [
        f"volume_bn.{n}" for n in ("weight", "bias", "running_mean", "running_var")
    ]


def test_weights_keep_their_names_and_values(exported):
    model, result = exported
    state = model.state_dict()
    stored = {i.name: numpy_helper.to_array(i) for i in onnx.load(result.path).graph.initializer}
    used = {name for name in state if not name.endswith("num_batches_tracked")}
    assert used <= stored.keys()
    assert all(torch.equal(torch.from_numpy(stored[n].copy()), state[n]) for n in used)


def test_the_file_is_right_in_onnxruntime_for_every_batch(exported):
    model, result = exported
    checks = check_onnx(Reference(model, seeded_batches(VOLUME)), result.path)
    assert [(c.stage, c.passed, c.batches) for c in checks] == [("export", True, 3), ("runtime", True, 3)]


def test_names_axes_and_metadata(exported):
    _, result = exported
    proto = onnx.load(result.path)
    assert result.input_names == ("input",)
    assert result.output_names == ("logits", "map")
    assert [o.name for o in proto.graph.output] == ["logits", "map"]
    dims = [v.type.tensor_type.shape.dim[0].dim_param for v in (*proto.graph.input, *proto.graph.output)]
    assert dims == ["batch"] * 3
    assert {p.key: p.value for p in proto.metadata_props} == {"a": "b", "bntool": "1"}
    assert result.opset == proto.opset_import[0].version
    assert result.ir_version == proto.ir_version
    assert result.notes == ()


def test_the_same_model_gives_the_same_bytes_with_no_path_inside(exported, tmp_path):
    model, result = exported
    again = export_onnx(model, VOLUME, tmp_path / "again.onnx", metadata={"a": "b", "bntool": "1"})
    data = again.path.read_bytes()
    assert data == result.path.read_bytes()
    assert b"site-packages" not in data
    assert __file__.encode() not in data


def test_nothing_is_printed_and_the_model_is_untouched(tmp_path, capfd):
    model = convolutions().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modules = [(name, module.training, len(module._forward_hooks)) for name, module in model.named_modules()]
    result = export_onnx(model, VOLUME, tmp_path / "net.onnx")
    assert capfd.readouterr() == ("", "")
    assert result.notes == ("11 module(s) were in train mode; exported in eval mode",)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert [(n, m.training, len(m._forward_hooks)) for n, m in model.named_modules()] == modules
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.onnx"]


def test_inputs_by_keyword_and_scalars_keep_their_names(tmp_path):
    class Takes(nn.Module):
        def forward(self, x, *, b, a, flip=False):
            return (x + a) * b if not flip else x

    inputs = Inputs((torch.randn(1, 4),), {"a": torch.randn(1, 4), "b": torch.tensor(3.0), "flip": False})
    model = Takes()
    result = export_onnx(model, inputs, tmp_path / "m.onnx")
    assert result.input_names == ("input", "a", "b")
    assert all(c.passed for c in check_onnx(Reference(model, seeded_batches(inputs)), result.path))


def test_an_output_that_is_an_input_and_names_that_collide(tmp_path):
    class Passes(nn.Module):
        def forward(self, input_0, relu):
            return input_0, F.relu(relu), {"relu": relu + input_0}

    inputs = Inputs((torch.randn(1, 4), torch.randn(1, 4)))
    model = Passes()
    result = export_onnx(model, inputs, tmp_path / "m.onnx")
    assert result.output_names == ("output_0", "output_1", "output_2.relu")
    assert all(c.passed for c in check_onnx(Reference(model, seeded_batches(inputs)), result.path))


def test_a_tied_weight_has_the_first_of_its_names(tmp_path):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(x))

    result = export_onnx(Tied(), torch.randn(1, 4), tmp_path / "m.onnx")
    names = {i.name for i in onnx.load(result.path).graph.initializer}
    assert names == {"first.weight", "first.bias", "second.bias"}


class FixedBatch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(2, -1) * 2


def test_a_batch_that_cannot_be_dynamic_is_fixed_and_said(tmp_path):
    result = export_onnx(FixedBatch().eval(), torch.randn(2, 4), tmp_path / "m.onnx")
    (note,) = result.notes
    assert note.startswith("the batch axis is fixed, as in the example input (2x4): ")
    assert "specialized it to be a constant (2)" in note
    assert "mark_dynamic" not in note
    dims = onnx.load(result.path).graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_value for d in dims] == [2, 4]


def test_a_detector_is_refused_with_the_line_that_decides(tmp_path):
    from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn as make

    torch.manual_seed(0)
    model = make(weights=None, weights_backbone=None, rpn_pre_nms_top_n_test=20).eval()
    with pytest.raises(ExportError, match="data-dependent expression") as caught:
        export_onnx(model, Inputs(([torch.randn(3, 64, 64)],)), tmp_path / "m.onnx")
    assert "unhinted" not in caught.value.what
    assert re.fullmatch(r"torchvision/\S+\.py, line \d+, in \w+", caught.value.where)
    assert "of a detector" in caught.value.next_step
    assert all(len(line) < 240 for line in str(caught.value).splitlines())


def test_a_decision_on_values_is_refused_in_one_line_that_names_the_place(tmp_path, capfd):
    class Decides(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ExportError, match=r"cannot capture the model: .*data-dependent") as caught:
        export_onnx(Decides(), torch.randn(1, 4), tmp_path / "m.onnx")
    assert caught.value.exit_code == 6
    assert "test_exporting.py" in caught.value.where
    assert "Traceback" not in str(caught.value)
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("functional", [False, True])
def test_batch_statistics_are_refused(tmp_path, functional):
    class Functional(nn.Module):
        def forward(self, x):
            return F.batch_norm(x, torch.zeros(4), torch.ones(4), training=True)

    layer = Functional() if functional else nn.BatchNorm2d(4, track_running_stats=False)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), layer)
    with pytest.raises(ExportError, match="statistics of the batch") as caught:
        export_onnx(model, torch.randn(1, 3, 6, 6), tmp_path / "m.onnx")
    assert caught.value.where == "1"
    assert list(tmp_path.iterdir()) == []


class OnePerSample(nn.Conv2d):
    """A conditional convolution: each sample has a kernel of its own, as a group."""

    def forward(self, x):
        kernels = self.weight * x.mean((1, 2, 3)).reshape(-1, 1, 1, 1, 1)
        batch, _, *sides = x.shape
        out = F.conv2d(x.reshape(1, -1, *sides), kernels.flatten(0, 1), groups=batch)
        return out.reshape(batch, self.out_channels, *out.shape[2:])


def test_a_batch_axis_that_can_be_captured_and_not_written_is_fixed_and_said(tmp_path):
    model, x = OnePerSample(3, 4, 3).eval(), Inputs((torch.randn(2, 3, 6, 6),))
    export = export_onnx(model, x, tmp_path / "m.onnx")
    (note,) = export.notes
    assert note.startswith("the batch axis is fixed, as in the example input (2x3x6x6): torch cannot convert")
    assert all(check.passed for check in check_onnx(Reference(model, [x]), export.path))


class Standardised(nn.Conv2d):
    """Weight standardisation as NFNets and ResNetV2 write it: the weight as data of a batch norm."""

    def forward(self, x):
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True, momentum=0.0).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


@pytest.mark.parametrize("exporter", ["dynamo", "legacy"])
def test_standardised_weights_are_computed_once_and_are_no_batchnorm_of_the_models(exporter, tmp_path):
    """Larger than the exporter's own limit for what it computes."""
    torch.manual_seed(0)
    model = nn.Sequential(
        Standardised(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), Standardised(4, 300, 22)
    ).eval()
    model[1].running_mean.normal_()
    x = Inputs((torch.randn(1, 3, 24, 24),))
    export = export_onnx(model, x, tmp_path / "m.onnx", exporter=exporter)
    assert export.nodes == {"BatchNormalization": 1, "Conv": 2, "Relu": 1}
    assert export.notes[-1] == "2 weights that BatchNorm standardises are stored as what they come to"
    names = {tensor.name for tensor in onnx.load(export.path).graph.initializer}
    if exporter == "dynamo":  # the legacy exporter does not tell whose a weight is
        assert {"0.weight_computed", "3.weight_computed"} <= names
    checks = check_onnx(Reference(model, seeded_batches(x, (1, 3))), export.path)
    assert all(check.passed for check in checks)


@pytest.mark.parametrize("how", ["drawn", "of a constant", "under a condition"])
def test_a_batchnorm_that_standardises_no_weight_is_not_taken_for_one(how, tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.table = nn.Parameter(torch.randn(1, 4, 4, 4))
            self.register_buffer("flag", torch.tensor(True))

        def forward(self, x):
            if how == "of a constant":
                return self.conv(x) + self.bn(self.table)
            if how == "under a condition":
                (y,) = torch.cond(self.flag, lambda y: (y * 2,), lambda y: (y + 1,), (self.conv(x),))
                return F.relu(self.bn(y))
            flat = F.dropout(self.conv.weight, 0.5, True).reshape(1, 4, -1)
            weight = F.batch_norm(flat, None, None, training=True).reshape_as(self.conv.weight)
            return F.conv2d(x, weight)

    model, x = Net().eval(), torch.randn(1, 3, 6, 6)
    if how == "drawn":
        with pytest.raises(ExportError, match="statistics of the batch"):
            export_onnx(model, x, tmp_path / "m.onnx")
    else:
        assert export_onnx(model, x, tmp_path / "m.onnx").nodes["BatchNormalization"] == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_standardised_weights_of_other_types_are_exact_or_refused(dtype, tmp_path):
    model = nn.Sequential(Standardised(3, 4, 3), nn.BatchNorm2d(4)).eval().to(dtype)
    x = torch.randn(1, 3, 6, 6).to(dtype)
    if dtype == torch.float64:
        assert export_onnx(model, x, tmp_path / "m.onnx").nodes == {"BatchNormalization": 1, "Conv": 1}
    else:
        with pytest.raises(ExportError, match="a weight that a BatchNorm standardises"):
            export_onnx(model, x, tmp_path / "m.onnx")


def test_a_training_node_in_the_graph_is_refused():
    import onnx_ir as ir

    from bntool.export.onnx_cleaning import refuse_training_form

    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[n,2,3] x, float[2] s, float[2] b, float[2] m, float[2] v) => (float[n,2,3] y)
    { y, rm, rv = BatchNormalization <training_mode = 1> (x, s, b, m, v) }"""
    model = ir.serde.deserialize_model(onnx.parser.parse_model(text))
    with pytest.raises(ExportError, match="training form"):
        refuse_training_form(model)


def test_a_lost_batchnorm_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "census", lambda model: {"BatchNormalization": 3})
    with pytest.raises(ExportError, match=r"calls 4 BatchNorm\(s\), but torch's exporter wrote 3"):
        export_onnx(convolutions(), VOLUME, tmp_path / "m.onnx")


def classifier() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 50)
    ).eval()


def test_a_large_model_has_one_data_file_named_after_it(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_writing, "SINGLE_FILE_LIMIT", 1000)
    model, example = classifier(), Inputs((torch.zeros(1, 3, 8, 8),))
    result = export_onnx(model, example, tmp_path / "big.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["big.onnx", "big.onnx.data"]
    assert result.data_path == tmp_path / "big.onnx.data"
    assert result.to_dict()["data_path"] == str(result.data_path)
    assert all(c.passed for c in check_onnx(Reference(model, seeded_batches(example)), result.path))


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "m.onnx"
    target.write_bytes(b"old")

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("onnx_ir.save", full)
    with pytest.raises(ExportError, match="No space left"):
        export_onnx(classifier(), torch.zeros(1, 3, 8, 8), target, force=True)
    assert target.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    with pytest.raises(ExportError, match="no folder"):
        export_onnx(classifier(), torch.zeros(1, 3, 8, 8), tmp_path / "missing" / "m.onnx")


@pytest.mark.parametrize(("asked", "written"), [(18, 18), (20, 20)])
def test_the_opset_asked_for_is_written(tmp_path, asked, written):
    result = export_onnx(classifier(), torch.zeros(1, 3, 8, 8), tmp_path / "m.onnx", opset=asked)
    assert result.opset == written
    assert result.nodes["BatchNormalization"] == 1


def test_an_opset_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(ExportError, match="opset 11 was asked for") as caught:
        export_onnx(classifier(), torch.zeros(1, 3, 8, 8), tmp_path / "m.onnx", opset=11)
    assert caught.value.next_step.startswith("use --opset ")


def test_half_precision_keeps_its_type(tmp_path):
    model, example = classifier().half(), Inputs((torch.zeros(1, 3, 8, 8).half(),))
    result = export_onnx(model, example, tmp_path / "m.onnx")
    types = {i.data_type for i in onnx.load(result.path).graph.initializer if "weight" in i.name}
    assert types == {onnx.TensorProto.FLOAT16}
    assert all(c.passed for c in check_onnx(Reference(model, seeded_batches(example)), result.path))
    bfloat = export_onnx(classifier().bfloat16(), torch.zeros(1, 3, 8, 8).bfloat16(), tmp_path / "b.onnx")
    assert bfloat.opset == 22


def test_an_attribute_that_cannot_be_copied_is_told(tmp_path):
    model = classifier()
    model.generator = (i for i in ())
    result = export_onnx(model, torch.zeros(1, 3, 8, 8), tmp_path / "m.onnx")
    assert "generator (a generator) cannot be copied, so what a run does to it stays" in result.notes
