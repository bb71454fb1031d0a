"""Ops that take a value that would change by another role than their data, or write over one with `out=`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bntool
from bntool.core.plan import Plan
from bntool.core.reasons import Reason
from bntool.folding import plan_fold
from bntool.graph.inputs import Inputs
from bntool.observe.eager import observe
from bntool.pipeline.onnx_folding import plan_fold_onnx
from tests.laws.exactness import Numbers, data, folded_exactly

FILL = Numbers("mixed", True, 1e-5, 1.0, 0)


class Net(nn.Module):
    """`step` gets the net, its input, and what a BatchNorm makes of that behind an activation."""

    def __init__(self, step: Callable[[Net, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.step = step
        self.norm, self.conv, self.linear = FILL.fill(nn.BatchNorm2d(4)), nn.Conv2d(4, 4, 1), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.step(self, x, self.norm(x.sigmoid()))


def means(y: Tensor) -> Tensor:
    return y.mean((0, 2, 3))


BESIDE = {
    "the slopes of a PReLU": lambda net, x, y: F.prelu(x, means(y)),
    "the weight of a convolution": lambda net, x, y: F.conv2d(x, y[:, :, :1, :1]),
    "both sides of a convolution": lambda net, x, y: F.conv2d(y, y[:, :, :1, :1]),
    "its bias": lambda net, x, y: F.conv2d(x, net.conv.weight, means(y)),
    "the weight of a linear layer": lambda net, x, y: F.linear(x.mean((2, 3)), y.mean((2, 3))),
    "the scale of a norm": lambda net, x, y: F.group_norm(x, 2, means(y)),
    "the statistics of a norm": lambda net, x, y: F.batch_norm(x, means(y), torch.ones(4).to(x)),
    "the places of a grid": lambda net, x, y: F.grid_sample(
        x, y[:, :2].permute(0, 2, 3, 1), align_corners=False
    ),
    "a mask": lambda net, x, y: F.scaled_dot_product_attention(x, x, x, attn_mask=y),
    "what is picked": lambda net, x, y: x.index_select(1, means(y).long() % 4),
    "a type": lambda net, x, y: x.to(y),
}

OVER = {
    "mean": lambda net, x, y: torch.mean(x, (2, 3), out=y.mean((2, 3))),
    "sum": lambda net, x, y: torch.sum(x, (2, 3), out=y.mean((2, 3))),
    "amax": lambda net, x, y: torch.amax(x, (2, 3), out=y.mean((2, 3))),
    "add": lambda net, x, y: torch.add(x, x, out=y),
    "mul": lambda net, x, y: torch.mul(x, 2.0, out=y),
    "cat": lambda net, x, y: torch.cat([x, x], 1, out=torch.cat([y, y], 1)),
    "stack": lambda net, x, y: torch.stack([x, x], out=torch.stack([y, y])),
    "matmul": lambda net, x, y: torch.matmul(x.mean((2, 3)), net.linear.weight, out=y.mean((2, 3))),
    "bmm": lambda net, x, y: torch.bmm(x[:, 0], x[:, 1], out=y[:, 0].clone()),
}


@pytest.mark.parametrize("name", BESIDE)
def test_a_norm_whose_output_goes_in_beside_the_data_is_kept(name: str) -> None:
    plan, _ = folded_exactly(Net(BESIDE[name]), data(4, 4, 5, 5))
    assert (plan.skips[0].name, plan.skips[0].reason) == ("norm", Reason.NONLINEAR)


@pytest.mark.parametrize("name", OVER)
def test_a_norm_whose_output_is_written_over_is_kept(name: str) -> None:
    with torch.no_grad():
        plan, _ = folded_exactly(Net(OVER[name]), data(4, 4, 4, 4))
    assert [s.name for s in plan.skips] == ["norm"]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("the slopes of a PReLU", "prelu computes with its weight, which would change"),
        ("the places of a grid", "grid_sample computes with its grid, which would change"),
        ("both sides of a convolution", "a weight of conv depends on the data"),
    ],
)
def test_why_it_is_kept_names_the_role(name: str, why: str) -> None:
    plan, _ = folded_exactly(Net(BESIDE[name]), data(4, 4, 5, 5))
    assert why in plan.skips[0].detail


def test_the_same_as_a_program_and_as_a_file() -> None:
    net = Net(BESIDE["the slopes of a PReLU"]).float().eval()
    image = data(4, 4, 5, 5).float()
    program = torch.export.export(net, (image,))
    file = torch.onnx.export(program, (image,), verbose=False, optimize=True).model
    plans: list[Plan] = [
        bntool.fold(net, image).plan,
        bntool.fold(program).plan,
        plan_fold_onnx(file)[0],
    ]
    for plan in plans:
        assert [skip.reason for skip in plan.skips] == [Reason.NONLINEAR]


INTO = {
    "a sum": lambda net, y, room: torch.add(y, y, out=room),
    "a product": lambda net, y, room: torch.mul(y, 2.0, out=room),
    "parts": lambda net, y, room: torch.cat([y], 1, out=room),
}


@pytest.mark.parametrize("name", INTO)
@pytest.mark.parametrize("room", [torch.empty_like, torch.sigmoid])
def test_what_is_written_to_is_no_operand(name: str, room: Callable[[Tensor], Tensor]) -> None:
    net = Net(lambda net, x, y: net.conv(INTO[name](net, y, room(x))))
    with torch.no_grad():
        plan, _ = folded_exactly(net, data(2, 4, 5, 5))
    assert [site.into for site in plan.fold_sites] == [("conv",)]


@pytest.mark.parametrize("room", [torch.empty_like, torch.sigmoid])
def test_the_branches_of_a_sum_take_a_shift_and_what_is_written_over_takes_none(
    room: Callable[[Tensor], Tensor],
) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), FILL.fill(nn.BatchNorm2d(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(torch.add(self.a(x), self.b(x), out=room(self.b(x).detach())))

    with torch.no_grad():
        folded_exactly(Model(), data(2, 4, 5, 5))


def test_the_weight_of_a_product_is_no_room_for_its_result() -> None:
    """The edit went to the buffer, which holds as many numbers, and the weight stayed."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = FILL.fill(nn.BatchNorm1d(4)), nn.Linear(4, 4, bias=False)
            self.register_buffer("room", torch.zeros(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.mm(self.norm(x.relu()), self.linear.weight, out=self.room) * 1.0

    model = Model().double().eval()
    nn.init.zeros_(model.norm.bias)
    nn.init.zeros_(model.norm.running_mean)
    with torch.no_grad():
        plan, _ = folded_exactly(model, data(4, 4))
    assert [site.into for site in plan.fold_sites] == [("linear",)]


def test_a_weight_of_a_branch_that_may_come_from_the_data_is_no_weight_of_a_merge() -> None:
    class Model(nn.Module):
        def __init__(self, join: Callable[..., Tensor]) -> None:
            super().__init__()
            self.a, self.b, self.join = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), join

        def forward(self, x: Tensor) -> Tensor:
            return self.join(self.a(x), self.b(x), alpha=0.5 + x.mean().item())

    for join in (torch.add, torch.sub):
        graph = observe(Model(join), Inputs((torch.ones(1, 4, 5, 5),))).graph
        assert plan_fold(graph, merge=True).merges == ()


@pytest.mark.parametrize(
    "step",
    [
        lambda y, number: y * number,
        lambda y, number: y / number,
        lambda y, number: number - y,
        lambda y, number: torch.add(y, y, alpha=number),
        F.leaky_relu,
        lambda y, number: y.clamp(min=number),
    ],
)
def test_a_number_of_the_data_in_a_program_lets_no_map_by(step: Callable[..., Tensor]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 1), FILL.fill(nn.BatchNorm2d(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(step(self.conv(x), x.mean().item()))

    image = torch.ones(2, 4, 5, 5)
    program = torch.export.export(Model().float().eval(), (image,))
    (skip,) = bntool.fold(program).plan.skips
    assert (skip.name, skip.reason) == ("norm", Reason.UNKNOWN_OP)
