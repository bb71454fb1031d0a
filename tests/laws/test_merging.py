"""Parallel convolutions over one value are one convolution exactly where the law says so, in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bntool.core.sites import Window
from bntool.graph.dataflow import Op
from bntool.laws.merging import added_up, identity_window, joined, widened, window_of
from tests.laws.exactness import few

CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
EXACT = 1e-12
"""Relative to peak: sums of at most some hundred products, each with a rounding of 1e-16."""
CHANNELS = 12


def applied(x: Tensor, weight: Tensor, bias: Tensor | None, window: Window) -> Tensor:
    """The convolution by padding with zeros first, so that each side has its own padding."""
    pads = [n for pair in reversed(list(zip(window.before, window.after, strict=True))) for n in pair]
    return CONVOLVE[len(window.kernel)](
        F.pad(x, pads), weight, bias, window.stride, 0, window.dilation, window.groups
    )


@st.composite
def windows(draw: st.DrawFn) -> list[Window]:
    """Branches of any kernels, dilations and groups whose outputs have one length, whatever the input's."""
    dims = draw(st.integers(1, 3))
    several = st.tuples(*[st.integers(1, 2)] * dims)
    stride = draw(several)
    surplus = draw(st.tuples(*[st.integers(0, 1)] * dims))
    found = []
    for _ in range(draw(st.integers(1, 3))):
        kernel = draw(st.tuples(*[st.integers(1, 4)] * dims))
        dilation = draw(st.tuples(*[st.integers(1, 3)] * dims))
        total = [d * (k - 1) + c for k, d, c in zip(kernel, dilation, surplus, strict=True)]
        before = tuple(draw(st.integers(0, n)) for n in total)
        after = tuple(n - b for n, b in zip(total, before, strict=True))
        groups = draw(st.sampled_from([1, 2, 3, 4, 6, CHANNELS]))
        found.append(Window(kernel, stride, dilation, before, after, groups))
    return found


@few
@given(windows(), st.booleans(), st.integers(0, 1000))
def test_the_sum_is_one_convolution(branches: list[Window], itself: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    dims = len(branches[0].kernel)
    x = drawn(2, CHANNELS, *(9, 8, 10)[:dims])
    terms, expected = [], []
    for i, window in enumerate(branches):
        weight, scale, shift = (
            drawn(CHANNELS, CHANNELS // window.groups, *window.kernel),
            drawn(CHANNELS),
            drawn(CHANNELS),
        )
        bias = drawn(CHANNELS) if i % 2 else None
        terms.append((weight, bias, window, scale, shift))
        shape = (-1, *(1,) * dims)
        expected.append(applied(x, weight, bias, window) * scale.reshape(shape) + shift.reshape(shape))
    plain = identity_window(dims, CHANNELS)
    if itself and joined([*branches, plain]) is not None:
        scale, shift = drawn(CHANNELS), drawn(CHANNELS)
        terms.append((None, None, plain, scale, shift))
        expected.append(x * scale.reshape(-1, *(1,) * dims) + shift.reshape(-1, *(1,) * dims))
    target = joined([window for _, _, window, _, _ in terms])
    assert target is not None
    weight, bias = added_up(terms, target)
    assert weight.shape == (CHANNELS, CHANNELS // target.groups, *target.kernel)
    found, total = applied(x, weight, bias, target), sum(expected)
    assert found.shape == total.shape
    assert float((found - total).abs().max()) <= EXACT * max(1.0, float(sum(e.abs() for e in expected).max()))


@few
@given(windows(), st.integers(0, 1000))
def test_the_target_is_no_larger_than_it_must_be(branches: list[Window], seed: int) -> None:
    """Every border of the kernel is a tap of some branch, and there are no more groups to be had."""
    target = joined(branches)
    assert target is not None
    ones = [widened(torch.ones(CHANNELS, CHANNELS // w.groups, *w.kernel), w, target) for w in branches]
    taps = sum(ones).sum((0, 1)) != 0
    for axis in range(taps.dim()):
        rest = [i for i in range(taps.dim()) if i != axis]
        line = taps.any(rest[0]) if len(rest) == 1 else taps.any(tuple(rest)) if rest else taps
        assert bool(line[0]) and bool(line[-1])
        assert math.gcd(*line.nonzero().reshape(-1).tolist()) <= 1  # else the taps could lie closer
    assert target.groups == math.gcd(*(w.groups for w in branches))


def test_what_is_no_convolution_of_one_window() -> None:
    three = Window((3, 3), (1, 1), (1, 1), (1, 1), (1, 1), 1)
    narrower = Window((1, 1), (1, 1), (1, 1), (1, 0), (0, 0), 1)
    faster = Window((1, 1), (2, 2), (1, 1), (0, 0), (0, 0), 1)
    for pair in itertools.permutations((three, narrower, faster), 2):
        assert joined(pair) is None


def test_dilated_taps_fall_between() -> None:
    """Kernel 3 at dilation 2 and kernel 5 at 1 are one kernel of 5 (UniRepLKNet, Ding et al. 2024)."""
    wide = Window((5,), (1,), (1,), (2,), (2,), 4)
    holes = Window((3,), (1,), (2,), (2,), (2,), 4)
    assert joined([wide, holes]) == wide
    taps = widened(torch.ones(4, 1, 3), holes, wide)
    assert taps[0, 0].tolist() == [1, 0, 1, 0, 1]


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 2])
def test_the_value_itself_is_the_tap_in_the_middle(dims: int, dilation: int) -> None:
    """A residual connection around a convolution, whose window it does not widen."""
    each, itself = (dilation,) * dims, identity_window(dims, CHANNELS)
    window = Window((3,) * dims, (1,) * dims, each, each, each, CHANNELS)
    assert joined([window, itself]) == joined([itself, window]) == window
    assert joined([itself, itself]) == itself
    shape = (CHANNELS, 1, *window.kernel)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    one, none = torch.ones(CHANNELS, dtype=torch.float64), torch.zeros(CHANNELS)
    found, _ = added_up([(weight, None, window, one, none), (None, None, itself, 3 * one, none)], window)
    weight[(slice(None), 0, *(1,) * dims)] += 3
    assert torch.equal(found, weight)


def test_a_window_is_known_only_where_the_padding_is() -> None:
    def op(**attrs: object) -> Op:
        usual = {"dims": 1, "transposed": False, "stride": (1,), "dilation": (1,), "groups": 1}
        return Op(0, "conv", {}, (), {**usual, **attrs})

    same = window_of(op(padding="same", dilation=(2,)), (3,))
    assert same is not None
    assert (same.before, same.after) == ((2,), (2,))
    assert window_of(op(padding="same"), (4,)) is None  # which side gets more is the operator's own
    assert window_of(op(padding="same", stride=(2,)), (3,)) is None
    assert window_of(op(padding=(0,), transposed=True), (3,)) is None
    valid = window_of(op(padding="valid"), (4,))
    assert valid is not None
    assert (valid.before, valid.after) == ((0,), (0,))
    sided = window_of(op(padding=(1, 2)), (4,))
    assert sided is not None
    assert (sided.before, sided.after) == ((1,), (2,))
