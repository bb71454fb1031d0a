"""Branches that a user's own forward adds up: one convolution in the graph, or left alone for a reason."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram
from torchvision.ops import FrozenBatchNorm2d

import bntool
from bntool.core.errors import CheckFailed
from bntool.core.plan import Plan
from bntool.pipeline.onnx_folding import fold_onnx, plan_fold_onnx
from bntool.subjects.program import ProgramProof
from bntool.surgery.fold_onnx import apply_fold_onnx
from bntool.surgery.fold_program import apply_fold_program, in_float64
from tests.fold_zoo import Net, enliven
from tests.onnx_zoo import ONNX_ZOO
from tests.program_zoo import BATCH, decomposed, exported, plan_fold_program

EXACT = 1e-12
"""Relative to peak, in float64: sums of some hundred products, each with a rounding of 1e-16."""
C = 6


def conv(kernel: int = 3, groups: int = 1, **options: Any) -> nn.Conv2d:
    options.setdefault("padding", kernel // 2)
    return nn.Conv2d(C, C, kernel, groups=groups, bias=options.pop("bias", False), **options)


def with_bn(*args: Any, **options: Any) -> nn.Sequential:
    return nn.Sequential(conv(*args, **options), nn.BatchNorm2d(C))


def repvgg(m: Any, x: Tensor) -> Tensor:
    return torch.relu(m.dense(x) + m.point(x) + m.itself(x))


def repvgg_parts(**options: Any) -> dict[str, nn.Module]:
    return {"dense": with_bn(3, **options), "point": with_bn(1, **options), "itself": nn.BatchNorm2d(C)}


def mobileone(m: Any, x: Tensor) -> Tensor:
    """As MobileOne writes it: from a sum of zero, in place."""
    out: Any = 0
    for branch in m.branches:
        out += branch(x)
    out += m.scale(x)
    return torch.relu(out + m.itself(x))


def mobileone_parts() -> dict[str, nn.Module]:
    branches = nn.ModuleList(with_bn(3, groups=C) for _ in range(3))
    return {"branches": branches, "scale": with_bn(1, groups=C), "itself": nn.BatchNorm2d(C)}


def functional_norm(m: Any, x: Tensor) -> Tensor:
    norm = m.itself
    plain = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    return torch.relu(m.dense(x) + plain)


def layer_scaled(m: Any, x: Tensor) -> Tensor:
    """FastViT's token mixer: x + γ·(mixed − normed)."""
    return torch.relu(x + m.gamma * (m.dense(x) + m.point(x) - m.itself(x)))


def norm_behind(m: Any, x: Tensor) -> Tensor:
    """RepViT's depthwise block: one BatchNorm behind the whole sum."""
    return torch.relu(m.itself(m.dense(x) + m.point(x) + x))


def asymmetric(m: Any, x: Tensor) -> Tensor:
    return torch.relu(m.square(x) + m.row(x) + m.column(x))


def asymmetric_parts() -> dict[str, nn.Module]:
    """ACNet: a square kernel, a row and a column."""
    return {
        "square": with_bn(3),
        "row": nn.Sequential(nn.Conv2d(C, C, (1, 3), padding=(0, 1)), nn.BatchNorm2d(C)),
        "column": nn.Sequential(nn.Conv2d(C, C, (3, 1), padding=(1, 0)), nn.BatchNorm2d(C)),
    }


def into_the_source(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """What is written to is seen by another, who would miss it."""
    y = torch.sigmoid(x)
    seen = y[:, :2]
    return y.add_(m.dense(y) + m.point(y)), seen


def plain_parts() -> dict[str, nn.Module]:
    return {"dense": conv(3, bias=True), "point": conv(1), "itself": nn.Identity()}


ONE = {
    "repvgg": (repvgg, repvgg_parts),
    "repvgg in groups": (repvgg, lambda: repvgg_parts(groups=2)),
    "repvgg, same padding": (repvgg, lambda: {**repvgg_parts(), "dense": with_bn(3, padding="same")}),
    "mobileone": (mobileone, mobileone_parts),
    "functional": (functional_norm, lambda: {"dense": with_bn(3), "itself": nn.BatchNorm2d(C)}),
    "asymmetric": (asymmetric, asymmetric_parts),
    "without a BatchNorm": (repvgg, plain_parts),
    "strided": (
        lambda m, x: torch.relu(m.dense(x) + m.point(x)),
        lambda: {"dense": with_bn(3, stride=2), "point": with_bn(1, stride=2)},
    ),
    "the wider one is depthwise": (
        repvgg,
        lambda: {**repvgg_parts(groups=C), "dense": with_bn(5, groups=C), "point": with_bn(3, groups=C)},
    ),
    "dilated": (
        repvgg,
        lambda: {**repvgg_parts(), "dense": with_bn(5), "point": with_bn(3, dilation=2, padding=2)},
    ),
    "layer scale": (
        layer_scaled,
        lambda: {**repvgg_parts(groups=C), "gamma": nn.Parameter(torch.randn(C, 1, 1))},
    ),
    "norm behind": (norm_behind, lambda: {**repvgg_parts(groups=C), "point": conv(1, groups=C, bias=True)}),
    "in place": (
        lambda m, x: m.dense(x).add_(m.point(x)).add_(m.itself(x)).relu_(),
        repvgg_parts,
    ),
    "from other channels in groups": (
        lambda m, x: torch.relu(m.dense(x) + m.point(x)),
        lambda: {
            "dense": nn.Conv2d(C, 2 * C, 3, padding=1, groups=2),
            "point": nn.Conv2d(C, 2 * C, 1, groups=C),
        },
    ),
}

SEPARATE = {
    "strides": (
        lambda m, x: m.dense(x) + m.point(x),
        lambda: {"dense": conv(3, stride=2), "point": nn.Conv2d(C, C, 1, stride=4, padding=4)},
        2,
    ),
    "borders": (
        lambda m, x: m.dense(y := x[:, :, 1:]) + m.point(y),
        lambda: {"dense": conv(3, stride=2), "point": conv(2, stride=2, padding=0)},
        2,
    ),
    "read elsewhere": (lambda m, x: (m.dense(x) + (p := m.point(x)), p), repvgg_parts, 2),
    "reflected": (
        lambda m, x: m.dense(x) + m.point(x),
        lambda: {**repvgg_parts(), "dense": with_bn(3, padding_mode="reflect")},
        2,
    ),
    "dearer in few groups": (
        lambda m, x: m.dense(x) + m.point(x),
        lambda: {"dense": conv(3, groups=C), "point": conv(1)},
        2,
    ),
    "dearer as a square": (
        lambda m, x: m.row(x) + m.column(x),
        lambda: {k: v for k, v in asymmetric_parts().items() if k != "square"},
        2,
    ),
    "nonlinear": (lambda m, x: m.dense(x) + torch.relu(m.point(x)), repvgg_parts, 2),
    "other values": (lambda m, x: m.dense(x) + m.point(torch.sigmoid(x)), repvgg_parts, 2),
    "overwritten between": (lambda m, x: m.dense(y := x * 2) + m.point(y.sigmoid_()), repvgg_parts, 2),
    "a residual alone": (lambda m, x: m.dense(x) + x, lambda: {"dense": conv(3)}, 1),
    "onto the source": (lambda m, x: (y := torch.sigmoid(x)).add_(m.dense(y) + m.relu(m.point(y))) + y,
        lambda: {"dense": conv(3), "point": conv(1), "relu": nn.ReLU()}, 2),
    "weight shared": (
        lambda m, x: m.point(m.dense(x) + m.point(x)),
        repvgg_parts,
        3,
    ),
    "multiplied": (lambda m, x: m.dense(x) * m.point(x), repvgg_parts, 2),
    "broadcast": (
        lambda m, x: m.dense(x) + m.point(F.adaptive_avg_pool2d(x, 1)),
        repvgg_parts,
        2,
    ),
}  # fmt: skip


def program_of(run: Callable[..., Any], parts: Callable[[], Any], dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    net = enliven(Net(run, parts()).eval()).to(dtype)
    return exported(net, (torch.randn(2, C, 9, 8, dtype=dtype),), BATCH)


def calls(program: ExportedProgram, what: str) -> int:
    return sum(what in str(node.target) for node in program.graph.nodes if node.op == "call_function")


def agree(one: ExportedProgram, other: ExportedProgram, limit: float) -> None:
    x = torch.randn(3, C, 9, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    x = x.to(next(iter(one.state_dict.values())).dtype)
    with torch.no_grad():
        expected, found = (torch.utils._pytree.tree_leaves(p.module()(x.clone())) for p in (one, other))
    for a, b in zip(expected, found, strict=True):
        assert a.dtype == b.dtype
        assert float((a - b).abs().max()) <= limit * float(a.abs().max())


@pytest.mark.parametrize(
    ("name", "apart"),
    [*((name, False) for name in ONE), *((name, True) for name in ("repvgg", "mobileone", "norm behind"))],
)
def test_the_branches_of_a_block_become_one_convolution(name: str, apart: bool) -> None:
    program = program_of(*ONE[name])
    program = decomposed(program) if apart else program
    plan, observed = plan_fold_program(program)
    merged = apply_fold_program(observed, Plan.from_json(plan.to_json()))
    assert (calls(merged, "conv"), calls(merged, "norm"), calls(merged, "aten.add")) == (1, 0, 0)
    assert not plan.skips
    assert {site.level for site in plan.fold_sites} <= {"graph"}
    assert len(merged.state_dict) <= 2
    agree(program, merged, EXACT)
    assert not bntool.fold(merged, check="none").modified


@pytest.mark.parametrize("name", SEPARATE)
def test_branches_that_are_not_one_convolution_stay(name: str) -> None:
    run, parts, left = SEPARATE[name]
    program = program_of(run, parts)
    plan, observed = plan_fold_program(program)
    assert plan.merges == ()
    kept = apply_fold_program(observed, plan)
    assert calls(kept, "conv") == left
    agree(program, kept, EXACT)


def test_a_write_to_what_others_see_is_no_part_of_a_merge() -> None:
    program = program_of(into_the_source, lambda: {"dense": conv(3), "point": conv(1)})
    plan, observed = plan_fold_program(program)
    merged = apply_fold_program(observed, plan)
    assert calls(merged, "add_") == 1
    agree(program, merged, EXACT)


def test_without_merging_the_branches_stay() -> None:
    program = program_of(*ONE["repvgg"])
    plan = bntool.fold(program, merge=False, check="none").plan
    assert plan.merges == ()
    assert [skip.name for skip in plan.skips] == ["itself"]


def test_an_excluded_batch_norm_stays_and_the_rest_merges() -> None:
    result = bntool.fold(program_of(*ONE["repvgg"]), exclude=("itself",), check="none")
    assert (calls(result.program, "conv"), calls(result.program, "norm")) == (1, 1)


def test_blocks_in_a_row_merge_each_by_itself() -> None:
    torch.manual_seed(0)
    nets = [enliven(Net(repvgg, repvgg_parts()).eval()) for _ in range(3)]
    program = exported(nn.Sequential(*nets).double(), (torch.randn(2, C, 9, 8, dtype=torch.float64),))
    result = bntool.fold(program)
    assert all(check.passed for check in result.checks)
    assert [merge.layer for merge in result.plan.merges] == ["0.dense.0", "1.dense.0", "2.dense.0"]
    assert calls(result.program, "conv") == 3


def test_a_batch_norm_written_out_merges_with_the_rest() -> None:
    """torchvision's frozen one, as arithmetic: its nodes and buffers go too."""
    parts = {**repvgg_parts(), "itself": FrozenBatchNorm2d(C)}
    parts["itself"].running_var.uniform_(0.5, 2)
    parts["itself"].running_mean.normal_()
    program = program_of(repvgg, lambda: parts)
    result = bntool.fold(program)
    assert (calls(result.program, "conv"), calls(result.program, "norm")) == (1, 0)
    assert all(check.passed for check in result.checks)
    assert set(result.program.state_dict) == {"dense.0.weight", "dense.0.bias"}
    targets = [str(n.target) for n in result.program.graph.nodes if n.op == "call_function"]
    assert targets == ["aten.conv2d.default", "aten.relu.default"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_sum_is_rounded_once(dtype: torch.dtype) -> None:
    """To the last bit what float64 gives from the stored numbers, cast once."""
    program = program_of(*ONE["repvgg"], dtype)
    plan, observed = plan_fold_program(program)
    merged = apply_fold_program(observed, plan).state_dict
    again, seen = plan_fold_program(in_float64(program))
    wide = apply_fold_program(seen, again).state_dict
    assert merged["dense.0.weight"].dtype == dtype
    for name, tensor in merged.items():
        assert torch.equal(tensor, wide[name].to(dtype))


def test_a_sum_that_float16_cannot_hold_is_not_made() -> None:
    torch.manual_seed(0)
    net = Net(lambda m, x: m.a(x) + m.b(x), {"a": conv(1), "b": conv(1)}).eval()
    with torch.no_grad():
        for layer in (net.a, net.b):
            layer.weight.fill_(6e4)
    program = exported(net.half(), (torch.randn(2, C, 9, 8).half(),))
    assert plan_fold_program(program)[0].merges == ()


def test_a_merge_that_the_check_does_not_bear_out_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ProgramProof.rows

    def distrusting(proof: ProgramProof, plan: Plan, after: Any) -> Any:
        if plan.merges:
            raise CheckFailed("it differs")
        return rows(proof, plan, after)

    monkeypatch.setattr(ProgramProof, "rows", distrusting)
    result = bntool.fold(program_of(*ONE["repvgg"]))
    assert result.plan.merges == ()
    assert len(result.plan.sites) == 2
    assert any("it differs" in note for note in result.plan.notes)
    assert all(check.passed for check in result.checks)


@pytest.mark.parametrize("name", ["repvgg_a0", "fastvit_t8"])
def test_the_law_does_as_well_as_a_models_own_method(name: str) -> None:
    """No block's own method is used here; timm's count is what its methods leave."""
    timm = pytest.importorskip("timm")
    model = enliven(timm.create_model(name, num_classes=10).eval())
    x = (torch.randn(1, 3, 64, 64),)
    own = timm.utils.reparameterize_model(model)
    most = sum(isinstance(m, nn.Conv2d) for m in own.modules())
    result = bntool.fold(exported(model, x))
    assert calls(result.program, "conv") <= most
    assert calls(result.program, "norm") == 0
    assert result.plan.merges
    assert [check.passed for check in result.checks] == [True, True]


# -- ONNX -----------------------------------------------------------------------------------------------

ZOO = {net.name: net for net in ONNX_ZOO}
MERGED = [name for name in ZOO if name.startswith("merge_")]
"""That they compute the same, and their verdicts, the tests of the whole zoo prove."""


def nodes(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize("name", MERGED)
def test_an_onnx_block_becomes_one_convolution(name: str) -> None:
    subject = ir.from_proto(ZOO[name].model())
    plan, observed = plan_fold_onnx(subject)
    apply_fold_onnx(observed, Plan.from_json(plan.to_json()))
    folded = ir.to_proto(subject)
    assert nodes(folded) in (["Conv"], ["Conv", "Relu"])
    assert folded.graph.node[0].name == plan.merges[0].layer
    # the weights of the branches that are gone go with them
    assert len(folded.graph.initializer) <= 2
    assert [o.name for o in folded.graph.output] == ["y"]


def test_no_merge_leaves_an_onnx_file_its_branches(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(ZOO["merge_repvgg"].model(), path)
    result = fold_onnx(path, tmp_path / "out.onnx", merge=False)
    assert result.plan.merges == ()
    assert nodes(onnx.load(tmp_path / "out.onnx")).count("Conv") == 2


def test_a_plan_is_replayed_on_other_weights() -> None:
    net = ZOO["merge_repvgg"]
    plan, _ = plan_fold_onnx(ir.from_proto(net.model()))
    other = net.model()
    for tensor in other.graph.initializer:
        numbers = onnx.numpy_helper.to_array(tensor)
        tensor.CopyFrom(onnx.numpy_helper.from_array(numbers * numbers.dtype.type(1.25), tensor.name))
    subjects = [ir.from_proto(other) for _ in range(2)]
    for subject, own in zip(subjects, (False, True), strict=True):
        made, observed = plan_fold_onnx(subject)
        apply_fold_onnx(observed, made if own else dataclasses.replace(plan, signature=made.signature))
    replayed, fresh = (ir.to_proto(subject) for subject in subjects)
    assert replayed.SerializeToString() == fresh.SerializeToString()
