"""Pools, means, upsampling and padding between a convolution and a BatchNorm, both ways round."""

from __future__ import annotations

from typing import Any

import pytest
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from bntool.core.reasons import Reason
from tests.laws.exactness import CONVS, NORMS, Chain, Numbers, data, few, numbers, verdict

SIDE = {1: (9,), 2: (7, 6), 3: (5, 4, 6)}


def both_ways(dims: int, step: Any, fill: Numbers) -> tuple[Reason | None, Reason | None]:
    """The verdicts of conv -> step -> BN, and of BN -> step -> conv without padding."""
    x = data(2, 4, *SIDE[dims], seed=fill.seed)
    up = Chain(CONVS[dims](4, 6, 1), step, fill.fill(NORMS[dims](6)))
    down = Chain(fill.fill(NORMS[dims](4)), step, CONVS[dims](4, 3, 1))
    return verdict(up, x), verdict(down, x)


@few
@given(
    numbers,
    st.sampled_from([1, 2, 3]),
    st.integers(1, 3),
    st.integers(1, 3),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_average_pool(
    fill: Numbers, dims: int, kernel: int, stride: int, pad: bool, ceil: bool, counted: bool
) -> None:
    padding = kernel // 2 if pad else 0
    pool = getattr(F, f"avg_pool{dims}d")
    up, down = both_ways(
        dims, lambda x: pool(x, kernel, stride, padding, ceil_mode=ceil, count_include_pad=counted), fill
    )
    if padding and counted and fill.shift:
        assert up is Reason.SHIFT_AT_PADDING
        assert down is Reason.REACHES_INPUT
    else:
        assert up is None
        assert down is None


@few
@given(numbers, st.integers(1, 5))
def test_average_pool_with_a_divisor(fill: Numbers, divisor: int) -> None:
    up, down = both_ways(2, lambda x: F.avg_pool2d(x, 2, divisor_override=divisor), fill)
    assert (up is None) == (not fill.shift)
    assert (down is None) == (not fill.shift)


@few
@given(
    numbers, st.sampled_from([1, 2, 3]), st.integers(1, 3), st.booleans(), st.booleans(), st.integers(1, 2)
)
def test_max_pool(fill: Numbers, dims: int, kernel: int, pad: bool, ceil: bool, dilation: int) -> None:
    pool = getattr(F, f"max_pool{dims}d")
    padding = kernel // 2 if pad and dilation == 1 else 0
    if dilation * (kernel - 1) >= 4:
        dilation = 1
    up, down = both_ways(dims, lambda x: pool(x, kernel, 1, padding, dilation=dilation, ceil_mode=ceil), fill)
    blocked = fill.has_negative and kernel > 1
    assert up is (Reason.NEGATIVE_SCALE if blocked else None)
    assert (down is None) == (not blocked)


@few
@given(numbers, st.sampled_from([1, 2, 3]), st.integers(1, 4), st.booleans())
def test_adaptive_pools(fill: Numbers, dims: int, size: int, largest: bool) -> None:
    pool = getattr(F, f"adaptive_{'max' if largest else 'avg'}_pool{dims}d")
    up, down = both_ways(dims, lambda x: pool(x, size), fill)
    assert (up is None) == (down is None) == (not (largest and fill.has_negative))


def test_indices_of_a_max_pool_forbid_it() -> None:
    fill = Numbers("positive", True, 1e-5, 1.0, 0)
    up, _ = both_ways(2, lambda x: sum(F.max_pool2d(x, 2, return_indices=True)), fill)
    assert up is not None


class Keeps(nn.Module):
    """What another layer reads of a pool, or what outlives the forward."""

    def __init__(self, use: str) -> None:
        super().__init__()
        fill = Numbers("positive", True, 1e-5, 1.0, 0)
        self.first, self.norm, self.use = nn.Conv2d(4, 4, 1), fill.fill(nn.BatchNorm2d(4)), use

    def forward(self, x: Tensor) -> Tensor:
        largest, places = F.max_pool2d(self.first(x), 2, return_indices=True)
        if self.use == "kept":
            self.places = places
        return self.norm(largest) + (places.sum() if self.use == "read" else 0)


@pytest.mark.parametrize("use", ["", "read", "kept"])
def test_where_the_largest_was_may_interest_nobody(use: str) -> None:
    assert verdict(Keeps(use), data(2, 4, 6, 6)) is (Reason.UNKNOWN_OP if use else None)


@pytest.mark.parametrize(
    ("pads", "value", "found"),
    [
        ((1, 1), 0.0, None),  # a part that has no map
        ((2, 0), 0.0, None),
        ((0, 0), 0.0, Reason.REACHES_INPUT),  # at another size there may be some
        ((1, -1), 0.0, Reason.REACHES_INPUT),
        ((-1, -1), 0.0, Reason.REACHES_INPUT),
        ((1, 1), 2.0, Reason.REACHES_INPUT),
    ],
)
def test_what_is_beside_the_channels_at_every_size(
    pads: tuple[int, int], value: float, found: Reason | None
) -> None:
    fill = Numbers("positive", True, 1e-5, 1.0, 0)
    pad = lambda x: F.pad(x, pads, value=value)  # noqa: E731
    model = Chain(fill.fill(nn.BatchNorm1d(4)), pad, nn.Linear(4 + sum(pads), 3))
    assert verdict(model, data(5, 4)) is found
    model = Chain(
        nn.Linear(3, 4), pad, Numbers("positive", True, 1e-5, 1.0, 0).fill(nn.BatchNorm1d(4 + sum(pads)))
    )
    varies = value != 0.0 or min(pads) < 0
    assert verdict(model, data(5, 3)) is (Reason.AXIS_MISMATCH if varies else Reason.SHIFT_AT_PADDING)


@pytest.mark.parametrize("pool", [F.adaptive_avg_pool2d, F.adaptive_max_pool2d])
def test_a_pool_over_the_channel_axis_lets_nothing_by(pool: Any) -> None:
    """Without a batch axis the pool of (N, C, L) mixes channels."""
    fill = Numbers("positive", True, 1e-5, 1.0, 0)
    model = Chain(nn.Conv1d(4, 8, 1), lambda x: pool(x, (4, 3)), fill.fill(nn.BatchNorm1d(4)))
    assert verdict(model, data(2, 4, 6)) is Reason.AXIS_MISMATCH


MODES = [
    (1, "nearest"), (2, "nearest"), (3, "nearest"), (1, "linear"), (2, "bilinear"), (2, "bicubic"),
    (3, "trilinear"), (1, "nearest-exact"), (2, "nearest-exact"), (3, "nearest-exact"),
]  # fmt: skip


@few
@given(numbers, st.sampled_from(MODES), st.sampled_from([0.6, 1.0, 1.7, 2.0]), st.booleans(), st.booleans())
def test_upsampling(fill: Numbers, mode: tuple[int, str], factor: float, corners: bool, smooth: bool) -> None:
    dims, name = mode
    options: dict[str, Any] = {} if "nearest" in name else {"align_corners": corners}
    if name in ("bilinear", "bicubic"):
        options["antialias"] = smooth
    up, down = both_ways(dims, lambda x: F.interpolate(x, scale_factor=factor, mode=name, **options), fill)
    assert up is None
    assert down is None


@few
@given(numbers, st.sampled_from([(2, 3), (2,), (-1,), (-2, -1)]), st.booleans())
def test_mean_and_amax_over_space(fill: Numbers, axes: tuple[int, ...], largest: bool) -> None:
    up, down = both_ways(2, lambda x: (x.amax if largest else x.mean)(axes, keepdim=True), fill)
    assert (up is None) == (down is None) == (not (largest and fill.has_negative))


@few
@given(numbers, st.sampled_from([(2, 3), (-1,), (2,), (0, 2)]), st.booleans())
def test_sum_over_space(fill: Numbers, axes: tuple[int, ...], keepdim: bool) -> None:
    """A shift is added up as often as there are elements."""
    step = lambda x: x.sum(axes, keepdim=keepdim)  # noqa: E731
    if keepdim:
        assert both_ways(2, step, fill) == (None, None)
    model = Chain(fill.fill(nn.BatchNorm2d(4)), lambda x: x.sum((2, 3)), nn.Linear(4, 3))
    assert verdict(model, data(2, 4, 5, 6)) is None


@few
@given(numbers)
def test_global_mean_then_linear(fill: Numbers) -> None:
    model = Chain(fill.fill(nn.BatchNorm2d(4)), lambda x: x.mean((-1, 2)), nn.Linear(4, 3))
    assert verdict(model, data(2, 4, 5, 6)) is None


@few
@given(numbers, st.sampled_from([(1,), (0, 1), (1, 2, 3)]))
def test_mean_over_channels_lets_nothing_by(fill: Numbers, axes: tuple[int, ...]) -> None:
    step = lambda x: x.mean(axes, keepdim=True).expand(2, 4, 5, 6).contiguous()  # noqa: E731
    model = Chain(fill.fill(nn.BatchNorm2d(4)), step, nn.Conv2d(4, 3, 1))
    assert verdict(model, data(2, 4, 5, 6)) is not None


ORDERED = {
    "max": lambda x: x.max(2, keepdim=True),
    "min": lambda x: x.min(2, keepdim=True),
    "median": lambda x: x.median(2, keepdim=True),
    "kthvalue": lambda x: x.kthvalue(2, 3, keepdim=True),
    "sort": lambda x: x.sort(2, descending=True),
    "topk": lambda x: x.topk(2, 2),
    "amin": lambda x: (x.amin(2, keepdim=True), None),
}


@few
@given(numbers, st.sampled_from(sorted(ORDERED)), st.booleans())
def test_values_in_their_order(fill: Numbers, how: str, placed: bool) -> None:
    def step(x: Tensor) -> Tensor:
        values, places = ORDERED[how](x)
        return values + 0.1 * places if placed and places is not None else values

    up, down = both_ways(2, step, fill)
    assert (up is None) == (down is None) == (not fill.has_negative and (not placed or how == "amin"))
    if placed and how != "amin":
        assert up is Reason.UNKNOWN_OP
    elif up is not None:
        assert up is Reason.NEGATIVE_SCALE


@few
@given(
    numbers,
    st.sampled_from(["bilinear", "nearest", "bicubic"]),
    st.sampled_from(["zeros", "border", "reflection"]),
    st.booleans(),
)
def test_grid_sample(fill: Numbers, mode: str, outside: str, aligned: bool) -> None:
    grid = 1.5 * data(2, 4, 5, 2, seed=1).tanh()

    def step(x: Tensor) -> Tensor:
        return F.grid_sample(x, grid, mode=mode, padding_mode=outside, align_corners=aligned)

    for found in both_ways(2, step, fill):
        assert (found is None) == (outside != "zeros" or not fill.shift)


def test_a_grid_that_depends_on_what_changes_is_kept() -> None:
    def step(x: Tensor) -> Tensor:
        return F.grid_sample(x, x[:, :2].movedim(1, -1).tanh(), padding_mode="border", align_corners=False)

    fill = Numbers("positive", True, 1e-5, 1.0, 0)
    assert both_ways(2, step, fill) == (Reason.OUTPUT_USED_ELSEWHERE, Reason.REACHES_INPUT)


PADS = st.tuples(*[st.integers(-1, 2)] * 4)


@few
@given(
    numbers,
    PADS,
    st.sampled_from(["constant", "reflect", "replicate", "circular"]),
    st.sampled_from([0.0, 0.0, 1.5]),
)
def test_padding(fill: Numbers, pads: tuple[int, ...], mode: str, value: float) -> None:
    if mode != "constant":
        pads, value = tuple(map(abs, pads)), 0.0
    up, down = both_ways(2, lambda x: F.pad(x, pads, mode=mode, value=value), fill)
    # amounts of zero or less are no exception: they may come from the size of the image
    exact = mode != "constant" or (value == 0.0 and not fill.shift)
    assert (up is None) == exact
    assert (down is None) == exact
    if not exact:
        assert up is Reason.SHIFT_AT_PADDING


@few
@given(numbers, st.integers(0, 2), st.integers(0, 2), st.integers(-1, 1))
def test_zeros_beside_the_channels(fill: Numbers, left: int, right: int, side: int) -> None:
    """Behind them the BatchNorm needs a scale alone; before them it may have a shift, which they lack."""

    def step(x: Tensor) -> Tensor:
        return F.pad(x, (side, 0, 0, 0, left, right) if side else (0, 0) * 2 + (left, right))

    wide = 4 + left + right
    up = Chain(nn.Conv2d(4, 4, 1), step, fill.fill(nn.BatchNorm2d(wide)))
    assert (verdict(up, data(2, 4, 5, 6)) is None) == (not fill.shift)
    down = Chain(fill.fill(nn.BatchNorm2d(4)), step, nn.Conv2d(wide, 3, 1))
    found = verdict(down, data(2, 4, 5, 6))
    # an amount of zero for the sides may come from the size of the image: it counts as padding
    assert (found is None) == (not fill.shift)
    only = Chain(
        fill.fill(nn.BatchNorm1d(4)),
        lambda x: F.pad(x.permute(0, 2, 1), (left, right)).permute(0, 2, 1),
        nn.Conv1d(wide, 3, 1),
    )
    assert (verdict(only, data(2, 4, 5)) is None) == (left + right > 0 or not fill.shift)
