"""What people do with a model after the insertion, for every form that the insertion takes."""

from __future__ import annotations

import copy
import functools
import gc
import os
import pickle
import socket
import warnings
import weakref
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import torch.distributed
import torch.multiprocessing
from torch import Tensor, nn
from torch.nn import functional as F

import bntool
from bntool.core.errors import UsageError

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Slot(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 4, 3), nn.Identity(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x))) * self.conv.weight.shape[0]


class Indexed(nn.Module):
    """Code that indexes the Sequential and reads a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.body[1](self.body[0](x))
        return self.body[2](y) * self.body[0].weight.shape[0]


class Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x)) * self.conv.weight.shape[0]


class Function(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x))


class Pyramid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x).mean((2, 3)) + self.head(F.avg_pool2d(x, 2)).mean((2, 3))


def plain() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))


FORMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "identity": (Slot, {}),
    "sequential": (plain, {}),
    "keep-keys": (plain, {"keep_keys": True}),
    "indexed": (Indexed, {}),
    "wrap": (Module, {}),
    "subclass": (Function, {}),
    "pair": (Function, {"portable": True}),
    "per-call": (Pyramid, {"per_call": True}),
}


@pytest.fixture(params=FORMS)
def models(request: pytest.FixtureRequest) -> tuple[str, nn.Module, nn.Module]:
    """The form, the model before and the model after."""
    build, options = FORMS[request.param]
    torch.manual_seed(0)
    before = build().eval()
    result = bntool.insert(before, X, **options)
    expected = {"keep-keys": "sequential", "indexed": "wrap", "per-call": "sequential"}
    assert {site.form for site in result.plan.insert_sites} == {expected.get(request.param, request.param)}
    return request.param, before, result.model


def run(model: Any, x: Tensor = X) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(x)
    return out


def test_copies_are_the_same(models: Any) -> None:
    _, before, after = models
    for other in (copy.deepcopy(after), pickle.loads(pickle.dumps(after))):
        assert torch.equal(run(other), run(before))
        assert type(other) is type(after)


def test_an_old_checkpoint_loads_as_it_is_even_after_training(models: Any) -> None:
    """Where no key moved, strictly; the newcomers, trained meanwhile, become ones that change nothing."""
    form, before, after = models
    torch.manual_seed(1)
    for other in (after, copy.deepcopy(after)):
        run(other.train(), torch.randn(16, 3, 8, 8))
        for parameter in other.parameters():
            nn.init.normal_(parameter)
        other.eval()
        assert not torch.equal(run(other), run(before))
        if form in ("sequential", "pair"):
            with pytest.raises(RuntimeError, match="Missing key"):
                other.load_state_dict(before.state_dict(), strict=True)
            continue
        other.load_state_dict(before.state_dict(), strict=True)
        assert torch.equal(run(other), run(before))


def test_a_checkpoint_without_the_layer_leaves_its_norm_alone_and_says_so(models: Any) -> None:
    """Loading a head, say, must not undo what the BatchNorms of the body have learnt."""
    *_, after = models
    for name, tensor in after.state_dict().items():
        if name.endswith(("running_mean", "running_var")):
            tensor.fill_(3)
    trained = {name: tensor.clone() for name, tensor in after.state_dict().items()}
    counters = {name for name in trained if name.endswith("num_batches_tracked")}  # torch's own: set to zero
    found = after.load_state_dict({"elsewhere.weight": torch.ones(1)}, strict=False)
    assert set(found.missing_keys) == set(trained) - counters
    assert found.unexpected_keys == ["elsewhere.weight"]
    assert all(
        torch.equal(trained[name], t) for name, t in after.state_dict().items() if name not in counters
    )


def test_an_old_checkpoint_gives_a_model_without_numbers_all_of_them() -> None:
    before = Slot().eval()
    empty = bntool.insert(before, X).model.to("meta")
    empty.load_state_dict(before.state_dict(), assign=True)
    assert torch.equal(run(empty), run(before))


def test_a_checkpoint_that_lacks_a_part_of_a_norm_is_refused(models: Any) -> None:
    *_, after = models
    state = after.state_dict()
    (key, *_) = [key for key in state if key.endswith("running_var")]
    del state[key]
    with pytest.raises(RuntimeError, match="Missing key"):
        after.load_state_dict(state, strict=True)


class Two(nn.Module):
    """Two sites of each form that a layer may take, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)
        self.act1, self.act2 = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(self.act2(self.conv1(self.act1(x)))))


@pytest.mark.parametrize("options", [{}, {"portable": True}, {"affine": False}], ids=str)
@pytest.mark.parametrize("lost", [0, 1])
def test_a_checkpoint_that_lacks_one_whole_norm_is_refused_and_changes_nothing(
    lost: int, options: dict[str, Any]
) -> None:
    """It is a new checkpoint with a hole, not an old one: neutral beside trained would be wrong."""
    result = bntool.insert(Two().eval(), X, **options)
    assert len(result.sites) == 2
    for model in (result.model, copy.deepcopy(result.model)):
        gone = f"{list(result.plan.insert_sites)[lost].bn}."
        trained = {k: torch.full_like(v, 3) for k, v in model.state_dict().items()}
        model.load_state_dict(trained, strict=True)
        part = {key: tensor for key, tensor in trained.items() if not key.startswith(gone)}
        absent = {k for k in trained if k.startswith(gone) and not k.endswith("num_batches_tracked")}
        with pytest.raises(RuntimeError, match="Missing key") as raised:
            model.load_state_dict(part, strict=True)
        assert all(str(raised.value).count(f'"{key}"') == 1 for key in absent), raised.value
        found = model.load_state_dict(part, strict=False)
        assert sorted(found.missing_keys) == sorted(absent), "each once"
        assert all(torch.equal(model.state_dict()[key], trained[key]) for key in absent)


def test_a_hole_is_seen_after_the_conversion_to_synchronised_norms_too() -> None:
    result = bntool.insert(Two().eval(), X)
    assert {site.form for site in result.plan.insert_sites} == {"wrap", "subclass"}
    model = nn.SyncBatchNorm.convert_sync_batchnorm(result.model)
    for site in result.plan.insert_sites:
        part = {k: v for k, v in model.state_dict().items() if not k.startswith(f"{site.bn}.")}
        with pytest.raises(RuntimeError, match="Missing key"):
            model.load_state_dict(part, strict=True)


def test_what_a_second_insertion_added_is_filled_in_beside_the_first() -> None:
    before = bntool.insert(Two().eval(), X, include=["conv1"])
    assert before.modified
    after = bntool.insert(before.model, X)
    assert [site.conv for site in after.plan.insert_sites] == ["conv2"]
    run(after.model.train(), torch.randn(16, 3, 8, 8))
    after.model.eval().load_state_dict(before.model.state_dict(), strict=True)
    assert torch.equal(run(after.model), run(before.model))


def test_the_memory_of_a_model_is_given_back_with_it(models: Any) -> None:
    """A hook that held its own model would keep the weights until the next garbage collection."""
    *_, after = models
    for make in (lambda: copy.deepcopy(after), lambda: bntool.insert(Two().eval(), X).model):
        other = make()
        gc.collect()
        gc.disable()
        try:
            seen = [weakref.ref(module) for module in other.modules()]
            del other
            assert not any(reference() for reference in seen)
        finally:
            gc.enable()


def test_the_models_own_hooks_on_loading_stay_and_go_into_a_pickle() -> None:
    net = Function().eval()
    net.register_load_state_dict_pre_hook(_seen)
    model = bntool.insert(net, X).model
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        _SEEN.clear()
        other.load_state_dict(other.state_dict())
        assert [type(other)] == _SEEN


_SEEN: list[type] = []


def _seen(module: nn.Module, *_: Any) -> None:
    _SEEN.append(type(module))


def test_a_pickle_is_the_plain_module(models: Any) -> None:
    form, _, after = models
    assert (b"bntool" in pickle.dumps(after)) == (form in ("subclass", "per-call"))


def test_it_can_be_exported(models: Any, tmp_path: Path) -> None:
    _, before, after = models
    program = torch.export.export(after, (X,))
    torch.testing.assert_close(run(program.module()), run(before))
    path = bntool.export_onnx(after, (X,), tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), run(before), rtol=1e-4, atol=1e-4)


def test_it_can_be_compiled(models: Any) -> None:
    _, before, after = models
    torch._dynamo.reset()
    compiled = torch.compile(after, backend="eager")
    for _ in range(3):
        torch.testing.assert_close(run(compiled), run(before))


def test_it_can_be_scripted_where_the_form_can(models: Any) -> None:
    form, before, after = models
    if form in ("subclass", "per-call"):
        pytest.skip("TorchScript takes no forward with *args, and none that picks a child by number")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated as a whole
        scripted = torch.jit.script(after)
    assert torch.equal(run(scripted), run(before))


def test_its_norms_become_synchronised(models: Any) -> None:
    _, before, after = models
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(after))
    assert any(isinstance(m, nn.SyncBatchNorm) for m in converted.modules())
    assert torch.equal(run(converted), run(before))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_runs_in_half_the_bits(models: Any, dtype: torch.dtype) -> None:
    _, before, after = models
    low = copy.deepcopy(after).to(dtype)
    reference = copy.deepcopy(before).to(dtype)
    # σ² = 1 − ε is 1 in these types, and the batch norm of a half type works in float32: one rounding of y
    torch.testing.assert_close(run(low, X.to(dtype)), run(reference, X.to(dtype)), rtol=1e-2, atol=1e-2)


def test_channels_last_stays(models: Any) -> None:
    _, before, after = models
    last = copy.deepcopy(after).to(memory_format=torch.channels_last)
    x = X.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(run(last, x), run(before), rtol=1e-5, atol=1e-5)


def test_it_learns(models: Any) -> None:
    _, _, after = models
    model = copy.deepcopy(after).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(X).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    optimizer.step()


def test_its_norms_fold_away_again(models: Any) -> None:
    form, before, after = models
    if form == "per-call":
        assert {s.reason.value for s in bntool.fold(after, X).skips} == {"called-more-than-once"}
        return
    result = bntool.fold(after, X)
    assert not result.skips
    torch.testing.assert_close(run(result.model), run(before), rtol=1e-6, atol=1e-6)


def _two_processes(rank: int, port: int, form: str, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    build, options = FORMS[form]
    torch.manual_seed(0)
    model = bntool.insert(build(), X, **options).model.train()
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        parallel(X + rank + step).sum().backward()
        optimizer.step()
    torch.save(model.state_dict(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("form", ["subclass", "per-call"])
def test_two_processes_train_it_together(form: str, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_two_processes, (port, form, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    names = [name for name in first if not name.endswith(("running_mean", "running_var"))]
    assert all(torch.equal(first[name], second[name]) for name in names)


def test_one_value_per_channel_is_said() -> None:
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 4, 1), nn.ReLU())
    notes = bntool.insert(model, X).plan.notes
    assert len(notes) == 1 and "two samples or more" in notes[0] and "behind 1 " in notes[0]
    assert not bntool.insert(plain(), X).plan.notes


@pytest.mark.parametrize("make", [torch.optim.Adam, functools.partial(torch.optim.SGD, momentum=0.9)])
def test_an_optimizer_over_the_parameters_in_another_order_is_refused(make: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.ReLU())
    optimizer = make([*model[2].parameters(), *model[0].parameters()])
    model(X).sum().backward()
    optimizer.step()
    result = bntool.insert(model, X)
    with pytest.raises(UsageError, match="over the parameters in another order"):
        bntool.convert_state_dict(optimizer.state_dict(), result.plan, result.model)
