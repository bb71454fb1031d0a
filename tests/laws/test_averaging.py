"""Attention: a BatchNorm on averages of values goes into what makes the values."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import bntool
from bntool.core.reasons import Reason
from bntool.folding import plan_fold
from bntool.folding.agreement import plan_on_all
from bntool.graph.inputs import Inputs
from bntool.observe.eager import observe
from bntool.pipeline.onnx_folding import plan_fold_onnx
from tests.laws.exactness import Numbers, data, few, folded_exactly, numbers, verdict

HEADS, DEPTH = 2, 3
C = HEADS * DEPTH


class Attention(nn.Module):
    """Self-attention over the pixels of a map, written as its users do, and a BatchNorm on what comes out."""

    def __init__(self, style: str, norm: nn.Module) -> None:
        super().__init__()
        self.qkv = nn.Conv2d(4, 3 * C, 1, bias=style != "bmm")
        self.style, self.norm = style, norm

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        q, k, v = self.qkv(x).split(C, 1)
        if self.style == "bmm":  # heads in the batch axis, pixels last
            q, k, v = (t.reshape(b * HEADS, DEPTH, h * w) for t in (q, k, v))
            weights = torch.bmm(q.transpose(1, 2), k).softmax(-1)
            out = torch.bmm(weights, v.transpose(1, 2)).transpose(1, 2)
        elif self.style == "columns":  # values times weights: a softmax over the columns, or one turned over
            q, k, v = (t.reshape(b, HEADS, DEPTH, h * w) for t in (q, k, v))
            out = v @ (q.transpose(-1, -2) @ k).softmax(-2)
        elif self.style == "turned":
            q, k, v = (t.reshape(b, HEADS, DEPTH, h * w) for t in (q, k, v))
            out = v @ (q.transpose(-1, -2) @ k).softmax(-1).transpose(-2, -1)
        elif self.style == "raw":  # linear attention: nothing sums to one
            q, k, v = (t.reshape(b, HEADS, DEPTH, h * w) for t in (q, k, v))
            out = v @ torch.sigmoid(q.transpose(-1, -2) @ k)
        else:
            q, k, v = (t.reshape(b, HEADS, DEPTH, h * w).transpose(-1, -2) for t in (q, k, v))
            mask = torch.zeros(h * w, h * w, dtype=q.dtype) if self.style == "masked" else None
            causal = self.style == "causal"
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal).transpose(-1, -2)
        return self.norm(out.reshape(b, C, h, w))


STYLES = ["bmm", "columns", "turned", "sdpa", "causal"]


@few
@given(numbers, st.sampled_from(STYLES), st.integers(1, 2))
def test_a_norm_on_averages_of_values_goes_into_what_makes_them(fill: Numbers, style: str, b: int) -> None:
    model = Attention(style, fill.fill(nn.BatchNorm2d(C)))
    assert verdict(model, data(b, 4, 3, 2, seed=fill.seed)) is None


@few
@given(numbers, st.sampled_from(["raw", "masked"]))
def test_where_the_weights_do_not_sum_to_one_only_a_scale_may_pass(fill: Numbers, style: str) -> None:
    model = Attention(style, fill.fill(nn.BatchNorm2d(C)))
    found = verdict(model, data(2, 4, 3, 2, seed=fill.seed))
    assert found is (Reason.NONLINEAR if fill.shift else None)


@pytest.mark.parametrize("shift", [True, False])
def test_where_attention_drops_some_of_its_weights_only_a_scale_may_pass(shift: bool) -> None:
    """A `dropout_p` written out in forward drops in eval mode too."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(4, 4, 1)
            self.norm = Numbers("mixed", shift, 1e-5, 1.0, 0).fill(nn.BatchNorm1d(4))

        def forward(self, x: Tensor) -> Tensor:
            torch.manual_seed(1)
            v, same = self.conv(x).transpose(1, 2), torch.zeros_like(x).transpose(1, 2)
            return self.norm(F.scaled_dot_product_attention(same, same, v, dropout_p=0.4).transpose(1, 2))

    assert verdict(Model(), data(2, 4, 9)) is (Reason.NONLINEAR if shift else None)


@few
@given(numbers, st.sampled_from(STYLES))
def test_the_fold_is_the_same_on_other_sizes(fill: Numbers, style: str) -> None:
    """Heads that share an axis with the batch make maps of other sizes on the way, and the same fold."""
    model = Attention(style, fill.fill(nn.BatchNorm2d(C))).double()
    graphs = [observe(model, Inputs((data(*shape),))).graph for shape in ((1, 4, 3, 2), (2, 4, 5, 3))]
    assert [site.bn for site in plan_on_all(graphs).fold_sites] == ["norm"]


@few
@given(numbers, st.booleans())
def test_downstream_from_the_values(fill: Numbers, fused: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.out = fill.fill(nn.BatchNorm1d(4)), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            v = self.norm(torch.relu(x)).transpose(1, 2)  # (N, L, C)
            keys = x.transpose(1, 2)
            if fused:
                return self.out(F.scaled_dot_product_attention(keys, keys, v))
            return self.out((keys @ x).softmax(-1) @ v)

    plan, _ = folded_exactly(Model(), data(2, 4, 5, seed=fill.seed))
    assert [site.into for site in plan.fold_sites] == [("out",)]


@pytest.mark.parametrize(
    "change",
    [
        lambda n, x: (x @ n).softmax(-1) @ x,  # it is in the weights
        lambda n, x: n @ n.transpose(1, 2),  # on both sides
        lambda n, x: n[:1] @ x,  # spread over the batch
        lambda n, x: x.softmax(-1) @ n[:1].transpose(1, 2),  # the same, beside what sums to one
        lambda n, x: torch.matmul(n.mean((0, 1)), x),  # a vector
        lambda n, x: F.scaled_dot_product_attention(n, x, x),  # a query
        lambda n, x: F.scaled_dot_product_attention(
            x, x, n[:, :1].expand_as(n)
        ),  # nothing wrong but the rows
    ],
)
@pytest.mark.parametrize("first", [nn.Linear(4, 4), nn.ReLU()], ids=["up", "down"])
@pytest.mark.parametrize("shift", [True, False])
def test_what_is_no_average_of_it_stays_exact(change, first: nn.Module, shift: bool) -> None:
    """Whatever the verdict, the outputs are equal: a BatchNorm over rows, columns, weights and queries."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = first, nn.Linear(4, 3)
            self.norm = Numbers("mixed", shift, 1e-5, 1.0, 0).fill(nn.BatchNorm1d(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(change(self.norm(self.first(x)), x))

    folded_exactly(Model(), data(2, 4, 4))


def test_a_product_with_a_computed_weight_is_no_linear_layer() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.make = nn.Linear(4, 12)
            self.norm = Numbers("mixed", True, 1e-5, 1.0, 0).fill(nn.BatchNorm1d(3))

        def forward(self, x: Tensor) -> Tensor:
            weight = self.make(x.mean(0)).reshape(4, 3)
            return self.norm(x @ weight)

    model = Model().double()
    plan = plan_fold(observe(model, Inputs((data(5, 4),))).graph)
    assert [skip.reason for skip in plan.skips] == [Reason.NONLINEAR]


@pytest.mark.parametrize("style", STYLES)
def test_the_same_in_an_exported_program_and_an_onnx_graph(style: str) -> None:
    model = Attention(style, Numbers("mixed", True, 1e-5, 1.0, 0).fill(nn.BatchNorm2d(C))).float().eval()
    image = data(2, 4, 3, 2).float()
    program = torch.export.export(model, (image,))
    assert [site.level for site in bntool.fold(program, example_inputs=(image,)).plan.fold_sites] == ["graph"]
    model_proto = torch.onnx.export(program, (image,), verbose=False, optimize=True).model
    plan, _ = plan_fold_onnx(model_proto)
    assert len(list(plan.fold_sites)) == 1
