"""`bntool fold` on ONNX files, and what only the exported graph can fold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from tests.cli import nets
from tests.cli.conftest import Shell

FUNCTIONAL = """
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.register_buffer("mean", torch.linspace(-1, 1, 4))
        self.register_buffer("variance", torch.linspace(0.5, 1.5, 4))
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, images):
        x = F.relu(F.batch_norm(self.first(images), self.mean, self.variance))
        return self.last(x).mean((2, 3))
"""

BRANCHING = """
import torch
from torch import Tensor, nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.dense = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3))
        self.point = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3))
        self.itself = nn.BatchNorm2d(3)
        for norm in (self.dense[1], self.point[1], self.itself):
            nn.init.uniform_(norm.running_mean, -1, 1)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)

    def forward(self, images):
        return torch.relu(self.dense(images) + self.point(images) + self.itself(images))
"""


def op_types(path: str) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def export_unfolded(model: nn.Module, path: str) -> None:
    """An ONNX file in which every BatchNorm is still a node, its batch axis open."""
    from bntool.api import exported

    exported(model.eval(), torch.zeros(1, 3, 12, 12), path)
    assert "BatchNormalization" in op_types(path)


def test_an_onnx_file_is_folded_by_the_same_engine(bntool: Shell, folder: Path) -> None:
    export_unfolded(nets.normalised(), "net.onnx")
    before = Path("net.onnx").read_bytes()
    document = bntool("fold", "net.onnx", "--json").document
    assert (document["status"], document["onnx"]) == ("ok", "net_folded.onnx")
    assert document["bn_folded"] == document["bn_total"] > 0
    assert {check["stage"] for check in document["checks"]} == {"fold", "runtime"}
    assert all(
        check["passed"] and check["provider"] == "CPUExecutionProvider" for check in document["checks"]
    )
    assert "BatchNormalization" not in op_types("net_folded.onnx")
    assert Path("net.onnx").read_bytes() == before
    assert sorted(p.name for p in folder.iterdir()) == ["net.onnx", "net_folded.onnx"]


def test_an_onnx_file_without_batch_norm_is_nothing_to_do(
    bntool: Shell, refused: Callable[..., object]
) -> None:
    export_unfolded(nets.normalised(), "net.onnx")
    assert bntool("fold", "net.onnx").code == 0
    refused("fold", "net_folded.onnx", code=4, says="no BatchNorm")


def test_an_existing_output_and_a_dry_run_write_nothing(
    bntool: Shell, refused: Callable[..., object], folder: Path
) -> None:
    export_unfolded(nets.normalised(), "net.onnx")
    assert bntool("fold", "net.onnx", "--dry-run").code == 0
    assert [p.name for p in folder.iterdir()] == ["net.onnx"]
    Path("net_folded.onnx").write_text("mine")
    refused("fold", "net.onnx", code=2, says="--force")
    assert Path("net_folded.onnx").read_text() == "mine"


@pytest.mark.parametrize("verb", ["fold", "insert"])
def test_an_onnx_file_goes_under_no_name_of_another_kind(
    verb: str, refused: Callable[..., object], folder: Path
) -> None:
    export_unfolded(nets.normalised(), "net.onnx")
    refused(verb, "net.onnx", "-o", "out.pt", code=2, says="name it out.onnx")
    assert [p.name for p in folder.iterdir()] == ["net.onnx"]


def test_bad_statistics_in_an_onnx_file_are_a_bad_state(refused: Callable[..., object]) -> None:
    export_unfolded(nets.normalised(), "net.onnx")
    model = onnx.load("net.onnx")
    node = next(node for node in model.graph.node if node.op_type == "BatchNormalization")
    variance = next(i for i in model.graph.initializer if i.name == node.input[4])
    numbers = onnx.numpy_helper.to_array(variance).copy()
    numbers[1] = float("nan")
    variance.CopyFrom(onnx.numpy_helper.from_array(numbers, variance.name))
    onnx.save(model, "net.onnx")
    refused("fold", "net.onnx", code=7, says="channel 1")


@pytest.mark.parametrize("words", [(), ("--require-all",)])
def test_a_functional_batch_norm_goes_in_the_exported_graph(
    bntool: Shell, folder: Path, words: tuple[str, ...]
) -> None:
    (folder / "net.py").write_text(FUNCTIONAL)
    said = bntool("fold", "net.py:Net", "--export", "onnx", *nets.INPUT, *words)
    assert said.code == 0
    assert "is folded in the ONNX graph, into first" in said.out
    assert "BatchNormalization" not in op_types("Net_folded.onnx")


def test_what_is_excluded_stays_in_the_exported_graph(bntool: Shell) -> None:
    nets.save(nets.normalised(), "model.pt")
    names = [n for n, m in nets.normalised().named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(names) > 1
    assert bntool("fold", "model.pt", "--export", "onnx", "--exclude", names[0], *nets.INPUT).code == 0
    assert op_types("model_folded.onnx").count("BatchNormalization") == 1


@pytest.mark.parametrize("words", [(), ("--require-all",)])
def test_parallel_branches_merge_in_the_module_and_so_in_the_file(
    bntool: Shell, folder: Path, words: tuple[str, ...]
) -> None:
    (folder / "net.py").write_text(BRANCHING)
    document = bntool("fold", "net.py:Net", "--export", "onnx", "--json", *nets.INPUT, *words).document
    assert op_types("Net_folded.onnx") == ["Conv", "Relu"]
    assert document["merges"] == [{"into": "dense.0", "branches": ["dense.0", "point.0", "identity"]}]
    assert document["export"]["merged"] == {}
    assert all(check["passed"] for check in document["checks"])


def test_no_merge_leaves_the_branches(bntool: Shell, refused: Callable[..., object], folder: Path) -> None:
    (folder / "net.py").write_text(BRANCHING)
    assert bntool("fold", "net.py:Net", "--export", "onnx", "--no-merge", *nets.INPUT).code == 0
    assert op_types("Net_folded.onnx").count("Conv") == 2
    assert op_types("Net_folded.onnx").count("BatchNormalization") == 1
    refused("fold", "Net_folded.onnx", "--no-merge", code=4, says="can be folded")
    document = bntool("fold", "Net_folded.onnx", "-o", "one.onnx", "--json").document
    assert op_types("one.onnx") == ["Conv", "Relu"]
    (merge,) = document["merges"]
    assert merge["branches"].count("identity") == 1


def test_a_merge_that_fails_its_check_is_left_out(
    bntool: Shell, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The numbers of a merge are spoilt: the branches stay, the BatchNorms still go, and a note says so."""
    from bntool.surgery import editing

    right = editing.added_up

    def spoilt(*given: Any) -> tuple[Tensor, Tensor]:
        weight, bias = right(*given)
        return 2 * weight, bias

    monkeypatch.setattr(editing, "added_up", spoilt)
    (folder / "net.py").write_text(BRANCHING)
    said = bntool("fold", "net.py:Net", "--export", "onnx", *nets.INPUT)
    assert said.code == 0
    assert "branches are left as they are" in said.out + said.err
    assert op_types("Net_folded.onnx").count("Conv") == 2
    said = bntool("fold", "Net_folded.onnx", "-o", "again.onnx")
    assert said.code == 4
    assert not (folder / "again.onnx").exists()
