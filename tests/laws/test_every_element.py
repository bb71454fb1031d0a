"""Ops that move or average elements, beside what torch makes of a value that the map has changed.

Each law is asked by hand for maps that vary along every choice of axes. So each number of a map stands for
itself, and one in a wrong place shows.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bntool.graph.affine import Affine, identity
from bntool.laws.base import LAWS, Refused
from tests.laws.by_hand import Seen, affine

ANY = "any"
"""Of axes: a map may vary along none."""
EXACT = 2.0**-45
"""Sums of at most 24 numbers below ten, each with a rounding of 2⁻⁵³."""


@dataclasses.dataclass
class Case:
    """An op, what torch does, the axes along which a map of an output, or of an input, cannot vary, and
    whether a shift passes; or by `refuses` what does not go, by the way, the axes and whether it shifts.
    """

    kind: str
    does: Callable[..., Any]
    shapes: Sequence[tuple[int, ...]] = ((2, 3, 4),)
    attrs: dict[str, Any] = dataclasses.field(default_factory=dict)
    up: Sequence[int] | str = ()
    down: Sequence[int] | str = ()
    beside: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    shift: bool = True
    refuses: Callable[[str, set[int], bool], bool] | None = None

    def __str__(self) -> str:
        return f"{self.kind}-{self.attrs}-{self.shapes}"

    def is_refused(self, way: str, axes: set[int], shifted: bool) -> bool:
        if self.refuses:
            return self.refuses(way, axes, shifted)
        mixed = getattr(self, way)
        return bool(axes if mixed == ANY else axes & {*mixed}) or (shifted and not self.shift)

    def outputs(self, *values: Tensor) -> list[Tensor]:
        made = self.does(*values)
        return [made] if isinstance(made, Tensor) else list(made)


def _whole(shape: Sequence[int]) -> Callable[[Tensor], Tensor]:
    return lambda x: x.reshape(shape)


def _pads(*pads: int, mode: str = "constant", value: float = 0.0) -> dict[str, Any]:
    return {"pads": pads, "mode": mode, "value": value}


def _zeros_along_the_last(way: str, axes: set[int], shifted: bool) -> bool:
    return shifted and (way == "up" or 2 not in axes)


IMAGE = ((1, 8, 2, 3),)
GRID = torch.linspace(-1.5, 1.5, 24, dtype=torch.float64).reshape(1, 3, 4, 2)
CASES = [
    Case("slice", lambda x: x[:, 1:3], attrs={"axis": 1, "start": 1, "stop": 3, "step": 1}),
    Case("slice", lambda x: x[..., 1::2], attrs={"axis": -1, "start": 1, "stop": 99, "step": 2}),
    Case("index_select", lambda x: x[:, [2, 0]], attrs={"axis": 1, "indices": (2, 0)}),
    Case("index_select", lambda x: x[:, [2, 0, -2]], attrs={"axis": -2, "indices": (2, 0, -2)}),
    Case("index_select", lambda x: x[:, [1, 1]], attrs={"axis": 1, "indices": (1, 1)}, up=[1]),
    Case("index_select", lambda x: x.repeat_interleave(2, 0), attrs={"axis": 0, "repeats": 2}, up=[0]),
    Case("index_select", lambda x: x[:, [2, 1]], attrs={"axis": 1}, beside={"index": torch.tensor([2, 1])}),
    Case(
        "index_select",
        lambda x: x[:, [0, 2]],
        attrs={"axis": 1},
        beside={"index": torch.tensor([1, 0, 1], dtype=torch.uint8)},
    ),
    Case(
        "index_select",
        lambda x: x[:, [0, 2]],
        attrs={"axis": 1},
        up=[1],
        down=[1],
        beside={"index": torch.empty(0)},  # whose numbers nobody knows
    ),
    Case("flip", lambda x: x.flip(0, -1), attrs={"axes": (0, -1)}),
    Case("flip", lambda x: x.flip(1), [(2, 1, 3)], {"axes": (1,)}),
    Case("roll", lambda x: x.roll((1, -3), (1, -1)), attrs={"axes": (1, -1), "shifts": (1, -3)}),
    Case("roll", lambda x: x.roll(5), attrs={"axes": ()}, up=ANY, down=ANY),
    Case("select", lambda x: x[:, 1], attrs={"axis": 1, "index": 1}),
    Case("select", lambda x: x[..., -2], attrs={"axis": -1, "index": -2}),
    Case("unbind", lambda x: x.unbind(1), attrs={"axis": 1}),
    Case("unbind", lambda x: x.unbind(-1), attrs={"axis": -1}),
    Case("unfold", lambda x: x.unfold(1, 2, 1), attrs={"axis": 1}, up=[1, 3], down=[1]),
    Case("unfold", lambda x: x.unfold(-1, 2, 2), attrs={"axis": -1}, up=[2, 3], down=[2]),
    Case("stack", lambda a, b: torch.stack([a, b], 1), [(2, 3, 4)] * 2, {"axis": 1}),
    Case("stack", lambda a, b: torch.stack([a, b], -1), [(2, 3, 4)] * 2, {"axis": -1}),
    Case("split", lambda x: x.split([1, 2], 1), attrs={"axis": 1}),
    Case("split", lambda x: x.split([3, 1], -1), attrs={"axis": -1}),
    Case("concat", lambda a, b: torch.cat([a, b], 1), [(2, 3, 4), (2, 1, 4)], {"axis": 1}),
    Case("concat", lambda a, b: torch.cat([a, b], -1), [(2, 3, 1), (2, 3, 4)], {"axis": -1}),
    Case("reshape", _whole((6, 4))),
    Case("reshape", _whole((4, 6))),
    Case("reshape", _whole((2, 3, 2, 2))),
    Case("flatten", _whole((2, 12))),
    Case("squeeze", _whole((2, 3)), [(2, 1, 3, 1)]),
    Case("unsqueeze", _whole((1, 2, 3, 1, 4))),
    Case("permute", lambda x: x.permute(2, 0, 1), attrs={"dims": (2, 0, 1)}),
    Case("permute", lambda x: x.transpose(0, -1), attrs={"swap": (0, -1)}),
    Case("expand", lambda x: x.expand(2, 5, 3, 4), [(5, 1, 4)], up=[0, 2]),
    Case("repeat", lambda x: x.repeat(2, 1, 3), up=[0, 2], down=[0, 2]),
    Case("repeat", lambda x: x.repeat(2, 1, 3, 1), up=[0, 2], down=[1]),
    Case("channel_shuffle", lambda x: torch.channel_shuffle(x, 2), IMAGE, {"groups": 2}),
    Case("channel_shuffle", lambda x: torch.channel_shuffle(x, 4), IMAGE, {"groups": 4}),
    Case("pixel_shuffle", lambda x: torch.pixel_shuffle(x, 2), IMAGE, {"factor": 2}),
    Case("pixel_shuffle", lambda x: torch.pixel_shuffle(x, 2), [(4, 2, 3)], {"factor": 2}),
    Case("pixel_unshuffle", lambda x: torch.pixel_unshuffle(x, 2), [(2, 2, 4, 6)], {"factor": 2}),
    *(
        Case(
            "avg_pool",
            does,
            IMAGE,
            {"dims": 2, "divisor_override": None, **attrs},
            [2, 3],
            [2, 3],
            shift=shift,
        )
        for does, attrs, shift in [
            (lambda x: F.avg_pool2d(x, 2, 1), {"padding": (0, 0), "count_include_pad": True}, True),
            (lambda x: F.avg_pool2d(x, 2, 1, (0, 1)), {"padding": (0, 1), "count_include_pad": True}, False),
            (
                lambda x: F.avg_pool2d(x, 2, 1, (0, 1), count_include_pad=False),
                {"padding": (0, 1), "count_include_pad": False},
                True,
            ),
            (
                lambda x: F.avg_pool2d(x, 2, 1, divisor_override=3),
                {"padding": (0, 0), "count_include_pad": False, "divisor_override": 3},
                False,
            ),
        ]
    ),
    Case("adaptive_avg_pool", lambda x: F.adaptive_avg_pool2d(x, (2, 2)), IMAGE, {}, [2, 3], [2, 3]),
    Case("adaptive_avg_pool", lambda x: F.adaptive_avg_pool1d(x, 2), up=[2], down=[2]),
    Case("adaptive_avg_pool", lambda x: F.adaptive_avg_pool1d(x, 2), [(3, 4)], {"dims": 1}, [1], [1]),
    Case("upsample", lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), IMAGE, {}, [2, 3], [2, 3]),
    Case("max_pool", lambda x: F.max_pool2d(x, 2, 1), IMAGE, {"dims": 2}, [2, 3], [2, 3]),
    *(
        Case(kind, lambda x, f=f, keep=keep: f(x, 1, keep), attrs={"axes": (-2,), "keepdim": keep}, down=[1])
        for kind, f in [
            ("mean", torch.mean),
            ("sum", torch.sum),
            ("amax", torch.amax),
            ("amin", torch.amin),
            ("order_statistic", lambda *of: torch.median(*of).values),
        ]
        for keep in (True, False)
    ),
    Case("sum", lambda x: x.sum((0, 2)), attrs={"axes": (2, 0), "keepdim": False}, down=[0, 2]),
    Case("mean", torch.mean, attrs={"axes": None, "keepdim": False}, down=[0, 1, 2]),
    Case("sum", torch.sum, attrs={"axes": (), "keepdim": False}, down=[0, 1, 2]),
    *(
        Case(
            "grid_sample",
            lambda x, mode=mode: F.grid_sample(x, GRID, padding_mode=mode, align_corners=False),
            IMAGE,
            {"zeros": mode == "zeros"},
            up=[2, 3],
            down=[2, 3],
            beside={"grid": torch.ones(1)},
            shift=mode != "zeros",
        )
        for mode in ("zeros", "border")
    ),
    Case("pad", lambda x: F.pad(x, (1, 2), "reflect"), attrs=_pads(1, 2, mode="reflect"), up=[2], down=[2]),
    Case("pad", lambda x: F.pad(x, (1, 2), value=5.0), attrs=_pads(1, 2, value=5.0), refuses=lambda *_: True),
    Case("pad", lambda x: F.pad(x, (-1, 0)), attrs=_pads(-1, 0), up=[2], down=[2], shift=False),
    # to a map that varies along the axis, zeros are further entries of it
    Case("pad", lambda x: F.pad(x, (1, 2)), attrs=_pads(1, 2), refuses=_zeros_along_the_last),
    Case("pad", lambda x: F.pad(x, (0, 0, 2, 0)), attrs=_pads(0, 0, 2, 0), shift=False),
]


def maps_of(shapes: Sequence[Sequence[int]], shifted: bool) -> list[tuple[set[int], list[Affine]]]:
    """For every choice of axes, a map of each shape that varies along them, no two numbers alike."""
    generator, found = torch.Generator().manual_seed(0), []
    for varies in itertools.product([False, True], repeat=len(shapes[0])):
        sizes = [tuple(n if v else 1 for n, v in zip(shape, varies, strict=True)) for shape in shapes]
        drawn = [torch.rand((2, *size), generator=generator, dtype=torch.float64) + 0.5 for size in sizes]
        axes = {i for i, v in enumerate(varies) if v and any(size[i] > 1 for size in sizes)}
        found.append((axes, [Affine(scale, shift * shifted, ("bn", "bn")) for scale, shift in drawn]))
    return found


def changed(value: Tensor, map_: Affine) -> Tensor:
    """The value under a map, any numbers standing where nobody asks for one."""
    return torch.nan_to_num(map_.scale, nan=7.0) * value + torch.nan_to_num(map_.shift, nan=-3.0)


def values_of(shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(tuple(shape), generator=generator, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("way", ["up", "down"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_number_of_a_map_goes_where_its_element_goes(case: Case, way: str, shifted: bool) -> None:
    values = values_of(case.shapes)
    before = case.outputs(*values)
    roles = ["input"] if len(values) == 1 else [f"input{i}" for i in range(len(values))]
    given = {**dict(zip(roles, case.shapes, strict=True)), **case.beside}
    seen = Seen(case.attrs, [tuple(out.shape) for out in before], case.kind, **given)
    law = LAWS[case.kind][way == "down"]
    for axes, maps in maps_of([out.shape for out in before] if way == "up" else case.shapes, shifted):
        try:
            found = law(seen, seen.op, maps if way == "up" else dict(zip(roles, maps, strict=True)))
        except Refused:
            assert case.is_refused(way, axes, shifted)
            continue
        assert not case.is_refused(way, axes, shifted)
        inputs, outputs = (maps, found) if way == "down" else ([found[role] for role in roles], maps)
        after = case.outputs(*map(changed, values, inputs))
        for mine, own, map_ in zip(after, before, outputs, strict=True):
            torch.testing.assert_close(mine, changed(own, map_), rtol=0.0, atol=EXACT)


@pytest.mark.parametrize("case", [case for case in CASES if len(case.shapes) > 1], ids=str)
def test_a_part_without_a_map_stays_as_it_is(case: Case) -> None:
    first, second = values_of(case.shapes)
    (before,) = case.outputs(first, second)
    given = dict(zip(["input0", "input1"], case.shapes, strict=True))
    seen = Seen(case.attrs, [tuple(before.shape)], case.kind, **given)
    for _, (_, mine) in maps_of(case.shapes, shifted=True):
        (found,) = LAWS[case.kind][1](seen, seen.op, {"input1": mine})
        (after,) = case.outputs(first, changed(second, mine))
        torch.testing.assert_close(after, changed(before, found), rtol=0.0, atol=EXACT)


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.kind in ("slice", "select", "index_select") and not c.beside], ids=str
)
def test_nobody_asks_for_what_is_not_picked(case: Case) -> None:
    (value,) = values_of(case.shapes)
    out = case.does(value.requires_grad_())
    out.sum().backward()
    seen = Seen(case.attrs, [tuple(out.shape)], case.kind, input=case.shapes[0])
    found = LAWS[case.kind][0](seen, seen.op, [identity(out.dim())])["input"]
    assert value.grad is not None
    assert torch.equal(found.scale.expand(value.shape).isnan(), value.grad == 0)


@pytest.mark.parametrize(
    ("kind", "data", "constant", "out"),
    [("concat", (2, 1, 4), (2, 1, 4), (2, 2, 4)), ("stack", (2, 4), (2, 4), (2, 2, 4))],
)
def test_a_constant_part_cannot_change(kind: str, data: Any, constant: Any, out: Any) -> None:
    seen = Seen({"axis": 1}, [out], kind, input0=data, input1=torch.ones(constant))
    found = LAWS[kind][0](seen, seen.op, [affine([2.0, 1.0])])
    assert not found["input0"].is_identity
    assert found["input1"].is_identity
    with pytest.raises(Refused, match="is a constant"):
        LAWS[kind][0](seen, seen.op, [affine([2.0, 3.0])])


@pytest.mark.parametrize("out", [(2, 2, 4), (2, 2, 2, 4)])
def test_a_table_of_places_picks_along_more_than_one_axis(out: tuple[int, ...]) -> None:
    seen = Seen({"axis": 1}, [out], "index_select", input=(2, 3, 4), index=torch.tensor([[0, 1], [1, 2]]))
    for ask in LAWS["index_select"]:
        maps: Any = [identity(len(out))] if ask is LAWS["index_select"][0] else {"input": identity(3)}
        with pytest.raises(Refused, match="more than one axis"):
            ask(seen, seen.op, maps)


def test_parts_of_different_ranks_are_not_joined() -> None:
    seen = Seen({"axis": 0}, [(4,)], "concat", input0=(3,), input1=(1, 1))
    with pytest.raises(Refused, match="different ranks"):
        LAWS["concat"][0](seen, seen.op, [identity(1)])
