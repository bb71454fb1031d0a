"""Graph networks: messages added up at nodes, then a bias, then a BatchNorm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import bntool
from bntool.core.reasons import Reason
from bntool.graph.inputs import Inputs
from bntool.observe.eager import observe
from bntool.subjects.module_folding import plan_module_fold
from tests.laws.exactness import Numbers, data, few, numbers, verdict


class Messages(nn.Module):
    """Linear without bias, gathered along edges, weighed, added up at nodes in one of several `styles`."""

    def __init__(self, style: str, norm: nn.Module, bias: bool = True) -> None:
        super().__init__()
        self.style = style
        self.lin, self.norm, self.out = nn.Linear(3, 4, bias=False), norm, nn.Linear(4, 2)
        self.bias = nn.Parameter(torch.randn(4)) if bias else None
        self.skip = nn.Linear(3, 4)

    def forward(self, x: Tensor, source: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        sent = weight[:, None] * self.lin(x)[source]
        place = target[:, None].expand_as(sent)
        zeros = torch.zeros(len(x), 4, dtype=x.dtype)
        styles: dict[str, Any] = {
            "scatter_add": lambda: zeros.scatter_add(0, place, sent),
            "in place": lambda: zeros.scatter_add_(0, place, sent),
            "index_add": lambda: zeros.index_add(0, target, sent, alpha=0.5),
            "mean": lambda: zeros.scatter_reduce(0, place, sent, "mean"),
            "amax": lambda: zeros.scatter_reduce(0, place, sent, "amax"),
            "mean apart": lambda: zeros.scatter_reduce(0, place, sent, "mean", include_self=False),
            "amax apart": lambda: zeros.scatter_reduce(0, place, sent, "amax", include_self=False),
            "a layer apart": lambda: self.skip(x).scatter_reduce(0, place, sent, "sum", include_self=False),
            "onto a layer": lambda: self.skip(x).index_add(0, target, sent),
            "onto ones": lambda: (zeros + 1.0).index_add(0, target, sent),
            "part": lambda: zeros.scatter_add(0, place[:, :2], sent[:, :2]),
        }
        summed = styles[self.style]()
        return self.out(torch.tanh(self.norm(summed if self.bias is None else summed + self.bias)))


def graph(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    return data(6, 3, seed=seed), torch.randint(6, (9,)), torch.randint(6, (9,)), data(9, seed=seed).abs()


@few
@given(numbers, st.sampled_from(["scatter_add", "in place", "index_add", "mean", "mean apart"]))
def test_the_scale_goes_into_the_messages_and_the_shift_into_the_bias(fill: Numbers, style: str) -> None:
    assert verdict(Messages(style, fill.fill(nn.BatchNorm1d(4))), *graph(fill.seed)) is None


@few
@given(numbers, st.sampled_from(["amax", "amax apart"]))
def test_the_largest_message_lets_by_what_is_not_negative(fill: Numbers, style: str) -> None:
    found = verdict(Messages(style, fill.fill(nn.BatchNorm1d(4))), *graph(fill.seed))
    assert found is (Reason.NEGATIVE_SCALE if fill.has_negative else None)


@few
@given(numbers)
def test_what_is_added_to_takes_the_shift(fill: Numbers) -> None:
    assert (
        verdict(Messages("onto a layer", fill.fill(nn.BatchNorm1d(4)), bias=False), *graph(fill.seed)) is None
    )


@few
@given(numbers, st.sampled_from(["scatter_add", "a layer apart"]))
def test_a_sum_without_a_bias_passes_no_shift(fill: Numbers, style: str) -> None:
    """What is added to is left out where there is a message: it cannot bring the shift."""
    found = verdict(Messages(style, fill.fill(nn.BatchNorm1d(4)), bias=False), *graph(fill.seed))
    assert found is (Reason.NONLINEAR if fill.shift else None)


@pytest.mark.parametrize(
    ("style", "reason"), [("onto ones", Reason.UNKNOWN_OP), ("part", Reason.AXIS_MISMATCH)]
)
def test_other_sums_are_refused(style: str, reason: Reason) -> None:
    fill = Numbers("positive", True, 1e-5, 1.0, 1)
    assert verdict(Messages(style, fill.fill(nn.BatchNorm1d(4))), *graph()) is reason


def test_a_program_folds_alike() -> None:
    norm = Numbers("mixed", True, 1e-5, 1.0, 1).fill(nn.BatchNorm1d(4))
    model = Messages("scatter_add", norm).double().eval()
    result = bntool.fold(torch.export.export(model, graph()))
    assert [site.bn for site in result.plan.fold_sites] == ["norm"]
    before, after = model(*graph(5)), result.program.module()(*graph(5))
    torch.testing.assert_close(after, before, rtol=1e-10, atol=1e-12)


def test_a_bias_that_others_read_stays() -> None:
    class Twice(Messages):
        def forward(self, *inputs: Any) -> Any:
            return super().forward(*inputs) + self.bias.sum()

    norm = Numbers("positive", True, 1e-5, 1.0, 1).fill(nn.BatchNorm1d(4))
    assert verdict(Twice("scatter_add", norm), *graph()) is Reason.NONLINEAR


def test_two_batch_norms_one_after_the_other_go_into_one_bias() -> None:
    first, second = (Numbers("mixed", True, 1e-5, 1.0, s).fill(nn.BatchNorm1d(4)) for s in (1, 2))
    model = Messages("scatter_add", nn.Sequential(first, second)).double().eval()
    found = observe(model, Inputs(graph()))
    planned = plan_module_fold(model, found)
    assert not planned.plan.skips
    after, _ = planned.carry_out()
    torch.testing.assert_close(after(*graph(5)), model(*graph(5)), rtol=1e-10, atol=1e-12)


def test_zeros_are_zeros_though_the_forward_has_read_a_number() -> None:
    class AsManyAsSaid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.bias = nn.Linear(3, 4, bias=False), nn.Parameter(torch.randn(4))
            self.norm = Numbers("mixed", True, 1e-5, 1.0, 3).fill(nn.BatchNorm1d(4))

        def forward(self, x: Tensor, target: Tensor) -> Tensor:
            sent = self.lin(x)
            nodes = sent.new_zeros(int(target.max()) + 1, 4)
            return self.norm(nodes.index_add(0, target, sent) + self.bias).tanh()

    assert verdict(AsManyAsSaid(), data(6, 3), torch.tensor([0, 1, 2, 2, 3, 0])) is None
