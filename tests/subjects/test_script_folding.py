"""TorchScript: calls are counted over all blocks and methods; what a run may not reach stays right."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import bntool
from bntool.core.errors import ExportError
from bntool.core.reasons import Reason
from bntool.graph.inputs import Inputs
from bntool.subjects.script_folding import converted, fold_script


@pytest.fixture(autouse=True)
def _deprecated() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.b(self.c(x))


class Exported(nn.Module):
    """`features` calls the convolution alone."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.b, self.d, self.e = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), Block()

    @torch.jit.export
    def features(self, x):
        return self.c(x)

    def forward(self, x):
        return self.d(self.b(self.c(x)))


class OtherBranch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.b = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        if x.size(3) > 12:
            return torch.relu(self.c(x))
        return torch.relu(self.b(self.c(x)))


class InAFork(OtherBranch):
    def forward(self, x):
        waiting = torch.jit.fork(self.c, x)
        return self.b(self.c(x)) + torch.jit.wait(waiting)


class ReadsAWeight(OtherBranch):
    def forward(self, x):
        return self.b(self.c(x)) * self.c.weight.sum()


class TwoNames(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.c = torch.jit.script(nn.Conv2d(3, 3, 1).eval())
        self.again, self.b = self.c, nn.BatchNorm2d(3)

    def forward(self, x):
        return self.b(self.again(x)) + self.c(x)


class OneOfTwo(nn.Module):
    """Both blocks have one class, and so one code."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Block(), Block()

    def forward(self, x):
        return self.two(self.one(x)) + self.one.c(x)


class Whole(OneOfTwo):
    """A BatchNorm and its convolution run together or not at all."""

    def forward(self, x):
        if x.size(3) > 12:
            return self.one(x)
        return self.two(x)


class InALoop(Block):
    def forward(self, x):
        for _ in range(3):
            x = self.b(self.c(x))
        return x


def doubled(self: Any, x: tuple[torch.Tensor], y: torch.Tensor) -> torch.Tensor:
    return y * 2


class Hooked(Block):
    def __init__(self) -> None:
        super().__init__()
        self.c.register_forward_hook(doubled)


def lively(model: nn.Module) -> nn.Module:
    """Numbers with which no BatchNorm is an identity."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model


def read_back(script: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    content = io.BytesIO()
    torch.jit.save(script, content)
    content.seek(0)
    return torch.jit.load(content)


def same_everywhere(given: torch.jit.ScriptModule, folded: torch.jit.ScriptModule) -> None:
    """Every method, on inputs that take either branch."""
    one, other = read_back(given).double(), read_back(folded).double()
    for side in (8, 16):
        x = torch.randn(2, 3, side, side).double()
        for method in given._c._method_names():
            a, b = getattr(one, method)(x), getattr(other, method)(x)
            # the result is rounded once, to float32
            assert torch.allclose(a, b, atol=1e-6 * float(a.detach().abs().max()), rtol=0), (method, side)


@pytest.mark.parametrize(
    ("build", "folded", "kept"),
    [
        (Exported, [], {"b": Reason.WEIGHT_SHARED}),
        (OtherBranch, [], {"b": Reason.WEIGHT_SHARED}),
        (InAFork, [], {"b": Reason.WEIGHT_SHARED}),
        (ReadsAWeight, [], {"b": Reason.WEIGHT_SHARED}),
        (TwoNames, [], {"b": Reason.WEIGHT_SHARED}),
        (OneOfTwo, [], {"one.b": Reason.WEIGHT_SHARED, "two.b": Reason.SCRIPTED}),
        (Hooked, [], {"b": Reason.SCRIPTED}),
        (Whole, ["one.b", "two.b"], {}),
        (InALoop, ["b"], {}),
    ],
)
def test_a_convolution_is_changed_where_its_batchnorm_alone_follows(
    build: type[nn.Module], folded: list[str], kept: dict[str, Reason]
) -> None:
    script = read_back(torch.jit.script(lively(build()).eval()))
    found = fold_script(script)
    assert list(found.folded) == folded
    assert {skip.name: skip.reason for skip in found.skips} == kept
    same_everywhere(script, found.model)


def test_a_traced_train_mode_stays_and_the_others_go() -> None:
    model = lively(nn.Sequential(Block(), Block())).eval()
    model[0].b.train()
    script = torch.jit.trace(model, torch.rand(2, 3, 8, 8), check_trace=False)
    model[0].b.eval()
    found = fold_script(read_back(script))
    assert found.folded == ("1.b",)
    assert [(s.name, s.reason) for s in found.skips] == [("0.b", Reason.BATCH_STATISTICS)]


def test_a_layer_left_in_train_mode_stays_in_it() -> None:
    model = lively(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), Block())).eval()
    model[1].train()
    found = fold_script(read_back(torch.jit.script(model)))
    assert found.folded == ("2.b",)
    assert [(s.name, s.reason) for s in found.skips] == [("1", Reason.BATCH_STATISTICS)]
    assert dict(found.model.named_modules())["1"].training


def test_calls_of_batch_norm_itself_have_a_verdict_each() -> None:
    script = torch.jit.freeze(torch.jit.script(lively(OneOfTwo()).eval()), optimize_numerics=False)
    assert [(s.name, s.reason) for s in fold_script(read_back(script)).skips] == [
        ("batch_norm", Reason.FUNCTIONAL),
        ("batch_norm_1", Reason.FUNCTIONAL),
    ]


def test_the_check_says_what_it_did_not_run() -> None:
    result = bntool.fold(torch.jit.script(lively(Branching()).eval()), torch.rand(1, 3, 8, 8))
    assert len(result.sites) == 1
    (row,) = result.checks
    assert row.passed
    assert "pair" in row.detail
    assert "branches" in row.detail


class Branching(Block):
    @torch.jit.export
    def pair(self, x, y):
        return x + y

    def forward(self, x):
        if x.sum() > 0:
            x = x * 2
        return self.b(self.c(x))


def test_a_branch_on_numbers_is_not_exported_as_one_of_its_sides() -> None:
    script = torch.jit.script(lively(Branching()).eval())
    with pytest.raises(ExportError, match="branches on its inputs") as raised:
        converted(script, Inputs((torch.rand(1, 3, 8, 8),)))
    assert "nn.Module" in raised.value.next_step
