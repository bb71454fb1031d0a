"""Whatever is done with a model, the model that was given stays as it was, and so does all around it."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import itertools
import os
import random
import sys
import types
import warnings
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bntool
from bntool.core.errors import BntoolError
from tests import trace_zoo
from tests.trace_zoo import OUTSIDE, ZOO

CALLS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "fold": bntool.fold,
    "fold unchecked": lambda model, x: bntool.fold(model, x, check="none"),
    "fold shared": lambda model, x: bntool.fold(model, x, check="none", share=True),
    "insert": bntool.insert,
    "plan_fold": bntool.plan_fold,
    "plan_insert": bntool.plan_insert,
    "apply": lambda model, x: bntool.apply(model, bntool.plan_fold(model, x), x),
    "summary": bntool.summary,
    "verify": lambda model, x: bntool.verify(model, model, x, check="fast"),
    "calibrate": lambda model, x: bntool.calibrate(model, [x]),
    "bench": lambda model, x: bntool.bench(
        model, model, example_inputs=x, names=("a", "b"), batch_sizes=(2,), rounds=11
    ),
}
IN_TRAINING = ("fold unchecked", "insert", "summary", "calibrate")
LEFT_OUT = frozenset(
    """BntoolError CalibrationResult Check CheckFailed CheckOptions Comparison DamagedPlan DeviceError
    DroppedBias Edit ExportError ExportOptions FoldOptions FoldSite InsertOptions InsertSite LoadError Loaded
    NothingToDo ObserveError Plan PlanError Reason Skip StateError Summary SurgeryResult UsageError
    __version__ convert_state_dict load open_batches read_plan""".split()
)
"""Public names that run no model that they are given."""
EXPORTS: dict[str, Callable[[nn.Module, Tensor, Path], Any]] = {
    "export": bntool.export_onnx,
    "legacy": lambda model, x, path: bntool.export_onnx(model, x, path, exporter="legacy"),
    "fold to ONNX": lambda model, x, path: bntool.fold_to_onnx(model, path, x),
}
EXPORTED = (
    "CountingBuffer",
    "CacheBySize",
    "InitialisesItself",
    "hook_over_a_list",
    "WritesToItsInput",
)


TRAINED = (
    "CountingBuffer",
    "CacheBySize",
    "DrawsOfPython",
    "FailsHalfway",
    "GlobalList",
    "InitialisesItself",
    "LogInsideADict",
    "merges_in_eval",
    "GlobalTensor",
    "ClassAttribute",
    "WritesToItsInput",
)


def picture(value: Any, within: tuple[int, ...] = ()) -> Any:
    """All that a value holds, deeply, as something that can be compared; objects by what they hold."""
    if id(value) in within:
        return "itself"
    deeper = functools.partial(picture, within=(*within, id(value)))
    if isinstance(value, Tensor):
        numbers = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        grad = value.grad if value.is_leaf else None
        shape = (type(value), value.dtype, tuple(value.shape), value.stride(), value.requires_grad)
        return (id(value), value.data_ptr(), *shape, numbers, deeper(grad), deeper(vars(value)))
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, dict):
        return [(deeper(k), deeper(v)) for k, v in value.items()]
    if isinstance(value, list | tuple | deque):
        return [deeper(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    if isinstance(value, torch.Generator):
        return deeper(value.get_state().tolist())
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    if isinstance(value, itertools.count | int | float | str | torch.dtype | type(None)):
        return repr(value)
    if isinstance(value, types.MethodType):
        return (value.__func__, id(value.__self__))
    if isinstance(value, types.FunctionType | type) or not hasattr(value, "__dict__"):
        return id(value)
    return (type(value), deeper(vars(value)))


def around() -> Any:
    """Globals of the zoo, attributes of its classes, random states and defaults."""
    classes = [
        {k: v for k, v in vars(c).items() if not k.startswith("__")}
        for c in vars(trace_zoo).values()
        if isinstance(c, type) and c.__module__ == trace_zoo.__name__
    ]
    outside = {**OUTSIDE, "count_": trace_zoo.COUNT}
    state = [outside, trace_zoo.TABLE, trace_zoo.NUMBERS, trace_zoo.GENERATOR, classes]
    torch_state = torch.get_rng_state().tolist()
    numpy_state = repr(np.random.get_state())  # noqa: NPY002
    return [
        picture(state),
        torch_state,
        random.getstate(),
        numpy_state,
        torch.get_default_dtype(),
        torch.backends.cudnn.benchmark,
        torch.is_grad_enabled(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        repr(torch._tensor_str.PRINT_OPTS),
        torch.is_anomaly_enabled(),
        list(nn.modules.module._global_forward_hooks),
        sys.getrecursionlimit(),
        np.geterr(),
        list(warnings.filters),
        dict(os.environ),
        trace_zoo.SEEN.get(),
    ]


def made(name: str, *, training: bool) -> nn.Module:
    torch.manual_seed(0)
    model = ZOO[name]()
    for module in model.modules():
        module.training = training
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model


@pytest.fixture(autouse=True)
def _on_one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(torch.float32)
    torch.backends.cudnn.benchmark = False


def test_the_zoo_is_large_and_every_model_of_it_leaves_a_trace_by_itself() -> None:
    assert len(ZOO) >= 40
    clean = []
    for name in ZOO:
        model, x = made(name, training=False), torch.randn(2, 3, 8, 8)
        before = [picture(model), picture(x), around()]
        with torch.no_grad(), contextlib.suppress(ValueError):
            model.eval()
            model(x)
        if [picture(model), picture(x), around()] == before:
            clean.append(name)
        torch.set_default_dtype(torch.float32)
        torch.backends.cudnn.benchmark = False
    # spectral vectors move in training alone, and a train() without a return leaves nothing in the model
    assert set(clean) == {"spectral_parametrization", "weight_parametrization", "TrainReturnsNothing"}


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_nothing_is_left_behind(name: str, training: bool) -> None:
    for call in IN_TRAINING if training else CALLS:
        run = CALLS[call]
        model, x = made(name, training=training), torch.randn(2, 3, 8, 8)
        before = [picture(model), picture(x), around()]
        with contextlib.suppress(BntoolError):
            run(model, x)
        after = [picture(model), picture(x), around()]
        assert after[0] == before[0], f"{call} changed the model"
        assert after[1] == before[1], f"{call} changed the inputs"
        assert after[2] == before[2], f"{call} changed what lies around"


def test_every_public_function_is_held_to_it() -> None:
    called = {name.partition(" ")[0] for name in CALLS} | {"export_onnx", "fold_to_onnx", "compare"}
    assert called | LEFT_OUT == set(bntool.__all__)


@pytest.mark.parametrize("name", TRAINED)
def test_a_comparison_of_trainings_leaves_nothing_behind(name: str) -> None:
    head = (nn.Conv2d(4, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(made(name, training=True), *head)
    images, labels = torch.randn(4, 3, 8, 8), torch.arange(4)
    before = [picture(model), picture(images), around()]
    with contextlib.nullcontext() if name != "FailsHalfway" else pytest.raises(BntoolError, match="halfway"):
        bntool.compare(model, ((images, labels), (images, labels)), epochs=1, batch_size=2)
    assert [picture(model), picture(images), around()] == before


@pytest.mark.parametrize("name", EXPORTED)
@pytest.mark.parametrize("call", EXPORTS)
def test_an_export_leaves_nothing_behind(name: str, call: str, tmp_path: Path) -> None:
    model, x = made(name, training=False), torch.randn(2, 3, 8, 8)
    before = [picture(model), picture(x), around()]
    with contextlib.suppress(BntoolError):
        EXPORTS[call](model, x, tmp_path / "m.onnx")
    assert [picture(model), picture(x), around()] == before


class Stopped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyboardInterrupt


def test_an_interrupt_leaves_nothing_behind() -> None:
    for name in ("WritesAWeight", "LogOfTensors", "GlobalList", "BindsAWeightAnew"):
        model, x = nn.Sequential(made(name, training=True), Stopped()), torch.randn(2, 3, 8, 8)
        for run in CALLS.values():
            before = [picture(model), picture(x), around()]
            with pytest.raises(KeyboardInterrupt):
                run(model, x)
            assert [picture(model), picture(x), around()] == before


UNFOLDED = frozenset(
    """FailsHalfway HandleOfAHook hook_over_a_list hook_over_the_model HookThatCounts merges_in_eval
    NotToBeCopied old_spectral_norm spectral_parametrization StatisticsMoveInEval old_weight_norm""".split()
)
"""Models whose BatchNorm stays: hooked, behind a computed weight, read by others, or not to be copied."""


@pytest.mark.parametrize("name", sorted(ZOO.keys() - UNFOLDED))
def test_it_folds_is_proved_and_the_result_carries_the_state_that_was_given(name: str) -> None:
    model, x = made(name, training=False), torch.randn(2, 3, 8, 8)
    result = bntool.fold(model, x)
    assert [site.bn for site in result.sites] != [], result.plan.skips
    assert all(check.passed for check in result.checks)
    given, kept = model.state_dict(), result.model.state_dict()
    for key in given.keys() & kept.keys():
        if not key.rpartition(".")[2].startswith(("weight", "bias", "original")):
            assert torch.equal(given[key], kept[key]), key


def test_what_cannot_be_kept_apart_is_said_in_the_row_of_the_check() -> None:
    model, x = made("Counter", training=False), torch.randn(2, 3, 8, 8)
    model.stream = (number for number in range(9))  # type: ignore[assignment]
    (row, *_) = bntool.fold(model, x).checks
    assert "stream (a generator) cannot be copied" in row.detail
    (row,) = bntool.verify(model, made("Counter", training=False), x, check="fast").checks
    assert "stream (a generator) cannot be copied" in row.detail


def test_a_model_that_cannot_be_copied_is_run_itself_and_that_is_said() -> None:
    model, x = made("NotToBeCopied", training=False), torch.randn(2, 3, 8, 8)
    (row,) = bntool.verify(model, made("Counter", training=False), x, check="fast").checks
    assert "the model itself was run" in row.detail
    assert model.frames == 0


def test_a_surgery_without_anything_to_do_gives_another_model() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), torch.randn(2, 3, 8, 8)
    for share in (False, True):
        result = bntool.fold(model, x, share=share)
        assert result.model is not model
        assert model[0].weight is model.get_parameter("0.weight")
        assert model.training
        assert not result.model.training


def test_the_handle_of_a_hook_can_be_copied_once_more() -> None:
    model = made("HandleOfAHook", training=False)
    folded = bntool.fold(model, torch.randn(2, 3, 8, 8), exclude=["norm"]).model
    again = copy.deepcopy(folded)
    again.tap.handle.remove()
    assert (len(again.conv._forward_hooks), len(folded.conv._forward_hooks)) == (0, 1)


def test_an_observation_looks_through_no_more_than_what_the_forward_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A full collection takes seconds in a process that holds the index of a data set."""
    asked: list[int] = []
    monkeypatch.setattr(gc, "collect", lambda generation=2: asked.append(generation) or 0)
    bntool.fold(made("LogOfTensors", training=False), torch.randn(2, 3, 8, 8))
    assert set(asked) == {0}
