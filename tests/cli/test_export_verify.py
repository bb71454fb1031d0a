from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

from tests.cli import nets
from tests.cli.conftest import Shell

REFUSED_BY_EXPORT = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, images):
        x = self.bn(self.conv(images))
        return x * 2 if float(x.sum()) > 0 else x * 3
"""


def test_export_leaves_the_model_as_it_is(bntool: Shell) -> None:
    nets.save(nets.normalised(), "model.pt")
    said = bntool("export", "model.pt", *nets.INPUT, "--json")
    document = said.document
    assert (said.code, said.err, document["status"]) == (0, "", "ok")
    assert document["onnx"] == "model.onnx"
    assert [check["stage"] for check in document["checks"]] == ["export", "runtime"]
    nodes = [node.op_type for node in onnx.load("model.onnx").graph.node]
    assert nodes.count("BatchNormalization") == 2
    batch = onnx.load("model.onnx").graph.input[0].type.tensor_type.shape.dim[0]
    assert batch.dim_param == "batch"


def test_export_again_needs_force(bntool: Shell, refused: Shell) -> None:
    nets.save(nets.plain(), "model.pt")
    Path("model.onnx").write_text("mine")
    refused("export", "model.pt", *nets.INPUT, code=2, says="--force")
    assert bntool("export", "model.pt", *nets.INPUT, "--force", "--check", "none").code == 0
    onnx.checker.check_model("model.onnx")


def test_export_unchecked_says_so(bntool: Shell) -> None:
    nets.save(nets.plain(), "model.pt")
    said = bntool("export", "model.pt", *nets.INPUT, "--check", "none", "--static-batch")
    assert "nothing was verified" in said.out
    assert onnx.load("model.onnx").graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1


def test_a_model_that_torch_cannot_export_leaves_no_litter(refused: Shell) -> None:
    nets.user_model("user_net.py", REFUSED_BY_EXPORT)
    for words in (["fold", "--export", "onnx"], ["export"], ["export", "--json"]):
        said = refused(words[0], "user_net.py:Net", *nets.INPUT, *words[1:], code=6)
        assert "--json" not in words or said.document["status"] == "export-failed"


def test_an_opset_that_cannot_be_written(refused: Shell) -> None:
    nets.save(nets.plain(), "model.pt")
    refused("export", "model.pt", *nets.INPUT, "--opset", "3", code=6, says="opset 3")


def test_a_failing_onnx_check_leaves_nothing(refused: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    from bntool.export import exporting

    honest: Any = exporting.export_onnx

    def corrupted(model: nn.Module, inputs: Any, path: Path, *how: Any, **options: Any) -> Any:
        result = honest(model, inputs, path, *how, **options)
        file = onnx.load(path)
        tensor = file.graph.initializer[0]
        changed = onnx.numpy_helper.to_array(tensor) * 1.01
        tensor.CopyFrom(onnx.numpy_helper.from_array(changed, tensor.name))
        onnx.save(file, path)
        return result

    nets.save(nets.normalised(), "model.pt")
    monkeypatch.setattr(exporting, "export_onnx", corrupted)
    said = refused(
        "fold", "model.pt", *nets.INPUT, "--export", "onnx", code=1, says="the export stage differs"
    )
    assert "FAILED" in said.out
    refused("export", "model.pt", *nets.INPUT, "--json", code=1, says="the export stage differs")


def test_verify_two_models(bntool: Shell, refused: Shell) -> None:
    nets.save(nets.normalised(), "model.pt")
    assert bntool("fold", "model.pt", *nets.INPUT).code == 0
    said = bntool("verify", "model_folded.pt", "model.pt", *nets.INPUT, "--json")
    assert said.code == 0
    assert [check["stage"] for check in said.document["checks"]] == ["verify"]
    nets.save(nets.plain(), "other.pt")
    failed = refused("verify", "other.pt", "model.pt", *nets.INPUT, code=1, says="does not compute")
    assert "FAILED" in failed.out
    document = refused("verify", "other.pt", "model.pt", *nets.INPUT, "--json", code=1).document
    assert document["status"] == "check-failed"
    assert [check["passed"] for check in document["checks"]] == [False]


def test_verify_an_onnx_file_with_the_last_model(bntool: Shell) -> None:
    nets.save(nets.normalised(), "model.pt")
    assert bntool("fold", "model.pt", *nets.INPUT, "--export", "onnx").code == 0
    said = bntool("verify", "model_folded.onnx")
    assert said.code == 0, said
    assert said.out.startswith("using model_folded.pt")
    assert bntool("verify", "model_folded.onnx", "model.pt", *nets.INPUT).code == 0


def test_verify_weights_that_bntool_changed(bntool: Shell) -> None:
    nets.save(nets.user_model().state_dict(), "w.pt")
    nets.forget("user_net")
    arch = ("--arch", "user_net.py:Net", *nets.INPUT)
    assert bntool("insert", "w.pt", *arch).code == 0
    said = bntool("verify", "w_bn.pt", "w.pt", *arch)
    assert said.code == 0, said


def test_verify_what_is_not_there(refused: Shell) -> None:
    nets.save(nets.plain(), "model.pt")
    Path("text.onnx").write_text("hello")
    refused("verify", "nope.onnx", "model.pt", code=3, says="no such file")
    refused("verify", "nope.pt", "model.pt", code=3, says="no such file")
    refused("verify", "text.onnx", "model.pt", code=3, says="text.onnx is a text file")
    refused("verify", "model.pt", "model.pt", "--check", "none", code=2, says="nothing to verify")
    refused("verify", "model.pt", "model.pt", code=2, says="are one file")
    refused("verify", code=2, says="CANDIDATE")


def test_what_a_command_made_is_compared_with_what_it_was_made_from(bntool: Shell, refused: Shell) -> None:
    nets.save(nets.normalised(), "model.pt")
    assert bntool("fold", "model.pt", *nets.INPUT).code == 0
    assert bntool("verify", "model_folded.pt", *nets.INPUT).code == 0
    folded = torch.load("model_folded.pt", weights_only=False)
    next(folded.parameters()).data.mul_(3)
    torch.save(folded, "model_folded.pt")
    refused("verify", "model_folded.pt", *nets.INPUT, code=1, says="model.pt computes")


def test_verify_with_a_tolerance_of_its_own(bntool: Shell) -> None:
    model = nets.plain()
    nets.save(model, "a.pt")
    with torch.no_grad():
        model[2].bias += 0.01
    nets.save(model, "b.pt")
    assert bntool("verify", "b.pt", "a.pt", *nets.INPUT).code == 1
    # The outputs differ by the bias alone, 0.01, and its rounding.
    assert bntool("verify", "b.pt", "a.pt", *nets.INPUT, "--atol", "0.011").code == 0
    assert bntool("verify", "b.pt", "a.pt", *nets.INPUT, "--atol", "0.009").code == 1


def test_every_choice_of_form_reaches_the_file(bntool: Shell) -> None:
    nets.save(nets.normalised(), "model.pt")
    said = bntool(
        "fold", "model.pt", *nets.INPUT, "--export", "onnx", "--dtype", "fp16", "--keep-io",
        "--ir-version", "9", "--dynamic", "input:2,3", "--external-data", "always", "--json",
    )  # fmt: skip
    assert said.code == 0, said
    export = said.document["export"]
    assert (export["opset"], export["ir_version"], export["dtype"]) == (18, 9, "fp16")
    assert export["loads_in"] == "1.16"
    assert export["nodes"]["Conv"] == 2
    file = onnx.load("model_folded.onnx")
    shape = file.graph.input[0].type.tensor_type.shape
    assert [d.dim_param or d.dim_value for d in shape.dim] == ["batch", 3, "input_2", "input_3"]
    metadata = {p.key: p.value for p in file.metadata_props}
    told = {"bntool_version", "bntool_source_sha256", "bntool_folded", "bntool_checks", "bntool_data"}
    assert metadata.keys() == told
    assert metadata["bntool_checks"].startswith("fold: passed on torch; ")
    assert "runtime: passed on CPUExecutionProvider" in metadata["bntool_checks"]


def test_what_loads_the_file_is_said_and_the_bytes_are_the_same_twice(bntool: Shell) -> None:
    nets.save(nets.normalised(), "model.pt")
    said = bntool("export", "model.pt", *nets.INPUT)
    assert "loads in ONNX Runtime >= 1.14" in said.out
    first = Path("model.onnx").read_bytes()
    assert bntool("export", "model.pt", *nets.INPUT, "--force").code == 0
    assert Path("model.onnx").read_bytes() == first


def test_forms_that_cannot_be(refused: Shell) -> None:
    nets.save(nets.normalised(), "model.pt")
    line = ("export", "model.pt", *nets.INPUT)
    refused(*line, "--dynamic", "images:2", code=2, says="the inputs are input")
    refused(*line, "--dynamic", "input:7", code=2, says="has no axis 7")
    refused(*line, "--dynamic", "input=2", code=2, says="not like input:0,2,3")
    refused(*line, "--keep-io", code=2, says="--dtype")
    refused(*line, "--ir-version", "3", code=2, says="IR version 3")
    refused(*line, "--opset", "9", code=6, says="--exporter legacy")
    refused(*line, "--dtype", "bf16", code=6, says="--check none")


def test_a_file_that_fails_is_kept_only_when_asked_for(
    bntool: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    nets.save(nets.normalised(), "model.pt")
    line = ("export", "model.pt", *nets.INPUT, "--atol", "0")
    assert bntool(*line).code == 1
    assert not list(Path().glob("*.onnx*"))
    said = bntool(*line, "--keep-unverified", "--external-data", "always")
    assert said.code == 1
    assert "kept as model.unverified.onnx" in said.err
    assert [str(p) for p in sorted(Path().glob("*.onnx*"))][:1] == ["model.unverified.onnx"]
    onnx.checker.check_model("model.unverified.onnx")


def test_a_file_kept_unverified_takes_a_name_that_is_free(bntool: Shell) -> None:
    """Whoever asks for it typed none of its names, so `--force` replaces none of them either."""
    nets.save(nets.normalised(), "model.pt")
    line = ("export", "model.pt", *nets.INPUT, "--atol", "0", "--keep-unverified", "--force")
    Path("model.unverified.onnx").write_bytes(b"precious")
    Path("model.unverified.1.onnx").symlink_to("nowhere")
    for number in (2, 3):
        said = bntool(*line)
        assert said.code == 1
        assert f"kept as model.unverified.{number}.onnx: do not serve it" in said.err
        onnx.checker.check_model(f"model.unverified.{number}.onnx")
    assert Path("model.unverified.onnx").read_bytes() == b"precious"
    assert Path("model.unverified.1.onnx").is_symlink()
    assert not Path("nowhere").exists()


def test_a_folder_that_cannot_be_written(refused: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    nets.save(nets.normalised(), "model.pt")

    def read_only(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", read_only)
    refused("export", "model.pt", *nets.INPUT, code=2, says="Permission denied")
