"""A mode inside of one that only watches stands in its place: no op is missed, none is shown twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import _len_torch_dispatch_stack

from bntool.observe.watching import OpMode, WatchMode


class _Watching(WatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def before(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self.seen.append(func._schema.name)


class _Doubling(OpMode):
    def operator(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        return func(*args, **kwargs) * 2


def test_a_watch_sees_each_op_once_inside_of_another_mode() -> None:
    x, watch = torch.ones(2), _Watching()
    with watch:
        with _Doubling():
            inside = x.add(1)
        outside = x.sub(1)
    assert inside.tolist() == [4.0, 4.0]
    assert outside.tolist() == [0.0, 0.0]
    assert watch.seen == ["aten::add", "aten::sub"]
    assert _len_torch_dispatch_stack() == 0


def test_two_watches_both_see_what_runs_in_a_mode_inside_of_them() -> None:
    x, outer, inner = torch.ones(2), _Watching(), _Watching()
    with outer, inner, _Doubling():
        x.add(1)
    assert outer.seen == inner.seen == ["aten::add"]


def test_a_mode_entered_again_while_it_runs_leaves_the_watch_where_it_was() -> None:
    x, watch, mode = torch.ones(2), _Watching(), _Doubling()
    with watch, mode:
        taken = torch.cond(torch.tensor(True), lambda v: v.add(1), lambda v: v.sub(1), (x,))
        x.neg()
    assert taken.tolist() == [4.0, 4.0]
    assert "aten::add" in watch.seen
    assert watch.seen[-1] == "aten::neg"
    assert _len_torch_dispatch_stack() == 0


def test_after_an_error_the_watch_goes_on() -> None:
    watch = _Watching()
    with watch:
        try:
            with _Doubling():
                torch.ones(2) @ torch.ones(3)
        except RuntimeError:
            pass
        torch.ones(1).neg()
    assert watch.seen[-1] == "aten::neg"
