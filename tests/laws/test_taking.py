"""Linear layers take a map in at either side: every layout, group, stride, padding and storage type."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from bntool.core.reasons import Reason
from bntool.folding import plan_fold
from bntool.graph.inputs import Inputs
from bntool.laws.taking import bias_from_input_shift, rows
from bntool.observe.eager import observe
from bntool.surgery.fold_modules import apply_fold
from bntool.surgery.tensors import scaled
from tests.laws.exactness import (
    CONVS,
    NORMS,
    TRANSPOSED,
    Numbers,
    data,
    few,
    folded_exactly,
    numbers,
    verdict,
)

SIDE = {1: (9,), 2: (7, 6), 3: (5, 4, 6)}
dims_of = st.sampled_from([1, 2, 3])
groups_of = st.sampled_from([1, 2, 4])


@few
@given(numbers, dims_of, groups_of, st.integers(1, 3), st.integers(1, 2), st.integers(1, 2),
       st.integers(0, 2), st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
       st.booleans())  # fmt: skip
def test_convolution(
    fill: Numbers,
    dims: int,
    groups: int,
    kernel: int,
    stride: int,
    dilation: int,
    padding: int,
    mode: str,
    bias: bool,
) -> None:
    assume(dilation * (kernel - 1) < 4)
    conv = CONVS[dims](4, 8, kernel, stride, padding, dilation, groups, bias, mode)
    x = data(2, 4, *SIDE[dims], seed=fill.seed)
    assert verdict(nn.Sequential(conv, fill.fill(NORMS[dims](8))), x) is None
    found = verdict(nn.Sequential(fill.fill(NORMS[dims](4)), conv), x)
    assert found is (Reason.REACHES_INPUT if padding and mode == "zeros" and fill.shift else None)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@few
@given(numbers, st.sampled_from(["same", "valid"]), st.integers(1, 3), st.booleans())
def test_convolution_with_padding_by_name(fill: Numbers, padding: str, kernel: int, bias: bool) -> None:
    conv = nn.Conv2d(4, 8, (kernel, 1), padding=padding, bias=bias)
    assert verdict(nn.Sequential(conv, fill.fill(nn.BatchNorm2d(8))), data(2, 4, 7, 6)) is None
    found = verdict(nn.Sequential(fill.fill(nn.BatchNorm2d(4)), conv), data(2, 4, 7, 6))
    assert (found is None) == (not fill.shift or padding == "valid" or kernel == 1)


@few
@given(numbers, dims_of, groups_of, st.integers(1, 3), st.integers(1, 3), st.integers(0, 1),
       st.integers(1, 2), st.integers(0, 1), st.booleans())  # fmt: skip
def test_transposed_convolution(
    fill: Numbers,
    dims: int,
    groups: int,
    kernel: int,
    stride: int,
    padding: int,
    dilation: int,
    extra: int,
    bias: bool,
) -> None:
    assume(extra < max(stride, dilation))
    conv = TRANSPOSED[dims](4, 8, kernel, stride, padding, extra, groups, bias, dilation)
    x = data(2, 4, *SIDE[dims], seed=fill.seed)
    assert verdict(nn.Sequential(conv, fill.fill(NORMS[dims](8))), x) is None
    found = verdict(nn.Sequential(fill.fill(NORMS[dims](4)), conv), x)
    assert (found is None) == (not fill.shift or (kernel == stride == 1 and not extra))


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv1d(4, 8, 3, padding="same"),
        nn.Conv2d(4, 8, (3, 1), padding="same"),
        nn.ConvTranspose1d(4, 8, 3),
        nn.ConvTranspose2d(4, 8, (3, 1)),
    ],
    ids=str,
)
def test_one_axis_with_a_border_is_enough_to_lose_a_shift(conv: nn.Module) -> None:
    dims = conv.weight.dim() - 2
    norm = Numbers("positive", True, 1e-5, 1.0, 0).fill(NORMS[dims](4))
    assert verdict(nn.Sequential(norm, conv), data(2, 4, *SIDE[dims])) is Reason.REACHES_INPUT


@few
@given(numbers, st.booleans())
def test_linear(fill: Numbers, bias: bool) -> None:
    assert verdict(nn.Sequential(nn.Linear(5, 6, bias), fill.fill(nn.BatchNorm1d(6))), data(3, 5)) is None
    assert verdict(nn.Sequential(fill.fill(nn.BatchNorm1d(5)), nn.Linear(5, 6, bias)), data(3, 5)) is None


class Product(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(data(*shape))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


@few
@given(numbers)
def test_product_with_a_matrix(fill: Numbers) -> None:
    up = nn.Sequential(Product(5, 6), fill.fill(nn.BatchNorm1d(6)))
    down = nn.Sequential(fill.fill(nn.BatchNorm1d(5)), Product(5, 6))
    for model in (up, down):
        found = verdict(model, data(3, 5))
        assert (found is None) == (not fill.shift)  # which has no bias to go to


@pytest.mark.parametrize("shape", [(5,), (3, 5, 6)])
def test_product_with_a_vector_or_several_matrices_is_no_linear_layer(shape: tuple[int, ...]) -> None:
    norm = Numbers("positive", False, 1e-5, 1.0, 0).fill(nn.BatchNorm1d(5))
    assert verdict(nn.Sequential(norm, Product(*shape)), data(3, 5)) is Reason.REACHES_INPUT


@few
@given(numbers, numbers, st.booleans())
def test_layer_between_two_norms(first: Numbers, second: Numbers, bias: bool) -> None:
    """Both go into one layer, whichever part of it (weight, bias, a bias just created) they touch."""
    model = nn.Sequential(
        first.fill(nn.BatchNorm2d(4)), nn.Conv2d(4, 8, 2, groups=2, bias=bias), second.fill(nn.BatchNorm2d(8))
    )
    plan, _ = folded_exactly(model, data(2, 4, 5, 5))
    assert not plan.skips


@few
@given(numbers, numbers, st.booleans())
def test_norm_that_stays_takes_another_in(first: Numbers, second: Numbers, swap: bool) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = first.fill(nn.BatchNorm2d(4)), second.fill(nn.BatchNorm2d(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x.tanh())).tanh()

    plan, _ = folded_exactly(Two(), data(2, 4, 5, 5))
    assert [site.bn for site in plan.fold_sites] == ["a"]


# -- storage types and layouts -------------------------------------------------------------------------

UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
VIA_FLOAT32 = 1 + 2.0**-12
"""PyTorch casts float64 to a half type by way of float32, which rounds by 2⁻²⁴ first."""


@pytest.mark.parametrize("dtype", UNIT, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_one_rounding_in_the_storage_type(dtype: torch.dtype, layout: torch.memory_format) -> None:
    """Each folded number is the float64 one rounded once: off by half a unit in its last place at most."""
    fill = Numbers("mixed", True, 1e-5, 1.0, 3)
    conv, norm = nn.Conv2d(4, 8, 3, bias=False), fill.fill(nn.BatchNorm2d(8))
    model = nn.Sequential(conv, norm).to(dtype).to(memory_format=layout).eval()
    model[0].weight.requires_grad_(False)
    plan = plan_fold(observe(model, Inputs((data(2, 4, 6, 6).to(dtype),))).graph)
    folded, wide = apply_fold(model, plan), apply_fold(model.double(), plan)
    model.to(dtype)
    for name, exact in wide.named_parameters():
        found = folded.get_parameter(name)
        assert found.dtype == dtype
        assert found.requires_grad is False
        smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        assert bool(
            ((found.double() - exact).abs() <= VIA_FLOAT32 * UNIT[dtype] * exact.abs() + smallest).all()
        )
    assert folded[0].weight.is_contiguous(memory_format=layout)
    assert folded[0].weight.stride() == model[0].weight.stride()


LAYERS: list[tuple[str, int, Any]] = [
    ("conv", 1, nn.Conv2d(64, 320, 3)), ("conv", 4, nn.Conv2d(64, 1024, 3, groups=4)),
    ("transposed", 1, nn.ConvTranspose2d(320, 64, 3)),
    ("transposed", 4, nn.ConvTranspose2d(512, 256, 3, groups=4)),
    ("linear", 1, nn.Linear(300, 700)), ("conv", 1, nn.Conv2d(150_000, 1, 1)),
]  # fmt: skip


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("layer", LAYERS, ids=lambda e: f"{e[0]}-{e[1]}-{tuple(e[2].weight.shape)}")
def test_large_weights_are_worked_on_in_parts(layer: tuple[str, int, Any], side: str) -> None:
    """What is done part by part is what is done at once."""
    layout, groups, module = layer
    weight = module.weight.detach()
    out_in = (
        (weight.shape[1] * groups, weight.shape[0])
        if layout == "transposed"
        else (weight.shape[0], weight.shape[1] * groups)
    )
    scale = data(out_in[0] if side == "output" else out_in[1])
    factors = rows(layout, weight, groups, scale, side)
    assert torch.equal(scaled(weight, [factors], weight.dtype), (weight.double() * factors).float())


@few
@given(st.sampled_from([1, 2, 3]), st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))
def test_bias_from_a_shift_is_what_the_layer_makes_of_a_constant(
    groups: int, ins: int, outs: int, seed: int
) -> None:
    shift = data(groups * ins, seed=seed)
    conv = nn.Conv2d(groups * ins, groups * outs, (2, 3), groups=groups, bias=False).double()
    image = shift.view(1, -1, 1, 1).expand(1, -1, 2, 3)
    made = bias_from_input_shift("conv", conv.weight.detach(), groups, shift)
    assert torch.allclose(made, conv(image).flatten(), rtol=1e-12, atol=1e-12)
    back = nn.ConvTranspose2d(groups * ins, groups * outs, 1, groups=groups, bias=False).double()
    made = bias_from_input_shift("transposed", back.weight.detach(), groups, shift)
    assert torch.allclose(made, back(shift.view(1, -1, 1, 1)).flatten(), rtol=1e-12, atol=1e-12)
    matrix = data(groups * ins, outs, seed=seed + 1)
    assert torch.allclose(
        bias_from_input_shift("matmul", matrix, 1, shift), shift @ matrix, rtol=1e-12, atol=1e-12
    )


def test_an_unknown_layout_is_a_bug() -> None:
    with pytest.raises(ValueError, match="layout"):
        rows("spiral", torch.ones(2, 2), 1, torch.ones(2), "output")
