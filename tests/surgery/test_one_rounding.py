"""Whatever many edits meet in a tensor: it is the float64 result, rounded once, in every kind of model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import bntool
from bntool.core.errors import PlanError
from bntool.core.plan import Plan
from bntool.files.stored import open_stored
from bntool.folding import plan_fold
from bntool.graph.inputs import Inputs
from bntool.observe.eager import observe
from bntool.pipeline.onnx_folding import plan_fold_onnx
from bntool.surgery.fold_modules import apply_fold
from bntool.surgery.fold_onnx import apply_fold_onnx
from bntool.surgery.fold_program import apply_fold_program, in_float64
from bntool.surgery.fold_stored import fold_stored
from tests.laws.exactness import Numbers, few, numbers
from tests.program_zoo import plan_fold_program

X = torch.ones(2, 4, 6, 6)
BN = nn.BatchNorm2d


def filled(*layers: nn.Module, seed: int = 0) -> nn.Sequential:
    """The layers in a row, in float32, with BatchNorms that do something."""
    for number, layer in enumerate(layers):
        if isinstance(layer, BN):
            Numbers("mixed", True, 1e-5, 1.0, seed + number).fill(layer)
    return nn.Sequential(*layers).float().eval()


def two_sides() -> nn.Sequential:
    torch.manual_seed(0)
    return filled(BN(4), nn.Conv2d(4, 6, 3), BN(6))


def two_behind() -> nn.Sequential:
    torch.manual_seed(0)
    return filled(nn.Conv2d(4, 6, 3), BN(6), BN(6))


def exact_of(model: nn.Sequential) -> tuple[Tensor, Tensor]:
    """Weight and bias of the one convolution, in float64, by the algebra written out."""
    weight, bias, met = None, None, []
    for layer in copy.deepcopy(model).double():
        if isinstance(layer, nn.Conv2d):
            weight, bias = layer.weight.detach(), layer.bias.detach()
            for scale, shift in reversed(met):
                bias = bias + (weight.sum((2, 3)) @ shift)
                weight = weight * scale.view(1, -1, 1, 1)
            continue
        scale = (layer.weight / (layer.running_var + layer.eps).sqrt()).detach()
        shift = (layer.bias - scale * layer.running_mean).detach()
        if weight is None:
            met.append((scale, shift))
        else:
            weight, bias = weight * scale.view(-1, 1, 1, 1), bias * scale + shift
    assert weight is not None
    return weight, bias


def as_module(model: nn.Sequential, folder: Path) -> list[Tensor]:
    folded = bntool.fold(model, X).model
    return [tensor.detach() for tensor in folded.parameters()]


def as_program(model: nn.Sequential, folder: Path) -> list[Tensor]:
    folded = bntool.fold(torch.export.export(model, (X,)), (X,)).program
    return [tensor.detach() for tensor in folded.state_dict.values()]


def as_onnx(model: nn.Sequential, folder: Path) -> list[Tensor]:
    bntool.export_onnx(model, X, folder / "a.onnx")
    bntool.pipeline.onnx_folding.fold_onnx(folder / "a.onnx", folder / "b.onnx")
    stored = onnx.load(folder / "b.onnx").graph.initializer
    return [torch.tensor(numpy_helper.to_array(tensor)) for tensor in stored]


def as_stored(model: nn.Sequential, folder: Path) -> list[Tensor]:
    save_file(model.state_dict(), folder / "a.safetensors")
    plan = bntool.plan_fold(model, X)
    fold_stored(open_stored(folder / "a.safetensors"), plan).write(folder / "b.safetensors")
    return list(load_file(folder / "b.safetensors").values())


@pytest.mark.parametrize(
    ("kind", "make"),
    [(kind, make) for kind in (as_module, as_program, as_onnx) for make in (two_sides, two_behind)]
    + [(as_stored, two_behind)],
)
def test_two_norms_round_a_weight_once(
    kind: Callable[[nn.Sequential, Path], list[Tensor]], make: Callable[[], nn.Sequential], tmp_path: Path
) -> None:
    """Not one number is another than the float64 one rounded.

    Float64 sums may be off by 1e-15 of themselves, which moves a rounding to float32 once in 10⁸ numbers.
    """
    model = make()
    weight, bias = exact_of(model)
    found = {tensor.dim(): tensor for tensor in kind(model, tmp_path)}
    assert found.keys() == {1, 4}
    assert torch.equal(found[4], weight.float())
    assert torch.equal(found[1], bias.float())


# -- chains ---------------------------------------------------------------------------------------------

layers = st.sampled_from(["conv", "grouped", "transposed", "none"])
dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


@few
@given(st.lists(numbers, max_size=3), layers, st.booleans(), st.lists(numbers, max_size=3), dtypes)
def test_a_chain_is_the_float64_one_rounded(
    before: list[Numbers], layer: str, bias: bool, behind: list[Numbers], dtype: torch.dtype
) -> None:
    """The same plan in float64, on the same numbers, rounded: all of the edits' arithmetic is the same.

    With no layer, the BatchNorms between two activations go into each other.
    """
    made: dict[str, nn.Module] = {
        "conv": nn.Conv2d(4, 4, 3, bias=bias),
        "grouped": nn.Conv2d(4, 4, 3, groups=2, bias=bias),
        "transposed": nn.ConvTranspose2d(4, 4, 1, bias=bias),
        "none": nn.Identity(),
    }
    model = nn.Sequential(
        nn.Tanh(), *(n.fill(BN(4)) for n in before), made[layer], *(n.fill(BN(4)) for n in behind), nn.Tanh()
    )
    model = model.to(dtype).eval()
    plan = plan_fold(observe(model, Inputs((X.to(dtype),))).graph)
    folded = apply_fold(model, plan).state_dict()
    wide = apply_fold(copy.deepcopy(model).double(), plan).state_dict()
    assert folded.keys() == wide.keys()
    for name, tensor in folded.items():
        assert torch.equal(tensor, wide[name].to(tensor.dtype)), name


@pytest.mark.parametrize("seed", range(3))
def test_a_chain_in_a_program_is_the_float64_one_rounded(seed: int) -> None:
    torch.manual_seed(seed)
    conv = nn.Conv2d(4, 6, 3, bias=bool(seed % 2))
    model = filled(BN(4), BN(4), conv, BN(6), BN(6), nn.Tanh(), BN(6), BN(6), nn.Tanh(), seed=seed)
    program = torch.export.export(model, (X,))
    plan, observed = plan_fold_program(program)
    assert len(plan.sites) == 5
    folded = apply_fold_program(observed, plan).state_dict
    wide_observed = plan_fold_program(in_float64(program))[1]
    wide = apply_fold_program(wide_observed, plan).state_dict
    assert folded.keys() == wide.keys()
    for name, tensor in folded.items():
        assert torch.equal(tensor, wide[name].to(tensor.dtype)), name


# -- what a file may hold ----------------------------------------------------------------------------------


def test_the_factors_of_a_gemm_are_rounded_with_the_edits() -> None:
    """alpha·A·W + beta·C: both factors and two BatchNorms, and still one rounding."""
    generator = np.random.default_rng(0)
    weight, bias = generator.normal(size=(4, 5)), generator.normal(size=5)
    norms = [[generator.uniform(0.5, 2, 5) for _ in range(4)] for _ in range(2)]
    stored = {"w": weight, "c": bias}
    nodes = [helper.make_node("Gemm", ["x", "w", "c"], ["h"], alpha=0.3, beta=0.7)]
    for i, (norm, into, out) in enumerate(zip(norms, "hi", "iy", strict=True)):
        names = [f"{role}{i}" for role in ("g", "b", "m", "v")]
        stored |= dict(zip(names, norm, strict=True))
        nodes.append(helper.make_node("BatchNormalization", [into, *names], [out], epsilon=1e-3))
    stored = {name: array.astype(np.float32) for name, array in stored.items()}
    graph = helper.make_graph(
        nodes,
        "gemm",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 5])],
        [numpy_helper.from_array(array, name) for name, array in stored.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    plan, observed = plan_fold_onnx(ir.from_proto(model))
    assert len(plan.sites) == 2
    apply_fold_onnx(observed, plan)
    graph = ir.to_proto(observed.model).graph
    assert [node.op_type for node in graph.node] == ["Gemm"]
    assert {attribute.name for attribute in graph.node[0].attribute}.isdisjoint({"alpha", "beta"})
    wide = {name: array.astype(np.float64) for name, array in stored.items()}
    w, c = wide["w"] * float(np.float32(0.3)), wide["c"] * float(np.float32(0.7))
    for i in range(2):
        scale = wide[f"g{i}"] / np.sqrt(wide[f"v{i}"] + float(np.float32(1e-3)))
        w, c = w * scale, c * scale + wide[f"b{i}"] - scale * wide[f"m{i}"]
    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    assert np.array_equal(found["w"], w.astype(np.float32))
    assert np.array_equal(found["c"], c.astype(np.float32))


def test_a_shift_that_the_plan_has_no_bias_for_is_told() -> None:
    """The plan of a BatchNorm that shifts nothing, on weights where it does."""
    model = nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), BN(6)).eval()
    plan = Plan.from_json(bntool.plan_fold(model, X).to_json())
    assert len(plan.sites) == 1
    with torch.no_grad():
        model[1].bias.fill_(1.0)
    with pytest.raises(PlanError, match=r"makes no bias for 0") as raised:
        apply_fold(model, plan)
    assert "trained checkpoint" in str(raised.value.next_step)
