from __future__ import annotations

import copy
import io
import itertools

import numpy as np
import pytest
import torch
from torch import nn

import bntool
from bntool.calibrating.calibrating import calibrate
from bntool.calibrating.moments import Moments
from bntool.calibrating.statistics import of_population, set_preserving, swept
from bntool.calibrating.sweeping import sweep
from bntool.core.errors import NothingToDo, StateError, UsageError
from bntool.frozen import freeze_layer

U32 = 2.0**-24
U64 = 2.0**-53


def batches_of(*sizes, shape=(3, 8, 8), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, *shape, generator=generator) * 2 + 1 for n in sizes]


def first_and_second():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Conv2d(4, 5, 3),
        nn.BatchNorm2d(5),
    )


def reference(parts):
    """Mean and unbiased variance over every axis but the second, by numpy in float64."""
    rows = np.concatenate([np.moveaxis(p.double().numpy(), 1, -1).reshape(-1, p.shape[1]) for p in parts])
    return rows.mean(0), rows.var(0, ddof=1), len(rows)


def everything_of(model):
    return {
        "state": {k: (v.clone(), v.data_ptr()) for k, v in model.state_dict().items()},
        "modes": [m.training for m in model.modules()],
        "flags": [
            (getattr(m, "momentum", None), getattr(m, "track_running_stats", None)) for m in model.modules()
        ],
        "hooks": [len(m._forward_hooks) for m in model.modules()],
    }


# -- moments -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_moments_agree_with_numpy_over_uneven_parts_in_any_order(offset):
    parts = [p + offset for p in batches_of(1, 7, 2, 5)]
    mean, variance, count = reference(parts)
    # Two passes lose about count·u relative to σ², and the mean's own rounding u·|μ| enters squared; the
    # walk of roundings makes it √count in practice, and count is the bound.
    tolerance = count * U64 * (1 + abs(offset) / 2)
    for order in itertools.permutations(range(4)):
        total = Moments.of(parts[order[0]])
        for i in order[1:]:
            total = total.merged(Moments.of(parts[i]))
        assert total.count == count
        np.testing.assert_allclose(total.mean.numpy(), mean, rtol=count * U64)
        np.testing.assert_allclose(total.unbiased_variance.numpy(), variance, rtol=tolerance)
        np.testing.assert_allclose(total.variance.numpy(), variance * (count - 1) / count, rtol=tolerance)


def test_moments_of_a_batch_larger_than_one_chunk(monkeypatch):
    (batch,) = batches_of(9)
    whole = Moments.of(batch)
    monkeypatch.setattr("bntool.calibrating.moments._CHUNK", 400)
    parts = Moments.of(batch)
    assert parts.count == whole.count
    torch.testing.assert_close(parts.m2, whole.m2, rtol=whole.count * U64, atol=0)


# -- calibrate -----------------------------------------------------------------------------------------------


def test_the_first_layer_gets_the_exact_statistics_of_all_batches():
    model = first_and_second()
    data = batches_of(5, 2, 9)
    result = calibrate(model, data)
    # the convolution itself rounds in float32, so the reference takes what it really gave out
    with torch.no_grad():
        mean, variance, count = reference([model[0](b) for b in data])
    first = result.model[1]
    assert [layer.samples for layer in result.layers] == [count, 16 * 4 * 4]
    np.testing.assert_allclose(first.running_mean.numpy(), mean, rtol=2 * U32)
    np.testing.assert_allclose(first.running_var.numpy(), variance, rtol=2 * U32)
    assert int(first.num_batches_tracked) == 3


def test_later_layers_read_what_training_would_show_them():
    model = first_and_second()
    data = batches_of(5, 2, 9)
    result = calibrate(model, data)
    shown = copy.deepcopy(model).eval()
    shown[1].train()
    with torch.no_grad():
        mean, variance, _ = reference([shown[:5](b) for b in data])
    np.testing.assert_allclose(result.model[5].running_mean.numpy(), mean, rtol=2 * U32)
    np.testing.assert_allclose(result.model[5].running_var.numpy(), variance, rtol=2 * U32)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.BatchNorm1d(4), (6, 4)),
        (nn.BatchNorm1d(4), (6, 4, 7)),
        (nn.BatchNorm2d(4), (6, 4, 3, 5)),
        (nn.BatchNorm2d(4, affine=False), (6, 4, 3, 5)),
        (nn.BatchNorm3d(4), (6, 4, 3, 5, 2)),
        (nn.SyncBatchNorm(4), (6, 4, 3, 5)),
        (nn.BatchNorm2d(4, momentum=None), (6, 4, 3, 5)),
    ],
)
def test_one_batch_gives_what_pytorch_gives_with_momentum_one(layer, shape):
    batch = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 3 - 1
    result = calibrate(layer, [batch])
    theirs = copy.deepcopy(layer).train()
    theirs.momentum = 1.0
    theirs(batch)
    # PyTorch sums in float64 on the CPU and rounds a few times in float32
    torch.testing.assert_close(result.model.running_var, theirs.running_var, rtol=8 * U32, atol=0)
    scale = batch.abs().max()
    torch.testing.assert_close(result.model.running_mean, theirs.running_mean, rtol=0, atol=8 * U32 * scale)
    assert result.model.num_batches_tracked == theirs.num_batches_tracked
    assert result.model.momentum == layer.momentum
    assert type(result.model) is type(layer)


def test_the_order_of_the_batches_does_not_matter():
    layer = nn.BatchNorm2d(3)
    data = batches_of(4, 1, 7)
    one, other = calibrate(layer, data), calibrate(layer, data[::-1])
    # each is exact to float64 rounding, so after the cast they differ by one float32 rounding at most
    torch.testing.assert_close(one.model.running_var, other.model.running_var, rtol=2 * U32, atol=0)
    torch.testing.assert_close(one.model.running_mean, other.model.running_mean, rtol=2 * U32, atol=0)


@pytest.mark.parametrize("mode", [True, False])
def test_nothing_of_the_argument_or_the_process_changes(mode):
    model = first_and_second().train(mode)
    model[4].eval()
    kept = [torch.full((2, 3, 8, 8), float(i)) + torch.randn(2, 3, 8, 8) for i in range(2)]
    given = [b.clone() for b in kept]
    before = everything_of(model)
    flag = torch.backends.cudnn.allow_tf32
    torch.manual_seed(3)
    random_state = torch.get_rng_state()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.cat(kept)), 2, shuffle=True)
    result = calibrate(model, kept)
    calibrate(model, loader)
    after = everything_of(model)
    for name, (tensor, place) in before["state"].items():
        assert after["state"][name][1] == place
        assert torch.equal(after["state"][name][0], tensor)
    assert all(after[part] == before[part] for part in ("modes", "flags", "hooks"))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.backends.cudnn.allow_tf32 is flag
    assert all(torch.equal(a, b) for a, b in zip(kept, given, strict=True))
    assert [m.training for m in result.model.modules()] == before["modes"]
    ours = {t.data_ptr() for t in result.model.state_dict().values()}
    assert ours.isdisjoint(place for _, place in before["state"].values())


def test_a_model_that_works_in_place_does_not_reach_the_data():
    (batch,) = batches_of(4)
    given = batch.clone()
    calibrate(nn.Sequential(nn.ReLU(inplace=True), nn.BatchNorm2d(3)), [batch])
    assert torch.equal(batch, given)


def test_a_model_without_running_statistics_gets_them_and_folds():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.ReLU(),
        nn.Conv2d(4, 5, 3, bias=False),
        nn.BatchNorm2d(5, affine=False, track_running_stats=False),
    ).eval()
    example = torch.randn(2, 3, 12, 12)
    assert not bntool.fold(model, example).sites
    result = bntool.calibrate(model, batches_of(6, 6, shape=(3, 12, 12)))
    assert set(result.model.state_dict()) - set(model.state_dict()) == {
        f"{i}.{name}" for i in (1, 4) for name in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert all(result.model[i].track_running_stats for i in (1, 4))
    assert model[1].running_mean is None
    assert result.parameters["delta"]["buffers"] == 2 * 4 + 1 + 2 * 5 + 1
    folded = bntool.fold(result.model, example, check="full")
    assert len(folded.sites) == 2
    assert not folded.skips
    assert all(check.passed for check in folded.checks)


def test_a_layer_called_twice_pools_its_samples():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x):
            return self.bn(x) + self.bn(x * 3 + 2)

    data = batches_of(3, 4)
    result = calibrate(Twice(), data)
    mean, variance, count = reference([p for b in data for p in (b, b * 3 + 2)])
    assert result.layers[0].samples == count
    assert int(result.model.bn.num_batches_tracked) == 4
    np.testing.assert_allclose(result.model.bn.running_mean.numpy(), mean, rtol=2 * U32)
    np.testing.assert_allclose(result.model.bn.running_var.numpy(), variance, rtol=2 * U32)


def test_a_subclass_that_permutes_first_is_measured_where_it_normalises():
    class ChannelsLast(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    data = batches_of(4, shape=(5, 5, 5))  # square, so that the wrong axis would fit too
    result = calibrate(ChannelsLast(5), data)
    mean, _, _ = reference([b.permute(0, 3, 1, 2) for b in data])
    np.testing.assert_allclose(result.model.running_mean.numpy(), mean, rtol=2 * U32)


def test_a_subclass_with_arithmetic_of_its_own_is_refused():
    class ByHand(nn.BatchNorm2d):
        def forward(self, x):
            return (x - x.mean((0, 2, 3), keepdim=True)) * 2

    with pytest.raises(UsageError, match="a way of its own") as caught:
        calibrate(nn.Sequential(ByHand(3)), batches_of(2))
    assert caught.value.where == "0"


def test_timm_layers_keep_their_activation():
    norm_act = pytest.importorskip("timm.layers.norm_act")
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm_act.BatchNormAct2d(4))
    result = calibrate(model, batches_of(4), freeze=True)
    with torch.no_grad():
        mean, _, _ = reference([model[0](b) for b in batches_of(4)])
    np.testing.assert_allclose(result.model[1].running_mean.numpy(), mean, rtol=2 * U32)
    assert isinstance(result.model[1], norm_act.BatchNormAct2d)
    result.model.train()
    assert not result.model[1].training
    assert result.model[1].act.training
    assert result.model(batches_of(4)[0]).min() == 0


def test_without_reset_earlier_batches_count_too():
    layer = nn.BatchNorm2d(3)
    data = batches_of(4, 4, 4)
    halfway = calibrate(layer, data[:2]).model
    whole = calibrate(layer, data).model
    on = calibrate(halfway, data[2:], reset=False).model
    assert int(on.num_batches_tracked) == 3
    # the first part went through float32 once
    torch.testing.assert_close(on.running_var, whole.running_var, rtol=4 * U32, atol=0)
    torch.testing.assert_close(on.running_mean, whole.running_mean, rtol=4 * U32, atol=0)
    fresh = calibrate(layer, data, reset=False).model
    assert torch.equal(fresh.running_var, whole.running_var)


def test_layers_that_are_not_reached_or_frozen_are_kept():
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused, self.fixed = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
            freeze_layer(self.fixed)

        def forward(self, x):
            return self.used(self.fixed(x))

    result = calibrate(Partly(), batches_of(2))
    assert [layer.name for layer in result.layers] == ["used"]
    assert dict(result.kept) == {"fixed": "frozen", "unused": "the data does not reach it"}
    assert torch.equal(result.model.fixed.running_mean, torch.zeros(3))
    assert "kept: unused" in str(result)


def test_dead_channels_are_told():
    batch = torch.randn(4, 3, 8, 8)
    batch[:, 1] = 2.0
    batch[:, 2] *= 1e-4
    result = calibrate(nn.BatchNorm2d(3), [batch])
    assert result.layers[0].dead == (1, 2)
    assert result.model.running_var[1] == 0
    assert "2 dead channels" in str(result)
    assert result.to_dict()["layers"][0]["dead"] == [1, 2]


def test_a_channel_is_dead_below_eps_and_not_at_it():
    batch = torch.tensor([[-0.5, -0.49], [0.5, 0.49]])  # variances of 0.25 and less
    assert calibrate(nn.BatchNorm1d(2, eps=0.25), [batch]).layers[0].dead == (1,)


def test_a_synchronised_layer_that_does_not_use_the_batch_keeps_what_it_holds():
    """It asks no other process in eval mode; without statistics of its own it would use the batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.SyncBatchNorm(3), nn.SyncBatchNorm(3))
    model[0].running_mean.fill_(5.0)
    batch = torch.randn(8, 3)
    seen = sweep(model, ["0", "1"], [batch], batch_statistics=False)
    expected = (batch.double() - 5.0).mean(0)
    torch.testing.assert_close(seen.layers["1"].moments.mean.cpu(), expected, rtol=0, atol=1e-4)


def test_samples_and_targets_and_keywords():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x, y):
            return self.bn(x + y)

    (batch,) = batches_of(4)
    single = calibrate(nn.BatchNorm2d(3), [(batch, torch.zeros(4))]).model.running_mean
    assert torch.equal(single, calibrate(nn.BatchNorm2d(3), batch).model.running_mean)
    both = calibrate(Pair(), [(batch, batch, torch.zeros(4))]).model.bn.running_mean
    named = calibrate(Pair(), [{"x": batch, "y": batch}]).model.bn.running_mean
    assert torch.equal(both, named)
    torch.testing.assert_close(both, 2 * single, rtol=4 * U32, atol=0)


# -- bad input -----------------------------------------------------------------------------------------------


def spoiled(value):
    good, bad = batches_of(2, 2)
    bad[1, 2, 3, 4] = value
    return [good, bad]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_values_in_the_data_are_named(value):
    with pytest.raises(UsageError, match="NaN or infinite") as caught:
        calibrate(first_and_second(), spoiled(value))
    assert caught.value.where == "batch 2, input"


def test_bad_values_made_by_the_model_are_a_bad_state():
    model = first_and_second()
    with torch.no_grad():
        model[4].weight[0, 0, 0, 0] = float("inf")
    with pytest.raises(StateError) as caught:
        calibrate(model, batches_of(2))
    assert caught.value.exit_code == 7
    assert caught.value.where == "5, batch 1"


def test_a_variance_that_the_type_cannot_hold_is_refused():
    layer = nn.BatchNorm1d(2).half()
    batch = torch.tensor([[6e4, 1.0], [-6e4, 2.0]], dtype=torch.float16)
    with pytest.raises(StateError, match="do not fit float16, channel 0"):
        calibrate(layer, [batch])


@pytest.mark.parametrize(
    ("batches", "said"),
    [
        ([], "no batch"),
        ([torch.empty(0, 3, 8, 8)], "holds no data"),
        ([torch.randn(2, 4, 8, 8)], "2x4x8x8"),
        (3, "batches is a int"),
        (["a"], "a batch is a str"),
        ({"x": torch.zeros(1)}, "batches is a dict"),
    ],
)
def test_wrong_data_is_a_usage_error(batches, said):
    with pytest.raises(UsageError, match=said) as caught:
        calibrate(first_and_second(), batches)
    assert caught.value.next_step


def test_one_value_for_each_channel_has_no_variance():
    with pytest.raises(UsageError, match="only one value") as caught:
        calibrate(nn.BatchNorm1d(3), [torch.randn(4, 3), torch.randn(1, 3), torch.randn(4, 3)])
    assert caught.value.where == "the model, batch 2"


def test_nothing_to_calibrate():
    with pytest.raises(NothingToDo, match="no BatchNorm"):
        calibrate(nn.Linear(2, 2), [torch.zeros(1, 2)])
    frozen = calibrate(nn.BatchNorm1d(2), [torch.randn(4, 2)], freeze=True).model
    with pytest.raises(NothingToDo, match="every BatchNorm is frozen"):
        calibrate(frozen, [torch.randn(4, 2)])


# -- freezing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm])
def test_frozen_layers_stay_frozen(cls):
    shape = {nn.BatchNorm1d: (4, 3), nn.BatchNorm3d: (4, 3, 2, 2, 2)}.get(cls, (4, 3, 5, 5))
    model = nn.Sequential(cls(3), nn.Dropout(0.0)).train()
    result = calibrate(model, [torch.randn(shape)], freeze=True)
    frozen = result.model
    stream = io.BytesIO()
    torch.save(frozen, stream)
    stream.seek(0)
    for one in (frozen, copy.deepcopy(frozen), torch.load(stream, weights_only=False)):
        assert isinstance(one[0], cls)
        one.train()
        assert (one.training, one[0].training, one[1].training) == (True, False, True)
        before = {k: v.clone() for k, v in one.state_dict().items()}
        one(torch.randn(shape) + 5)
        assert all(torch.equal(v, before[k]) for k, v in one.state_dict().items())
    assert list(frozen.state_dict()) == list(model.state_dict())
    assert not any(p.requires_grad for p in frozen.parameters())
    model.load_state_dict(frozen.state_dict(), strict=True)
    assert result.parameters["delta"]["frozen"] == -result.parameters["delta"]["trainable"] == 6


def test_frozen_layers_fold():
    model = calibrate(first_and_second(), batches_of(4, 4), freeze=True).model.train()
    folded = bntool.fold(model, batches_of(2)[0])
    assert len(folded.sites) == 2
    assert all(check.passed for check in folded.checks)


def test_a_class_without_a_frozen_form_is_refused_before_any_work():
    class Mine(nn.BatchNorm2d):
        pass

    def batches():
        raise AssertionError("the data was read")
        yield

    with pytest.raises(UsageError, match="Mine cannot be frozen"):
        calibrate(nn.Sequential(Mine(3)), batches(), freeze=True)


# -- insertion from data -------------------------------------------------------------------------------------


def test_measure_reads_what_fresh_layers_would_normalise():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU())
    inserted = bntool.insert(plain, torch.randn(1, 3, 8, 8))
    names = [site.bn for site in inserted.plan.insert_sites]
    data = batches_of(3, 5)
    found = of_population(swept(inserted.model, names, data))
    assert list(found) == names
    for name, depth in zip(names, (1, 3), strict=True):
        with torch.no_grad():
            mean, variance, count = reference([plain[:depth](b) for b in data])
        np.testing.assert_allclose(found[name][0].numpy(), mean, rtol=count * U64)
        np.testing.assert_allclose(found[name][1].numpy(), variance * (count - 1) / count, rtol=count * U64)
    module = inserted.model.get_submodule(names[1])
    assert list(of_population(swept(inserted.model, [module], data))) == [names[1]]
    with pytest.raises(UsageError, match="no layer nope"):
        swept(inserted.model, ["nope"], data)


@pytest.mark.parametrize("spread", [1e-3, 1.0, 100.0])
def test_preserving_statistics_keep_eval_and_the_first_training_step(spread):
    batch = batches_of(16)[0] * spread
    layer = nn.BatchNorm2d(3)
    set_preserving(layer, *of_population(swept(layer, [layer], [batch]))[""])
    # Every value goes through s = γ/√(σ²+ε) and t = β − s·μ. Roundings: γ 1, σ²+ε 1 (half of it after the
    # root), root 1, reciprocal 1, product 1: 4.5 u on s; s·x 1, s·μ 1, t 1, the sum 1. In training μ and
    # σ² of the batch are rounded too: 1 u each. Below 12 u of |x| and of |μ| in all.
    limit = 12 * U32 * (batch.abs() + layer.running_mean.abs().reshape(1, -1, 1, 1))
    with torch.no_grad():
        assert bool(((layer.eval()(batch) - batch).abs() <= limit).all())
        assert bool(((layer.train()(batch) - batch).abs() <= limit).all())


def test_preserving_needs_affine_and_good_statistics():
    with pytest.raises(UsageError, match="without weight"):
        set_preserving(nn.BatchNorm2d(2, affine=False), torch.zeros(2), torch.ones(2))
    with pytest.raises(StateError, match="negative or not finite, channel 1"):
        set_preserving(nn.BatchNorm2d(2), torch.zeros(2), torch.tensor([1.0, -1.0]))
