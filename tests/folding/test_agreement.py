"""A fold counts only if it comes out alike on inputs of other sizes, in every map of every edit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bntool.core.reasons import Reason
from bntool.folding.agreement import plan_on_all
from bntool.graph.inputs import Inputs
from bntool.observe.eager import observe
from tests.fold_zoo import Net
from tests.laws.exactness import Numbers, data
from tests.program_zoo import plan_fold_program

FILL = Numbers("positive", True, 1e-5, 1.0, 0)


def test_one_map_of_several_that_follows_the_size_keeps_the_batchnorm() -> None:
    """Into `a` goes the same map at every size; into `b`, behind a factor, a shift times the width."""

    def run(m: Any, x: Tensor) -> Tensor:
        y = m.bn(x.tanh())
        if m.turned:
            return m.b(y * x.shape[-1]) + m.a(y)  # type: ignore[no-any-return]
        return m.a(y) + m.b(y * x.shape[-1])  # type: ignore[no-any-return]

    for turned in (False, True):
        parts = {"bn": FILL.fill(nn.BatchNorm2d(4)), "a": nn.Conv2d(4, 3, 1), "b": nn.Conv2d(4, 3, 1)}
        net = Net(run, {**parts, "turned": turned}).double().eval()
        graphs = [observe(net, Inputs((data(1, 4, size, size),))).graph for size in (4, 5)]
        (alone,) = plan_on_all(graphs[:1]).fold_sites
        assert alone.into == (("b", "a") if turned else ("a", "b"))
        plan = plan_on_all(graphs)
        assert [(skip.name, skip.reason) for skip in plan.skips] == [("bn", Reason.AXIS_MISMATCH)]
        assert plan.sites == ()


def test_a_merge_that_follows_the_size_is_none() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.a(x) + m.b(x) * x.shape[-1]  # type: ignore[no-any-return]

    x = torch.randn(2, 4, 6, 6)
    net = Net(run, {"a": nn.Conv2d(4, 4, 1), "b": nn.Conv2d(4, 4, 1)}).eval()
    auto = torch.export.Dim.AUTO
    fixed, sized = (
        torch.export.export(net, (x,), dynamic_shapes={"inputs": (axes,)})
        for axes in ({0: auto}, {0: auto, 2: auto, 3: auto})
    )
    assert len(plan_fold_program(fixed)[0].merges) == 1
    assert plan_fold_program(sized)[0].merges == ()


def test_maps_that_other_sizes_write_in_another_way_are_one_where_their_numbers_are() -> None:
    """The number of samples stands in the expression, since they share an axis with the heads on the way."""

    def run(m: Any, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return m.conv(m.bn(x).reshape(n * 2, c // 2, h, w).reshape(n, c, h, w))  # type: ignore[no-any-return]

    net = Net(run, {"bn": FILL.fill(nn.BatchNorm2d(4)), "conv": nn.Conv2d(4, 3, 1)}).double().eval()
    graphs = [observe(net, Inputs((data(samples, 4, 3, 3),))).graph for samples in (2, 3)]
    (one,), (other,) = (plan_on_all([graph]).fold_sites for graph in graphs)
    assert [edit.map for edit in one.edits] != [edit.map for edit in other.edits]
    assert [site.bn for site in plan_on_all(graphs).fold_sites] == ["bn"]
