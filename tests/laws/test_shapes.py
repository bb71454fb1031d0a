"""Ops that only move elements: random chains of them, both ways round, exact whatever the verdict."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bntool.core.reasons import Reason
from bntool.laws import Refused
from bntool.laws.shapes import shape_groups
from tests.laws.exactness import Chain, Numbers, data, few, folded_exactly, numbers, verdict

Step = Callable[[Tensor], Tensor]


@st.composite
def shape_steps(draw: st.DrawFn, shape: tuple[int, ...], length: int) -> list[tuple[str, Any]]:
    """Permutations, reshapes, slices, rolls by concat, selects and chunks that fit one after another."""
    steps: list[tuple[str, Any]] = []
    x = torch.empty(shape)
    for _ in range(length):
        rank = x.dim()
        kind = draw(
            st.sampled_from(
                """permute merge cut slice turn select unsqueeze transpose pick repeat expand
                flip roll move restack interleave index windows""".split()
            )
        )
        axis = draw(st.integers(0, rank - 1))
        if kind == "permute":
            step: tuple[str, Any] = (kind, tuple(draw(st.permutations(range(rank)))))
        elif kind == "merge" and rank > 2:
            axis = min(axis, rank - 2)
            step = ("reshape", (*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :]))
        elif kind == "cut" and rank < 6:
            parts = draw(st.sampled_from([d for d in range(1, x.shape[axis] + 1) if x.shape[axis] % d == 0]))
            step = ("reshape", (*x.shape[:axis], parts, x.shape[axis] // parts, *x.shape[axis + 1 :]))
        elif kind == "slice" and x.shape[axis] > 1:
            start = draw(st.integers(0, x.shape[axis] - 1))
            step = (
                "slice",
                (axis, start, draw(st.integers(start + 1, x.shape[axis])), draw(st.integers(1, 2))),
            )
        elif kind == "turn" and x.shape[axis] > 1:
            step = ("turn", (axis, draw(st.integers(1, x.shape[axis] - 1))))
        elif kind == "select" and rank > 3:
            step = ("select", (axis, draw(st.integers(-x.shape[axis], x.shape[axis] - 1))))
        elif kind == "unsqueeze" and rank < 6:
            step = ("unsqueeze", axis)
        elif kind == "pick":
            places = st.lists(st.integers(0, x.shape[axis] - 1), min_size=1, max_size=4)
            step = ("pick", (axis, draw(st.one_of(places, st.permutations(range(x.shape[axis]))))))
        elif kind == "repeat" and x.numel() < 1000:
            step = ("repeat", tuple(draw(st.lists(st.integers(1, 2), min_size=rank, max_size=rank))))
        elif kind == "expand" and rank < 6:
            step = ("expand", (draw(st.integers(1, 2)), *x.shape))
        elif kind == "flip":
            step = ("flip", (axis, 0) if axis else (0,))
        elif kind == "roll":
            step = ("roll", (axis, draw(st.integers(-3, 3))))
        elif kind in ("move", "restack"):
            step = (kind, (axis, draw(st.integers(0, rank - 1))))
        elif kind == "interleave" and x.numel() < 1000:
            step = ("interleave", (axis, draw(st.integers(1, 3))))
        elif kind == "windows" and rank < 6 and x.shape[axis] > 1:
            step = ("windows", (axis, draw(st.integers(1, x.shape[axis])), draw(st.integers(1, 2))))
        elif kind == "index":
            step = ("index", (axis, draw(st.permutations(range(x.shape[axis])))))
        else:
            step = ("transpose", (axis, 0))
        x = carried_out([step], x)
        steps.append(step)
    return steps


def carried_out(steps: list[tuple[str, Any]], x: Tensor) -> Tensor:
    for kind, argument in steps:
        if kind == "permute":
            x = x.permute(argument)
        elif kind == "reshape":
            x = x.reshape(argument)
        elif kind == "slice":
            axis, start, stop, step = argument
            x = x[(*[slice(None)] * axis, slice(start, stop, step))]
        elif kind == "flip":
            x = x.flip(argument)
        elif kind == "roll":
            x = x.roll(argument[1], argument[0])
        elif kind == "move":
            x = x.movedim(*argument)
        elif kind == "restack":
            x = torch.stack(x.unbind(argument[0]), argument[1])
        elif kind == "interleave":
            x = x.repeat_interleave(argument[1], argument[0])
        elif kind == "windows":
            x = x.unfold(*argument)
        elif kind == "index":
            x = x[(*[slice(None)] * argument[0], torch.tensor(argument[1]))]
        elif kind == "turn":
            axis, size = argument
            head, tail = x.split([size, x.shape[axis] - size], axis)
            x = torch.cat([tail, head], axis)
        elif kind == "select":
            x = x.select(*argument)
        elif kind == "unsqueeze":
            x = x.unsqueeze(argument)
        elif kind == "pick":
            x = x.index_select(argument[0], torch.tensor(argument[1]))
        elif kind == "repeat":
            x = x.repeat(argument)
        elif kind == "expand":
            x = x.expand(argument)
        else:
            x = x.transpose(*argument)
    return x


class _Steps:
    def __init__(self, steps: list[tuple[str, Any]], last: Step) -> None:
        self.steps, self.last = steps, last

    def __call__(self, x: Tensor) -> Tensor:
        return self.last(carried_out(self.steps, x))


@settings(max_examples=120)
@given(numbers, st.data())
def test_any_chain_upstream(fill: Numbers, draw: st.DataObject) -> None:
    """conv -> chain -> BN over whatever axis is then the second."""
    shape = draw.draw(st.sampled_from([(2, 4, 3, 2), (1, 4, 2, 2), (2, 4, 4, 4), (1, 4, 1, 3)]))
    steps = draw.draw(shape_steps(shape, draw.draw(st.integers(1, 4))))
    out = carried_out(steps, torch.empty(shape))
    last: Step = lambda x: x.reshape(x.shape[0], x.shape[1], -1) if x.dim() > 2 else x  # noqa: E731
    model = Chain(nn.Conv2d(3, 4, 1), _Steps(steps, last), fill.fill(nn.BatchNorm1d(out.shape[1])))
    plan, _ = folded_exactly(model, data(shape[0], 3, *shape[2:], seed=fill.seed))
    assert len(plan.sites) + len(plan.skips) == 1


@settings(max_examples=120)
@given(numbers, st.data())
def test_any_chain_downstream(fill: Numbers, draw: st.DataObject) -> None:
    """BN -> chain -> linear over whatever axis is then the last."""
    shape = draw.draw(st.sampled_from([(2, 4, 3, 2), (1, 4, 2, 2), (2, 4, 4, 4), (1, 4, 1, 3)]))
    steps = draw.draw(shape_steps(shape, draw.draw(st.integers(1, 4))))
    out = carried_out(steps, torch.empty(shape))
    model = Chain(fill.fill(nn.BatchNorm2d(4)), _Steps(steps, lambda x: x), nn.Linear(out.shape[-1], 3))
    folded_exactly(model, data(*shape, seed=fill.seed))


@few
@given(numbers, st.permutations(range(6)))
def test_channels_in_another_order(fill: Numbers, order: list[int]) -> None:
    picked = torch.tensor(order)
    model = Chain(nn.Conv2d(4, 6, 1), lambda x: x.index_select(1, picked), fill.fill(nn.BatchNorm2d(6)))
    assert verdict(model, data(2, 4, 3, 3)) is None
    model = Chain(fill.fill(nn.BatchNorm2d(6)), lambda x: x.index_select(1, picked), nn.Conv2d(6, 4, 1))
    assert verdict(model, data(2, 6, 3, 3)) is None


@few
@given(numbers, st.lists(st.booleans(), min_size=6, max_size=6).filter(any))
def test_channels_by_number_and_by_mask(fill: Numbers, mask: list[bool]) -> None:
    chosen = torch.tensor(mask)
    for index in (chosen, chosen.nonzero()[:, 0] - 6):
        norm = fill.fill(nn.BatchNorm2d(6))
        cut = Chain(norm, lambda x, index=index: x[:, index], nn.Conv2d(sum(mask), 4, 1))
        assert verdict(cut, data(2, 6, 3, 3)) is None
        cut = Chain(
            nn.Conv2d(4, 6, 1), lambda x, index=index: x[:, index], fill.fill(nn.BatchNorm2d(sum(mask)))
        )
        assert verdict(cut, data(2, 4, 3, 3)) is None


@pytest.mark.filterwarnings("ignore:indexing with dtype torch.uint8:UserWarning")
def test_a_mask_of_bytes_is_a_mask() -> None:
    mask = torch.tensor([1, 0, 1, 1, 0, 1], dtype=torch.uint8)
    norm = Numbers("mixed", True, 1e-5, 1.0, 0).fill(nn.BatchNorm2d(6))
    model = Chain(norm, lambda x: x[:, mask], nn.Conv2d(4, 3, 1))
    assert verdict(model, data(2, 6, 3, 3)) is None


@few
@given(numbers)
def test_an_index_of_other_axes_or_of_data_is_no_law(fill: Numbers) -> None:
    column = torch.tensor([[1], [3]])
    cuts: list[Step] = [
        lambda x: x[:, column, :, :][:, :, 0],
        lambda x: x[:, column[:, 0], column[:, 0]].unsqueeze(2),
        lambda x: x[:, x.mean((0, 2, 3)).argsort()[:2]],
    ]
    for cut in cuts:
        model = Chain(fill.fill(nn.BatchNorm2d(6)), cut, nn.Conv2d(2, 4, 1))
        assert verdict(model, data(2, 6, 4, 4)) is Reason.REACHES_INPUT


@few
@given(numbers)
def test_a_channel_that_is_picked_twice(fill: Numbers) -> None:
    """Upstream both places would have to ask for one thing; downstream each takes it along."""
    picked = torch.tensor([0, 0, 3])
    up = Chain(nn.Conv2d(4, 6, 1), lambda x: x.index_select(1, picked), fill.fill(nn.BatchNorm2d(3)))
    down = Chain(fill.fill(nn.BatchNorm2d(6)), lambda x: x.index_select(1, picked), nn.Conv2d(3, 4, 1))
    assert verdict(up, data(2, 4, 3, 3)) is Reason.OUTPUT_USED_ELSEWHERE
    assert verdict(down, data(2, 6, 3, 3)) is None


@few
@given(numbers, st.sampled_from([(1, 1, 2, 3), (2, 1, 1, 1), (1, 2, 1, 1)]))
def test_repeat(fill: Numbers, times: tuple[int, ...]) -> None:
    """Copies of the image or the sample, not of the channels."""
    model = Chain(nn.Conv2d(4, 6, 1), lambda x: x.repeat(times), fill.fill(nn.BatchNorm2d(6 * times[1])))
    kept = verdict(model, data(2, 4, 3, 3))
    assert kept is (None if times[1] == 1 else Reason.AXIS_MISMATCH)
    down = Chain(fill.fill(nn.BatchNorm2d(4)), lambda x: x.repeat(times), nn.Conv2d(4 * times[1], 3, 1))
    assert (verdict(down, data(2, 4, 3, 3)) is None) == (times[1] == 1)


@few
@given(numbers, st.sampled_from([1, 2, 3, 4, 6, 12]), st.booleans())
def test_channel_shuffle(fill: Numbers, groups: int, by_op: bool) -> None:
    def shuffle(x: Tensor) -> Tensor:
        if by_op:
            return F.channel_shuffle(x, groups)
        n, c, h, w = x.shape
        return x.view(n, groups, c // groups, h, w).transpose(1, 2).contiguous().view(n, c, h, w)

    assert (
        verdict(Chain(nn.Conv2d(4, 12, 1), shuffle, fill.fill(nn.BatchNorm2d(12))), data(2, 4, 3, 3)) is None
    )
    assert (
        verdict(Chain(fill.fill(nn.BatchNorm2d(12)), shuffle, nn.Conv2d(12, 4, 2)), data(2, 12, 3, 3)) is None
    )


@few
@given(numbers, st.sampled_from([1, 2, 3]))
def test_pixel_shuffle(fill: Numbers, factor: int) -> None:
    square = factor * factor
    up = Chain(
        nn.Conv2d(3, 4 * square, 1), lambda x: F.pixel_shuffle(x, factor), fill.fill(nn.BatchNorm2d(4))
    )
    assert verdict(up, data(2, 3, 4, 5)) is None
    down = Chain(
        fill.fill(nn.BatchNorm2d(2)), lambda x: F.pixel_unshuffle(x, factor), nn.Conv2d(2 * square, 3, 1)
    )
    assert verdict(down, data(2, 2, 6, 6)) is None
    mixed = Chain(
        fill.fill(nn.BatchNorm2d(2 * square)), lambda x: F.pixel_shuffle(x, factor), nn.Conv2d(2, 3, 1)
    )
    assert (verdict(mixed, data(2, 2 * square, 2, 3)) is None) == (factor == 1)


class Parts(nn.Module):
    """A convolution cut into parts along its channels; the part at `index` goes through a BatchNorm."""

    def __init__(self, cut: Callable[[Tensor], Any], index: int, norm: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 7, 1)
        self.cut, self.index, self.norm = cut, index, norm

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.cut(self.conv(x)))
        parts[self.index] = self.norm(parts[self.index])
        return torch.cat([p.tanh() for p in parts], 1)


CUTS: list[tuple[str, Callable[[Tensor], Any], list[int]]] = [
    ("split", lambda y: y.split([2, 4, 1], 1), [2, 4, 1]),
    ("chunk", lambda y: y.chunk(3, 1), [3, 3, 1]),
    ("tensor_split", lambda y: y.tensor_split(3, 1), [3, 2, 2]),
    ("slices", lambda y: (y[:, :3], y[:, 3:5], y[:, 5:]), [3, 2, 2]),
    ("strided", lambda y: (y[:, ::2], y[:, 1::2]), [4, 3]),
    ("narrow", lambda y: (y.narrow(1, 0, 4), y.narrow(1, -3, 3)), [4, 3]),
]


@pytest.mark.parametrize("cut", CUTS, ids=lambda c: c[0])
@few
@given(numbers, st.integers(0, 2))
def test_one_part_of_a_value(cut: Any, fill: Numbers, index: int) -> None:
    _, function, sizes = cut
    index %= len(sizes)
    assert verdict(Parts(function, index, fill.fill(nn.BatchNorm2d(sizes[index]))), data(2, 3, 4, 4)) is None


@few
@given(numbers, st.integers(1, 3), st.integers(1, 3))
def test_overlapping_slices_are_kept(fill: Numbers, start: int, overlap: int) -> None:
    cut = lambda y: (y[:, : start + overlap], y[:, start:])  # noqa: E731
    norm = Numbers("positive", True, 1e-3, 1.0, fill.seed).fill(nn.BatchNorm2d(start + overlap))
    assert verdict(Parts(cut, 0, norm), data(2, 3, 4, 4)) is Reason.OUTPUT_USED_ELSEWHERE


@few
@given(numbers, st.integers(0, 2), st.integers(0, 2))
def test_crop_before_a_norm(fill: Numbers, front: int, back: int) -> None:
    """The chomp of a causal convolution: what is cut off is nobody's, so it may change."""
    model = Chain(
        nn.Conv1d(3, 4, 3, padding=2),
        lambda y: y[..., front : y.shape[-1] - back],
        fill.fill(nn.BatchNorm1d(4)),
    )
    assert verdict(model, data(2, 3, 9)) is None


@few
@given(numbers, st.sampled_from([(2, 3), (1, 4), (5,), (1, 1, 3)]))
def test_concat_of_branches(fill: Numbers, sizes: tuple[int, ...]) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branches = nn.ModuleList(nn.Conv2d(3, n, 1, bias=i % 2 == 0) for i, n in enumerate(sizes))
            self.norm = fill.fill(nn.BatchNorm2d(sum(sizes)))
            self.head = nn.Conv2d(sum(sizes), 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(torch.cat([b(x) for b in self.branches], 1)).tanh())

    assert verdict(Branches(), data(2, 3, 4, 4)) is None


@few
@given(numbers, st.booleans())
def test_concat_of_normed_and_raw(fill: Numbers, first: bool) -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = fill.fill(nn.BatchNorm2d(3))
            self.head = nn.Conv2d(6, 2, 2, groups=2)

        def forward(self, x: Tensor) -> Tensor:
            parts = [self.norm(x), x.tanh()]
            return self.head(torch.cat(parts if first else parts[::-1], 1))

    assert verdict(Joined(), data(2, 3, 4, 4)) is None


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_shape_groups_cover_both_shapes_with_equal_products(source: list[int], draw: st.DataObject) -> None:
    target = draw.draw(st.permutations(source))
    groups = shape_groups(source, target)
    assert [a for left, _ in groups for a in left] == list(range(len(source)))
    assert [a for _, right in groups for a in right] == list(range(len(target)))
    for left, right in groups:
        assert math.prod(source[a] for a in left) == math.prod(target[a] for a in right)


def test_shapes_of_other_sizes_are_refused() -> None:
    with pytest.raises(Refused) as refusal:
        shape_groups((2, 3), (2, 4))
    assert refusal.value.reason is Reason.AXIS_MISMATCH
