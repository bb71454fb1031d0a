from __future__ import annotations

from pathlib import Path

import torch

from bntool import export_onnx
from tests.cli import nets
from tests.cli.conftest import Shell


def test_the_document_and_the_refusals(bntool: Shell, refused: Shell, folder: Path) -> None:
    export_onnx(nets.plain().eval(), (torch.randn(1, 3, 12, 12),), folder / "net.onnx")
    document = bntool("insert", "net.onnx", "--json").document
    assert document["output"] == "net_bn.onnx"
    assert [site["conv"] for site in document["sites"]] == ["0/Conv"]
    assert document["check"]["passed"] is True
    assert (folder / "net_bn.onnx").is_file()
    refused("insert", "net.onnx", "--init", "default", "--force", code=2, says="identity nodes only")
    refused("insert", "net.onnx", "--activation", "gelu", "--force", code=4, says="no place for a BatchNorm")
    refused("insert", "net.onnx", "--data", "data.npy", "--force", code=2, says="go together")
