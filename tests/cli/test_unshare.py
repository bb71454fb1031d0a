"""`bntool fold --unshare`: what it says of its cost, and what only the exported graph can do."""

from __future__ import annotations

from pathlib import Path

import onnx
import torch
from torch import nn

from tests.cli import nets
from tests.cli.conftest import Shell

TWICE = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.first, self.second = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        for norm in (self.first, self.second):
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
            nn.init.uniform_(norm.running_mean, -0.5, 0.5)

    def forward(self, x):
        return self.second(self.conv(torch.relu(self.first(self.conv(x)))))
"""


def shared() -> nn.Sequential:
    """One convolution under two names, each before a BatchNorm of its own; 3·3·9 + 3 = 84 numbers."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 3, 3)
    model = nn.Sequential(conv, nn.BatchNorm2d(3), nn.ReLU(), conv, nn.BatchNorm2d(3))
    for norm in (model[1], model[4]):
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
        nn.init.uniform_(norm.running_mean, -0.5, 0.5)
    return model.eval()


def test_the_cost_is_said_in_one_line_and_in_json(bntool: Shell, refused: Shell) -> None:
    nets.save(shared(), "model.pt")
    refused("fold", "model.pt", *nets.INPUT, code=4, says="bntool explain called-more-than-once")
    said = bntool("fold", "model.pt", *nets.INPUT, "--unshare", "--require-all", "--export", "onnx")
    assert said.code == 0
    assert "2 of 2 BatchNorm layers folded" in said.out
    assert "unshared 1 layer: +84 parameters, +336 B" in said.out
    graph = onnx.load("model_folded.onnx").graph
    assert "BatchNormalization" not in {node.op_type for node in graph.node}
    document = bntool("fold", "model.pt", *nets.INPUT, "--unshare", "--force", "--json").document
    assert document["unshared"] == {"layers": ["0"], "parameters": 84, "bytes": 336}
    assert document["parameters"]["delta"]["trainable"] == 84 - 2 * 6


def test_with_nothing_shared_it_changes_nothing(bntool: Shell) -> None:
    nets.save(nets.normalised(), "model.pt")
    plain = bntool("fold", "model.pt", *nets.INPUT)
    written = Path("model_folded.pt").read_bytes()
    assert bntool("fold", "model.pt", *nets.INPUT, "--unshare", "--force").out == plain.out
    assert Path("model_folded.pt").read_bytes() == written


def test_what_the_module_tree_cannot_express_the_graph_does(bntool: Shell, refused: Shell) -> None:
    nets.user_model("user_net.py", TWICE)
    line = ("fold", "user_net.py:Net", *nets.INPUT, "--unshare", "-o", "out.pt")
    refused(*line, code=4, says="bntool explain called-more-than-once")
    document = bntool(*line, "--export", "onnx", "--require-all", "--json").document
    assert document["status"] == "ok"
    assert document["bn_folded"] == 0
    assert all("--unshare --export onnx" in skip["detail"] for skip in document["skips"])
    assert len(document["export"]["folded"]) == 2
    assert document["export"]["unshared"]["parameters"] == 84
    assert "BatchNormalization" not in document["export"]["nodes"]
    assert {check["stage"] for check in document["checks"]} >= {"export", "runtime"}
    assert any("unshared 1 layer: +84 parameters" in note for note in document["notes"])


def test_an_onnx_file(bntool: Shell, refused: Shell) -> None:
    nets.save(shared(), "model.pt")
    assert bntool("export", "model.pt", *nets.INPUT, "-o", "model.onnx").code == 0
    refused("fold", "model.onnx", "--no-unshare", code=4)
    said = bntool("fold", "model.onnx", "--require-all")
    assert said.code == 0
    assert "unshared 1 layer: +84 parameters, +336 B" in said.out


def test_a_program_file(bntool: Shell, refused: Shell) -> None:
    program = torch.export.export(shared(), (torch.randn(1, 3, 12, 12),))
    torch.export.save(program, "model.pt2")
    refused("fold", "model.pt2", code=4)
    document = bntool("fold", "model.pt2", "--unshare", "--require-all", "--json").document
    assert document["unshared"]["parameters"] == 84
    assert all(check["passed"] for check in document["checks"])


def test_in_a_file_shared_weights_are_cloned_unless_told_not_to(bntool: Shell) -> None:
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    draw = np.random.default_rng(0)
    tensors = {"w": draw.normal(size=(4, 4, 3, 3)), **{n: draw.uniform(0.5, 2, 4) for n in "gbmv"}}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["r"]),
        helper.make_node("Conv", ["r", "w"], ["c"], pads=[1] * 4),
        helper.make_node("BatchNormalization", ["c", *"gbmv"], ["y"], name="bn"),
    ]
    sides = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4, 8, 8]) for name in ("x", "y")]
    stored = [numpy_helper.from_array(value.astype("float32"), name) for name, value in tensors.items()]
    graph = helper.make_graph(nodes, "tied", sides[:1], sides[1:], stored)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), "m.onnx")
    said = bntool("fold", "m.onnx", "-o", "folded.onnx", "--json")
    assert said.code == 0
    assert [site["bn"] for site in said.document["sites"]] == ["bn"]
    assert said.document["unshared"]["layers"]
    assert len(onnx.load("folded.onnx").graph.initializer) == 3  # two weights and a bias
    kept = bntool("fold", "m.onnx", "-o", "kept.onnx", "--no-unshare", "--json")
    assert kept.code == 4
    assert kept.document["skips"][0]["reason"] == "called-more-than-once"
