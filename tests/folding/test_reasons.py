"""The reason is the deciding one, a BatchNorm that ran is never `not-observed`, and each is counted once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bntool
from bntool.core.reasons import Reason
from tests.fold_zoo import FOLDED, Net

Run = Callable[[Any, Tensor], Tensor]


def _lively(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.bias.data.normal_()
            module.num_batches_tracked.fill_(1)
    return model.eval()


def _verdicts(model: nn.Module) -> dict[str, Any]:
    """Of every BatchNorm; a name that stands twice fails."""
    result = bntool.fold(model, torch.randn(2, 3, 12, 12))
    told = [*((site.bn, FOLDED) for site in result.sites), *((s.name, s.reason) for s in result.skips)]
    assert len(dict(told)) == len(told) == result.to_dict()["bn_total"]
    return dict(told)


def _norms(**more: nn.Module) -> dict[str, nn.Module]:
    parts = {"c": nn.Conv2d(3, 4, 3, padding=1), "a": nn.BatchNorm2d(4), "b": nn.BatchNorm2d(4)}
    return {**parts, "d": nn.Conv2d(4, 4, 3, padding=1), **more}


def _function(norm: Any, x: Tensor) -> Tensor:
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)


def _through_a_closure(m: Any, x: Tensor) -> Tensor:
    def step(y: Tensor) -> Tensor:
        return m.a(m.c(y))

    return step(x).relu()


def _in_train_mode_when_large(m: Any, x: Tensor) -> Tensor:
    m.a.train(x.shape[-1] > 20)
    y = m.a(m.c(x)).relu()
    m.a.eval()
    return y


def _and_one_before_it_when_large(m: Any, x: Tensor) -> Tensor:
    y = m.c(x)
    return m.a(m.b(y) if x.shape[-1] > 20 else y).relu()


def _and_another_when_small(m: Any, x: Tensor) -> Tensor:
    y = m.a(m.c(x)).relu()
    return y + m.b(m.d(y)).relu().mean() if x.shape[-1] < 20 else y


UNSEEN = Reason.NOT_OBSERVED
WAYS: dict[str, tuple[Run, dict[str, Any]]] = {
    "a bank": (lambda m, x: m.get_submodule("ab"[len(x) > 9])(m.c(x)).relu(), {"a": FOLDED, "b": UNSEEN}),
    "in a list": (lambda m, x: [m.a, m.b][1](m.c(x)).relu(), {"a": UNSEEN, "b": FOLDED}),
    "in a partial": (lambda m, x: functools.partial(m.a)(m.c(x)).relu(), {"a": FOLDED, "b": UNSEEN}),
    "a closure": (_through_a_closure, {"a": FOLDED, "b": UNSEEN}),
    "twice": (lambda m, x: m.a(m.d(m.a(m.c(x)).relu())).relu(), {"a": FOLDED, "b": UNSEEN}),
    "twice, once behind tanh": (
        lambda m, x: m.a(m.a(m.c(x)).tanh()).tanh(),
        {"a": Reason.NONLINEAR, "b": UNSEEN},
    ),
    "its own forward": (lambda m, x: m.a.forward(m.c(x)).relu(), {"a": Reason.FUNCTIONAL, "b": UNSEEN}),
    "its function": (lambda m, x: _function(m.a, m.c(x)).relu(), {"a": Reason.FUNCTIONAL, "b": UNSEEN}),
    "called and its function": (
        lambda m, x: _function(m.a, m.d(m.a(m.c(x)).relu())).relu(),
        {"a": Reason.FUNCTIONAL, "b": UNSEEN},
    ),
    "statistics of one, scales of another": (
        lambda m, x: F.batch_norm(m.c(x), m.a.running_mean, m.a.running_var, m.b.weight, m.b.bias).relu(),
        {"a": Reason.FUNCTIONAL, "b": Reason.FUNCTIONAL},
    ),
    "by size": (
        lambda m, x: (m.b if x.shape[-1] > 20 else m.a)(m.c(x)).relu(),
        {"a": Reason.WEIGHT_SHARED, "b": UNSEEN},
    ),
    "batch statistics by size": (_in_train_mode_when_large, {"a": Reason.BATCH_STATISTICS, "b": UNSEEN}),
    "one before it by size": (_and_one_before_it_when_large, {"a": Reason.AXIS_MISMATCH, "b": UNSEEN}),
    "a branch of its own by size": (_and_another_when_small, {"a": FOLDED, "b": FOLDED}),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_batchnorm_has_one_verdict_and_one_that_ran_is_not_unobserved(way: str) -> None:
    run, expected = WAYS[way]
    model = _lively(Net(run, _norms()))
    assert _verdicts(model) == expected
    folded = bntool.fold(model, torch.randn(2, 3, 12, 12)).model
    for side in (12, 32):
        x = torch.randn(2, 3, side, side)
        torch.testing.assert_close(folded(x), model(x))


NEGATIVE: dict[str, tuple[Run, Reason]] = {
    # but for the sign it would go
    "a pool": (lambda m, x: F.max_pool2d(m.c(x), 2), Reason.NEGATIVE_SCALE),
    "two pools": (lambda m, x: F.max_pool2d(F.max_pool2d(m.c(x), 2), 2), Reason.NEGATIVE_SCALE),
    # it would stay without it too
    "a pool behind a ReLU": (lambda m, x: F.max_pool2d(m.c(x).relu(), 2), Reason.NONLINEAR),
    "a pool behind tanh": (lambda m, x: F.max_pool2d(m.c(x).tanh(), 2), Reason.NONLINEAR),
    "a pool of a layer that runs again": (
        lambda m, x: F.max_pool2d(torch.cat([m.c(x)[:, :2], m.d(m.c(x))[:, 2:]], 1), 2),
        Reason.CALLED_MORE_THAN_ONCE,
    ),
    "a pool of what others read": (
        lambda m, x: (F.max_pool2d((y := m.c(x)), 2), y.tanh())[0],
        Reason.OUTPUT_USED_ELSEWHERE,
    ),
}


@pytest.mark.parametrize("way", NEGATIVE)
def test_a_sign_is_the_reason_only_where_it_decides(way: str) -> None:
    run, reason = NEGATIVE[way]
    parts = {name: part for name, part in _norms().items() if name != "b"}
    model = _lively(Net(lambda m, x: m.a(run(m, x)).tanh(), parts))
    model.a.weight.data[1] = -0.5
    assert _verdicts(model) == {"a": reason}
