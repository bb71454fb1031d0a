from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bntool
from bntool.core.errors import UsageError
from bntool.core.reasons import Reason
from bntool.graph.inputs import Inputs
from bntool.inserting import InsertOptions
from bntool.pipeline.onnx_folding import fold_onnx, insert_onnx
from bntool.runtime.onnx_reference import ReferenceRunner
from bntool.verifying.onnx_checking import check_onnx_unchanged
from bntool.verifying.onnx_verifying import seeded_file_inputs


class Net(nn.Module):
    """Two sites, a layer read twice, one that runs twice, and a head without activation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 5, 3, groups=1)
        self.read_twice, self.shared = nn.Conv2d(5, 5, 1), nn.Conv2d(5, 5, 1)
        self.head = nn.Conv2d(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.two(F.relu(self.one(x))))
        z = self.read_twice(y)
        z = F.relu(z) + z
        z = F.relu(self.shared(F.relu(self.shared(z))))
        out: Tensor = self.head(z)
        return out


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    return bntool.export_onnx(Net().eval(), (torch.randn(1, 3, 8, 8),), path)


def test_nodes_stand_between_convolution_and_activation_and_change_nothing(
    exported: Path, tmp_path: Path
) -> None:
    result = insert_onnx(exported, tmp_path / "bn.onnx")
    assert [site.channels for site in result.plan.insert_sites] == [4, 5]
    assert {skip.reason for skip in result.plan.skips} == {
        Reason.OUTPUT_USED_ELSEWHERE,
        Reason.CALLED_MORE_THAN_ONCE,
        Reason.NO_ACTIVATION,
    }
    model = onnx.load(tmp_path / "bn.onnx")
    onnx.checker.check_model(model)
    made = {out: node.op_type for node in model.graph.node for out in node.output}
    norms = [node for node in model.graph.node if node.op_type == "BatchNormalization"]
    assert [made[node.input[0]] for node in norms] == ["Conv", "ConvTranspose"]
    readers = [node.op_type for norm in norms for node in model.graph.node if norm.output[0] in node.input]
    assert readers == ["Relu", "Relu"]
    inputs = seeded_file_inputs(exported, (1, 3))
    assert check_onnx_unchanged(exported, tmp_path / "bn.onnx", inputs).passed


def test_a_file_in_float64_keeps_its_last_bit(tmp_path: Path) -> None:
    """A node holds its ε as a float32, so 1 − ε must be taken of that."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).double().eval()
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    bntool.export_onnx(model, (x,), tmp_path / "net.onnx")
    assert insert_onnx(tmp_path / "net.onnx", tmp_path / "bn.onnx").modified
    before, after = (ReferenceRunner(tmp_path / name).run(Inputs((x,))) for name in ("net.onnx", "bn.onnx"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_each_call_gets_its_own_where_asked(exported: Path, tmp_path: Path) -> None:
    result = insert_onnx(exported, tmp_path / "bn.onnx", InsertOptions(per_call=True))
    assert [site.calls for site in result.plan.insert_sites] == [1, 1, 2]
    assert check_onnx_unchanged(exported, tmp_path / "bn.onnx", seeded_file_inputs(exported, (1,))).passed


def test_what_was_inserted_folds_away_to_the_same_numbers(exported: Path, tmp_path: Path) -> None:
    insert_onnx(exported, tmp_path / "bn.onnx")
    assert not insert_onnx(tmp_path / "bn.onnx", None).modified
    folded = fold_onnx(tmp_path / "bn.onnx", tmp_path / "folded.onnx")
    assert len(folded.plan.sites) == 2 and not folded.plan.skips
    before, after = (
        {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
        for path in (exported, tmp_path / "folded.onnx")
    )
    for name, array in before.items():
        # scale and shift are 1 and 0 up to the rounding of σ² = 1 − ε: one rounding of each weight
        assert abs(array - after[name]).max() <= 2**-23 * abs(array).max()


@pytest.mark.parametrize(
    ("activation", "kind"),
    [(nn.ReLU6(), "relu6"), (nn.Hardtanh(-1, 2), "clamp"), (nn.Hardswish(), "hardswish")],
)
def test_an_activation_is_told_by_its_node(tmp_path: Path, activation: nn.Module, kind: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), activation, nn.Conv2d(4, 2, 1)).eval()
    path = bntool.export_onnx(net, (torch.randn(1, 3, 6, 6),), tmp_path / "net.onnx")
    assert not insert_onnx(path, None).modified
    result = insert_onnx(path, tmp_path / "bn.onnx", InsertOptions(activations=(kind,)))
    assert [site.activation_kind for site in result.plan.insert_sites] == [kind]
    assert check_onnx_unchanged(path, tmp_path / "bn.onnx", seeded_file_inputs(path, (1,))).passed


def test_options_that_need_modules_are_refused(exported: Path) -> None:
    with pytest.raises(UsageError, match="keep-keys is for modules"):
        insert_onnx(exported, None, InsertOptions(keep_keys=True))


@pytest.mark.parametrize("options", [{"position": "after"}, {"affine": False}, {"init": "default"}])
def test_what_a_graph_cannot_take_is_refused_and_not_passed_over(exported: Path, options: Any) -> None:
    with pytest.raises(UsageError, match="is for modules; a graph has none"):
        insert_onnx(exported, None, InsertOptions(**options))
    program = torch.export.export(Net().eval(), (torch.randn(2, 3, 8, 8),))
    with pytest.raises(UsageError):
        bntool.insert(program, **options)


def test_a_weight_that_comes_in_as_an_input_is_told(tmp_path: Path) -> None:
    make, number = onnx.helper.make_node, onnx.TensorProto.FLOAT
    nodes = [make("Conv", ["x", "w"], ["c"], name="conv"), make("Relu", ["c"], ["y"])]
    sizes = {"x": (1, 3, 8, 8), "w": (4, 3, 3, 3), "y": (1, 4, 6, 6)}
    x, w, y = (onnx.helper.make_tensor_value_info(name, number, size) for name, size in sizes.items())
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [x, w], [y]))
    onnx.save(model, tmp_path / "m.onnx")
    result = insert_onnx(tmp_path / "m.onnx", None)
    assert [(skip.name, skip.reason) for skip in result.plan.skips] == [("conv", Reason.WEIGHT_COMPUTED)]


class WrittenOut(nn.Module):
    """Activations for which ONNX has no op: SiLU is Sigmoid and Mul, GELU goes by Erf."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.head = (nn.Conv2d(3, 3, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(F.gelu(self.two(F.silu(self.one(x)))))
        return out


def test_activations_of_several_nodes_are_sites(tmp_path: Path) -> None:
    path = bntool.export_onnx(WrittenOut().eval(), (torch.randn(1, 3, 8, 8),), tmp_path / "net.onnx")
    nodes = [node.op_type for node in onnx.load(path).graph.node]
    assert {"Sigmoid", "Mul"} <= set(nodes)
    result = insert_onnx(path, tmp_path / "bn.onnx", InsertOptions(activations=("any",)))
    assert [site.activation_kind for site in result.plan.insert_sites] == ["silu", "gelu"]
    assert check_onnx_unchanged(path, tmp_path / "bn.onnx", seeded_file_inputs(path, (1,))).passed
    assert not insert_onnx(tmp_path / "bn.onnx", None, InsertOptions(activations=("any",))).modified


@pytest.mark.parametrize("eps", [1e-8, 1e-5, 1e-3, 0.1])
def test_float16_is_left_as_it_was_to_the_bit(tmp_path: Path, eps: float) -> None:
    """The ε is one that float16 holds 1 − ε of."""
    random = np.random.default_rng(0)
    weight = onnx.numpy_helper.from_array(random.normal(size=(8, 3, 3, 3)).astype(np.float16), "W")
    nodes = [
        onnx.helper.make_node("Conv", ["x", "W"], ["c"]),
        onnx.helper.make_node("Relu", ["c"], ["y"]),
    ]
    ends = [onnx.helper.make_tensor_value_info(n, 10, s) for n, s in (("x", [1, 3, 32, 32]), ("y", None))]
    graph = onnx.helper.make_graph(nodes, "g", ends[:1], ends[1:], [weight])
    opsets = [onnx.helper.make_opsetid("", 17)]
    path, new = tmp_path / "m.onnx", tmp_path / "new.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    result = insert_onnx(path, new, InsertOptions(eps=eps))
    assert check_onnx_unchanged(path, new, seeded_file_inputs(path, (1,))).passed
    (node,) = (n for n in onnx.load(new).graph.node if n.op_type == "BatchNormalization")
    held = next(a.f for a in node.attribute if a.name == "epsilon")
    variance = onnx.numpy_helper.to_array(
        next(t for t in onnx.load(new).graph.initializer if t.name == node.input[4])
    )
    assert (variance.astype(np.float64) + held == 1).all()
    assert abs(held - eps) <= 2**-11
    assert any("float16" in note for note in result.plan.notes)
