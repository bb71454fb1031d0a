"""Where a BatchNorm goes when the user asks for more: calls, pooling, biases, portability."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.ops import FrozenBatchNorm2d

import bntool
from bntool.core.errors import CheckFailed, UsageError
from bntool.core.plan import Plan
from bntool.core.reasons import Reason
from bntool.layers import BatchNormPerCall

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def three_convs() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.ReLU(), nn.Conv2d(5, 6, 1), nn.ReLU()
    )


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.conv2 = nn.Conv2d(4, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.conv1(x)))).mean((2, 3))


class Pyramid(nn.Module):
    """One head over three sizes, as detectors have it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.last(self.head(F.avg_pool2d(x, size))) for size in (1, 2, 4)]


def eval_outputs(model: nn.Module, x: Tensor = X) -> list[Tensor]:
    with torch.no_grad():
        out = model.eval()(x)
    return [out] if isinstance(out, Tensor) else list(out)


def same_bits(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(eval_outputs(first), eval_outputs(second), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


# -- which sites ----------------------------------------------------------------------------------------


def test_every_second_site_and_all_but_the_last() -> None:
    model = three_convs()
    every = bntool.insert(model, X, every=2)
    assert [site.conv for site in every.plan.insert_sites] == ["0", "4"]
    assert [(s.name, s.reason) for s in every.skips] == [("2", Reason.EXCLUDED)]
    last = bntool.insert(model, X, skip_last=True)
    assert [site.conv for site in last.plan.insert_sites] == ["0", "2"]
    both = bntool.insert(model, X, skip_last=True, every=2)
    assert [site.conv for site in both.plan.insert_sites] == ["0"]


@pytest.mark.parametrize("options", [{"every": 2}, {"skip_last": True}, {"every": 2, "skip_last": True}])
def test_the_same_choice_again_changes_nothing(options: dict[str, Any]) -> None:
    first = bntool.insert(three_convs(), X, **options)
    assert first.modified and not bntool.insert(first.model, X, **options).modified


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_glob_that_means_nothing_is_a_slip(option: str) -> None:
    with pytest.raises(UsageError, match=r"no layer is called 'conv3'") as caught:
        bntool.insert(Functional(), X, **{option: ["conv3"]})
    assert "conv1" in str(caught.value.next_step)


# -- through ops that keep the channels -----------------------------------------------------------------


def test_dropout_between_layer_and_activation_does_not_stop_it() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout2d(), nn.ReLU())
    result = bntool.insert(model, X)
    assert [type(m).__name__ for m in result.model] == ["Conv2d", "BatchNorm2d", "Dropout2d", "ReLU"]


def test_pooling_stops_it_unless_asked_for() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.ReLU())
    plain = bntool.insert(model, X)
    assert [s.reason for s in plain.skips] == [Reason.NO_ACTIVATION]
    result = bntool.insert(model, X, pooling=True)
    assert [type(m).__name__ for m in result.model] == ["Conv2d", "BatchNorm2d", "MaxPool2d", "ReLU"]
    assert same_bits(model, result.model)
    assert not bntool.insert(result.model, X, pooling=True).modified


# -- one for each call ----------------------------------------------------------------------------------


def test_a_head_over_three_sizes_gets_three() -> None:
    model = Pyramid().eval()
    assert Reason.CALLED_MORE_THAN_ONCE in {s.reason for s in bntool.insert(model, X).skips}
    result = bntool.insert(model, X, per_call=True)
    (site,) = result.plan.insert_sites
    assert site.norms == ("head.1.0", "head.1.1", "head.1.2")
    assert same_bits(model, result.model)
    assert result.parameters["delta"]["trainable"] == 3 * 2 * 4
    assert not bntool.insert(result.model, X, per_call=True).modified


def test_each_call_has_its_own_statistics_even_after_a_forward_that_failed() -> None:
    result = bntool.insert(Pyramid(), X, per_call=True)
    model = result.model.train()
    norms = model.get_submodule("head.1")
    assert isinstance(norms, BatchNormPerCall)
    with pytest.raises(RuntimeError):
        model(X[:, :, :2])  # the third size is empty: two of three calls were made
    before = [norm.running_mean.clone() for norm in norms]
    seen: list[Tensor] = []
    for norm in norms:
        norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].mean((0, 2, 3))))
    model(X)
    assert len(seen) == 3
    with torch.no_grad():
        wanted = [model.get_submodule("head.0")(F.avg_pool2d(X, size)).mean((0, 2, 3)) for size in (1, 2, 4)]
    for norm, old, mean, got in zip(norms, before, wanted, seen, strict=True):
        # the same reduction over the same numbers, in another layout at most: a few roundings
        torch.testing.assert_close(got, mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(norm.running_mean, 0.9 * old + 0.1 * mean, rtol=1e-5, atol=1e-6)


def test_a_call_too_many_is_an_error_not_a_mix() -> None:
    model = bntool.insert(Pyramid(), X, per_call=True).model
    head = model.get_submodule("head")
    model(X)
    with pytest.raises(RuntimeError, match="more than 3 times"):
        head(X)


def test_a_model_with_one_for_each_call_is_saved_loaded_and_replayed(tmp_path: Any) -> None:
    model = Pyramid()
    result = bntool.insert(model, X, per_call=True)
    again = bntool.apply(Pyramid(), Plan.from_json(result.plan.to_json()), X)
    assert same_bits(result.model, again.model)
    path = tmp_path / "m.pt"
    torch.save(nn.Sequential(bntool.insert(Functional(), X).model), path)
    copied = pickle.loads(pickle.dumps(result.model))
    assert same_bits(copied, result.model)
    assert len(copied._forward_pre_hooks) == 1


def test_calibration_measures_each_call() -> None:
    result = bntool.insert(Pyramid(), X, per_call=True, init="calibrate", data=[X])
    norms = [result.model.get_submodule(name) for site in result.plan.insert_sites for name in site.norms]
    with torch.no_grad():
        conv = result.model.get_submodule("head.0").double()
        for norm, size in zip(norms, (1, 2, 4), strict=True):
            mean = conv(F.avg_pool2d(X.double(), size)).mean((0, 2, 3))
            torch.testing.assert_close(norm.running_mean.double(), mean, rtol=1e-5, atol=1e-6)


# -- biases ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [three_convs, Functional])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"portable": True}, {"keep_keys": True}])
def test_a_dropped_bias_costs_one_running_mean(build: Any, options: dict[str, Any]) -> None:
    model = build().eval()
    result = bntool.insert(model, X, drop_bias=True, **options)
    channels = sum(site.channels for site in result.plan.insert_sites)
    delta = result.parameters["delta"]
    affine = 0 if options.get("affine") is False else 2 * channels
    assert delta["conv_bias"] == -channels
    assert delta["trainable"] == affine - channels
    assert delta["buffers"] == 2 * channels + len(result.sites)
    assert all(check.passed for check in result.checks)
    wide, kept = (bntool.insert(model, X, drop_bias=d, **options).model.double() for d in (True, False))
    for mode in (False, True):
        with torch.no_grad():
            first, second = (m.train(mode)(X.double()) for m in (wide, kept))
        # float32 buffers hold −b to half a unit in the last place, 6e-8 of a value of order one
        torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-6)


def test_the_bias_of_a_model_that_has_batchnorm_already_moves_too() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    model[1].running_mean.normal_()
    result = bntool.insert(model, X, drop_bias=True)
    assert result.modified and not result.sites
    assert [d.to_dict() for d in result.plan.dropped] == [
        {"conv": "0", "bias": "0.bias", "norms": ["1"], "channels": 4}
    ]
    assert result.model[0].bias is None and model[0].bias is not None
    assert result.parameters["delta"] == {
        "trainable": -4,
        "frozen": 0,
        "buffers": 0,
        "bytes": -16,
        "conv_bias": -4,
    }
    assert not bntool.insert(result.model, X, drop_bias=True).modified


class LongGate(nn.Module):
    """x·f(x), with a sigmoid and so many products in f that all of it is `ops` operators."""

    def __init__(self, ops: int) -> None:
        super().__init__()
        self.conv, self.products = nn.Conv2d(3, 4, 1), ops - 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        gate = torch.sigmoid(y)
        for _ in range(self.products):
            gate = gate * 0.9
        return y * gate


@pytest.mark.parametrize(("ops", "found"), [(2, True), (12, True), (13, False)])
def test_an_activation_is_written_out_in_twelve_operators_at_most(ops: int, found: bool) -> None:
    result = bntool.insert(LongGate(ops).eval(), X, activations=("silu",))
    assert [site.conv for site in result.plan.insert_sites] == (["conv"] if found else [])


class SharedBias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.b.bias = self.a.bias
        self.na, self.nb = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.nb(self.b(F.relu(self.na(self.a(x)))))


class BiasReadElsewhere(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.n = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.n(self.a(x)) + self.a.bias.sum()


class BiasOfAnIdleLayer(nn.Module):
    """The layer that does not run keeps its bias, and would lose it in a checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.idle, self.n = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.idle.bias = self.a.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.n(self.a(x))


class DroppedOut(nn.Module):
    """In train mode the dropout takes the bias of some channels away: BatchNorm cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.drop, self.n = nn.Conv2d(3, 4, 1), nn.Dropout2d(), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.n(self.drop(self.a(x)))


def before_a_frozen_norm() -> nn.Module:
    """Its statistics stay in train mode: there the bias has a gradient."""
    return nn.Sequential(nn.Conv2d(3, 4, 1), FrozenBatchNorm2d(4))


NEEDED = [SharedBias, BiasReadElsewhere, BiasOfAnIdleLayer, DroppedOut, before_a_frozen_norm]


@pytest.mark.parametrize("net", NEEDED)
def test_a_bias_that_somebody_else_needs_stays(net: Any) -> None:
    result = bntool.insert(net().eval(), X, drop_bias=True)
    assert not result.plan.dropped


def test_calibration_keeps_what_the_bias_added() -> None:
    model = three_convs().eval()
    result = bntool.insert(model, X, drop_bias=True, init="calibrate", data=[X, X + 1])
    assert all(check.passed for check in result.checks)
    assert all(layer.bias is None for layer in result.model if isinstance(layer, nn.Conv2d))
    trained = result.model.train()
    with torch.no_grad():
        first = trained(torch.cat([X, X + 1]))  # the batch that was measured: it has these statistics
        torch.testing.assert_close(first, model(torch.cat([X, X + 1])), rtol=1e-4, atol=1e-5)


# -- old checkpoints and optimizers ---------------------------------------------------------------------


@pytest.mark.parametrize("build", [three_convs, Functional, Pyramid])
@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("portable", [False, True])
def test_an_old_checkpoint_loads_strictly_once_converted(build: Any, drop: bool, portable: bool) -> None:
    per_call = build is Pyramid and not portable
    result = bntool.insert(build(), X, drop_bias=drop, portable=portable, per_call=per_call)
    other = build()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_(0, 0.3)
    converted = bntool.convert_state_dict(other.state_dict(), result.plan)
    result.model.load_state_dict(converted, strict=True)
    for old, new in zip(eval_outputs(other), eval_outputs(result.model), strict=True):
        if drop:
            # the bias is added by the BatchNorm and not by the convolution: one more rounding each
            torch.testing.assert_close(new, old, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(new, old)


@pytest.mark.parametrize("build", [three_convs, Functional])
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("drop", [False, True])
def test_moments_follow_their_parameters(build: Any, named: bool, drop: bool) -> None:
    model = build()
    given = model.named_parameters() if named else model.parameters()
    old = torch.optim.Adam(given, lr=0.01)
    model(X).sum().backward()
    old.step()
    moments = {n: old.state[p]["exp_avg"].clone() for n, p in model.named_parameters()}
    result = bntool.insert(model, X, drop_bias=drop)
    after = result.model.train()
    new = torch.optim.Adam(after.named_parameters() if named else after.parameters(), lr=0.5)
    new.load_state_dict(bntool.convert_state_dict(old.state_dict(), result.plan, after))
    assert new.param_groups[0]["lr"] == 0.01
    gone = {d.bias for d in result.plan.dropped}
    assert bool(gone) is drop
    places = dict(after.named_parameters())
    for name, moment in moments.items():
        if name not in gone:
            place = places[result.plan.key_map.get(name, name)]
            assert torch.equal(new.state[place]["exp_avg"], moment), name
    assert len(new.state) == len(moments) - len(gone)
    after(X).sum().backward()
    new.step()


def test_an_optimizer_of_something_else_is_refused() -> None:
    model = three_convs()
    result = bntool.insert(model, X)
    partial = torch.optim.SGD(list(model.parameters())[:2], lr=0.1)
    with pytest.raises(UsageError, match="holds 2 parameters in 1 groups, the model before had 6"):
        bntool.convert_state_dict(partial.state_dict(), result.plan, result.model)
    with pytest.raises(UsageError, match="numbers, not names"):
        bntool.convert_state_dict(partial.state_dict(), result.plan)


# -- portable -------------------------------------------------------------------------------------------

_LOAD = """
import io, sys, torch
class Finder:
    def find_spec(self, name, *_):
        if name.split(".")[0] == "bntool":
            raise ImportError(name)
sys.meta_path.insert(0, Finder())
torch.load(io.BytesIO(sys.stdin.buffer.read()), weights_only=False)
"""


@pytest.mark.parametrize("portable", [False, True])
def test_a_portable_model_needs_no_bntool(portable: bool) -> None:
    head = TwoMLPHead(12, 4)  # a stock class that applies its activations as functions
    result = bntool.insert(head, torch.randn(2, 3, 2, 2), linear=True, portable=portable)
    assert {site.form for site in result.plan.insert_sites} == {"pair" if portable else "subclass"}
    buffer = io.BytesIO()
    torch.save(result.model, buffer)
    run = subprocess.run(
        [sys.executable, "-c", _LOAD], input=buffer.getvalue(), capture_output=True, timeout=120, check=False
    )
    assert (run.returncode == 0) is portable, run.stderr.decode()[-300:]


def test_a_pair_moves_the_keys_of_its_layer_alone() -> None:
    model = Functional()
    plan = bntool.insert(model, X, portable=True).plan
    assert plan.key_map == {
        "conv1.weight": "conv1.0.weight",
        "conv1.bias": "conv1.0.bias",
        "conv2.weight": "conv2.0.weight",
        "conv2.bias": "conv2.0.bias",
    }
    assert [site.bn for site in plan.insert_sites] == ["conv1.1", "conv2.1"]
    assert json.loads(plan.to_json())["sites"][0]["form"] == "pair"


# -- modules registered under several names ---------------------------------------------------------------


class Registered(nn.Module):
    """Every module has a second name, as layers kept in a list besides their attributes have."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        self.conv, self.act, self.func = nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1)
        self.last, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.every = nn.ModuleList([self.body, self.conv, self.act, self.func, self.last, self.norm])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.last(F.relu(self.func(self.act(self.conv(self.body(x)))))))
        return out


@pytest.mark.parametrize("options", [{}, {"portable": True}, {"keep_keys": True}])
@pytest.mark.parametrize("drop", [False, True])
def test_a_checkpoint_is_converted_under_every_name(options: dict[str, Any], drop: bool) -> None:
    result = bntool.insert(Registered(), X, drop_bias=drop, **options)
    assert len(result.sites) == 3 and len(result.plan.dropped) == (4 if drop else 0)
    other = Registered()
    with torch.no_grad():
        for tensor in (*other.parameters(), other.norm.running_mean):
            tensor.normal_(0, 0.3)
    plan = Plan.from_json(result.plan.to_json())
    result.model.load_state_dict(bntool.convert_state_dict(other.state_dict(), plan), strict=True)
    for old, new in zip(eval_outputs(other), eval_outputs(result.model), strict=True):
        # a bias that moved is added by the BatchNorm instead: one more rounding each
        torch.testing.assert_close(new, old, rtol=1e-5 if drop else 0, atol=1e-6 if drop else 0)


# -- a bias that BatchNorm does not take away ---------------------------------------------------------------


class OtherAxis(nn.Module):
    """BatchNorm over axis 1 behind a linear layer whose channels lie on axis 2."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(64, features), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.linear(x.flatten(2)))
        return out


class Unbatched(nn.Module):
    """The output of a convolution without a batch axis, (C, H, W), taken for a batch of C."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.conv(x[0]))
        return out


class ReadsItsBias(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        assert bias is not None
        return super()._conv_forward(x, weight, bias if bias.numel() else None)


def reads_its_bias() -> nn.Module:
    return nn.Sequential(ReadsItsBias(3, 4, 1), nn.BatchNorm2d(4))


@pytest.mark.parametrize("build", [lambda: OtherAxis(3), lambda: OtherAxis(5), Unbatched, reads_its_bias])
def test_only_a_bias_along_the_channels_of_the_batchnorm_moves(build: Any) -> None:
    model = build().eval()
    assert not bntool.insert(model, X, drop_bias=True).modified
    assert not [note for note in bntool.summary(model, X).notes if "bias without effect" in str(note)]


def test_a_calibration_that_changes_the_output_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(norm: Any, mean: Tensor, variance: Tensor) -> None:
        norm.running_mean += 1

    monkeypatch.setattr("bntool.pipeline.surgeries.set_preserving", wrong)
    with pytest.raises(CheckFailed, match="the insertion changes the output"):
        bntool.insert(three_convs(), X, init="calibrate", data=[X])
