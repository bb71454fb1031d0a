"""Affine maps: their arithmetic, and that an expression computes again what the map holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bntool.graph.affine import Affine, Constant, add, batch_norm_affine, compose, concat, identity, merge
from bntool.graph.steps import evaluate, first_asked

NAN = float("nan")


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_map(seed: int, channels: int = 4) -> Affine:
    """A map over axis 1 of a value (N, C, L), with leaves that `leaf` knows."""
    scale, shift = random(2, channels, seed=seed)
    return Affine(scale, shift, ("bn", f"{channels}:{seed}")).then("place", 3, 1)


def leaf(kind: str, name: str) -> Any:
    channels, seed = map(int, name.split(":"))
    return tuple(random(2, channels, seed=seed)) if kind == "bn" else random(channels, 1, seed=seed)


def of(affine: Affine, x: Tensor) -> Tensor:
    return affine.scale * x + affine.shift


def assert_replays(affine: Affine) -> None:
    scale, shift = evaluate(affine.expr, leaf)
    assert torch.equal(scale.nan_to_num(7), affine.scale.nan_to_num(7))
    assert torch.equal(shift.nan_to_num(7), affine.shift.nan_to_num(7))


def close(a: Tensor, b: Tensor) -> bool:
    """Within a few roundings of float64."""
    return bool(torch.allclose(a, b, rtol=1e-12, atol=1e-12))


@given(st.integers(0, 99), st.sampled_from([1e-12, 1e-5, 1e-1]), st.booleans(), st.booleans())
def test_batch_norm_affine_is_batch_norm(seed: int, eps: float, gamma: bool, beta: bool) -> None:
    weight, bias, mean = random(3, 4, seed=seed)
    variance = random(4, seed=seed + 1).square()
    x = random(2, 4, 5, seed=seed + 2)
    scale, shift = batch_norm_affine(weight if gamma else None, bias if beta else None, mean, variance, eps)
    expected = F.batch_norm(x, mean, variance, weight if gamma else None, bias if beta else None, eps=eps)
    found = scale.view(4, 1) * x + shift.view(4, 1)
    # s·x and −s·μ may cancel: the error is that of the larger of the two
    bound = 1e-13 * (scale.abs().view(4, 1) * (x.abs() + mean.abs().view(4, 1)) + 10)
    assert bool(((found - expected).abs() <= bound).all())


@given(st.integers(0, 99), st.integers(0, 99))
def test_compose_is_one_after_the_other(first: int, second: int) -> None:
    outer, inner, x = random_map(first), random_map(second), random(2, 4, 5, seed=7)
    joined = compose(outer, inner)
    assert close(of(joined, x), of(outer, of(inner, x)))
    assert_replays(joined)


@given(st.integers(0, 99), st.integers(0, 99), st.sampled_from([1.0, -1.0, 0.3]))
def test_maps_move_around_an_added_constant(seed: int, other: int, factor: float) -> None:
    affine, x = random_map(seed), random(2, 4, 5, seed=7)
    constant = Constant.of(random(4, 1, seed=other), f"4:{other}", 3)
    c = factor * constant.tensor
    before = affine.then_constant("before_add", constant, factor)
    assert close(of(before, x) + c, of(affine, x + c))
    after = affine.then_constant("after_add", constant, factor)
    assert close(of(after, x + c), of(affine, x) + c)
    assert_replays(before)
    assert_replays(after)


@given(st.integers(0, 99), st.integers(0, 99))
def test_maps_move_around_a_factor(seed: int, other: int) -> None:
    affine, x = random_map(seed), random(2, 4, 5, seed=7)
    constant = Constant.of(random(4, 1, seed=other), "", 3)
    c = constant.tensor
    assert close(c * of(affine.then_constant("divide_shift", constant), x), of(affine, c * x))
    after = affine.then_constant("multiply_shift", constant)
    assert close(of(after, c * x), c * of(affine, x))
    assert_replays(after)


@given(st.integers(0, 99))
def test_the_parts_of_a_map_make_it_up(seed: int) -> None:
    affine, x = random_map(seed), random(2, 4, 5, seed=7)
    scale, shift = affine.then("scale_part"), affine.then("shift_part")
    assert close(of(shift, of(scale, x)), of(affine, x))
    assert close(of(scale, of(affine.then("unscaled_shift"), x)), of(affine, x))
    assert not scale.has_shift
    assert not shift.has_scale
    for part in (scale, shift, affine.then("unscaled_shift")):
        assert_replays(part)


@given(st.integers(0, 99), st.permutations(range(3)))
def test_permuting_a_map_is_permuting_the_value(seed: int, dims: list[int]) -> None:
    affine, x = random_map(seed), random(2, 4, 5, seed=7)
    moved = affine.then("permute", tuple(dims))
    assert torch.equal(of(moved, x.permute(dims)), of(affine, x).permute(dims))
    assert_replays(moved)


@given(st.integers(0, 99), st.integers(0, 3), st.integers(1, 4), st.integers(1, 2))
def test_slice_and_embed_are_inverse(seed: int, start: int, stop: int, step: int) -> None:
    stop = max(stop, start + 1)
    affine, x = random_map(seed), random(2, 4, 5, seed=7)
    part = affine.then("slice", 1, start, stop, step)
    assert torch.equal(of(part, x[:, start:stop:step]), of(affine, x)[:, start:stop:step])
    whole = part.then("embed", 1, 4, start, stop, step)
    again = whole.then("slice", 1, start, stop, step)
    assert again.equals(part)
    assert int(whole.scale.isnan().sum()) == 4 - part.scale.shape[1]
    filled = whole.then("fill")
    assert not filled.scale.isnan().any()
    assert_replays(filled)


@given(st.integers(0, 99))
def test_parts_that_do_not_overlap_merge(seed: int) -> None:
    a = random_map(seed, 2).then("embed", 1, 4, 0, 2, 1)
    b = random_map(seed + 1, 2).then("embed", 1, 4, 2, 4, 1)
    both = merge(a, b)
    assert both is not None
    assert both.then("slice", 1, 0, 2, 1).equals(random_map(seed, 2))
    assert both.then("slice", 1, 2, 4, 1).equals(random_map(seed + 1, 2))
    assert_replays(both)
    assert merge(both, identity(3)) is None
    same = merge(both, both)
    assert same is not None
    assert same.equals(both)


@given(st.integers(0, 99), st.integers(1, 3), st.integers(1, 3))
def test_concat_lays_maps_end_to_end(seed: int, left: int, right: int) -> None:
    a, b = random_map(seed, left), random_map(seed + 1, right)
    x, y = random(2, left, 5, seed=7), random(2, right, 5, seed=8)
    joined = concat([a, b, identity(3)], 1, [left, right, 2])
    z = random(2, 2, 5, seed=9)
    assert torch.equal(of(joined, torch.cat([x, y, z], 1)), torch.cat([of(a, x), of(b, y), z], 1))
    assert_replays(joined)


def test_sum_of_maps_needs_equal_scales() -> None:
    a, x, y = random_map(1), random(2, 4, 5, seed=7), random(2, 4, 5, seed=8)
    b = Affine(a.scale, a.shift * 2, ("add", a.then("scale_part").expr, a.expr))
    joined = add(a, b)
    assert joined is not None
    assert close(of(joined, x + y), of(a, x) + of(b, y))
    assert add(a, random_map(2)) is None


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [([1.0, 2.0], [1.0]), ([NAN, 2.0], [2.0]), ([3.0, NAN], [3.0]), ([NAN, NAN], [NAN])],
)
def test_first_asked_passes_over_what_nobody_asks_for(numbers: list[float], expected: list[float]) -> None:
    found = first_asked(torch.tensor(numbers).view(1, -1), 1)
    assert torch.equal(found.nan_to_num(7), torch.tensor(expected).view(1, 1).nan_to_num(7))


def test_what_nobody_asks_for_is_no_demand() -> None:
    nobody = Affine(torch.full((1, 2), NAN), torch.full((1, 2), NAN), ("identity", 2))
    assert nobody.is_identity
    assert not nobody.has_scale
    assert not nobody.has_shift


def test_depends_on_names_the_axes() -> None:
    assert random_map(0).depends_on() == [1]
    assert identity(4).depends_on() == []
