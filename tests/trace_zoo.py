"""Small models whose forward leaves something behind: in themselves, in their inputs, or outside."""

from __future__ import annotations

import contextlib
import contextvars
import itertools
import os
import random
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.quantization import HistogramObserver, MovingAverageMinMaxObserver
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

ZOO: dict[str, Callable[[], nn.Module]] = {}
"""The makers of all models, by name; each takes images of three channels and gives an image of four."""

OUTSIDE: dict[str, Any] = {"log": [], "count": 0, "cache": {}}
COUNT = 0
TABLE = torch.zeros(4)
NUMBERS = np.zeros(3)
SEEN = contextvars.ContextVar[int]("SEEN")
SEEN.set(0)
GENERATOR = np.random.default_rng(3)


class Net(nn.Module):
    """Convolution, BatchNorm, activation, convolution; what is left behind happens in `leave`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1)
        self.act = nn.ReLU()
        self.prepare()

    def prepare(self) -> None:
        pass

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        return y

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.leave(x, self.act(self.norm(self.conv(x)))))


def zoo(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    ZOO[make.__name__] = make
    return make


@zoo
class Counter(Net):
    def prepare(self) -> None:
        self.calls = 0

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return y


@zoo
class CountingBuffer(Net):
    def prepare(self) -> None:
        self.register_buffer("frames", torch.zeros((), dtype=torch.long))

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        self.frames += 1
        return y


@zoo
class LogOfShapes(Net):
    def prepare(self) -> None:
        self.log: list[Any] = []

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        self.log.append(tuple(x.shape))
        return y


@zoo
class LogInsideADict(Net):
    def prepare(self) -> None:
        self.stats: dict[str, Any] = {"shapes": {"all": []}}

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        self.stats["shapes"]["all"].append(x.shape[-1])
        return y


@zoo
class LogOfTensors(Net):
    def prepare(self) -> None:
        self.kept = [torch.zeros(2)]

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        self.kept[0].add_(y.mean())
        self.kept.append(y)
        return y


@zoo
class CacheBySize(Net):
    def prepare(self) -> None:
        self.cache: dict[Any, Tensor] = {}

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        key = tuple(y.shape[-2:])
        if key not in self.cache:
            self.cache[key] = torch.linspace(0, 1, y.shape[-1])
        return y + self.cache[key]


@zoo
class TableOfTheFirstCall(Net):
    def prepare(self) -> None:
        self.table: Tensor | None = None

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.linspace(0, 1, y.shape[-1])
        return y + self.table


@zoo
class TableAsABuffer(Net):
    def prepare(self) -> None:
        self.register_buffer("table", None)

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        if self.table is None or self.table.shape[-1] != y.shape[-1]:
            self.table = torch.linspace(0, 1, y.shape[-1])
        return y + self.table


@zoo
class BufferMadeInForward(Net):
    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        if not hasattr(self, "mask"):
            self.register_buffer("mask", torch.ones(6, 1, 1))
        return y * self.mask


@zoo
class ModuleMadeInForward(Net):
    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        if not hasattr(self, "late"):
            self.late = nn.Identity()
        return self.late(y)


@zoo
class ShapeOfTheFirstCall(Net):
    def prepare(self) -> None:
        self.seen: Any = None

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        self.seen = self.seen or tuple(y.shape)
        return y


@zoo
def moving_range() -> nn.Module:
    return nn.Sequential(Net(), MovingAverageMinMaxObserver())


@zoo
def range_histogram() -> nn.Module:
    return nn.Sequential(Net(), HistogramObserver())


@zoo
def old_spectral_norm() -> nn.Module:
    net = Net()
    net.conv = spectral_norm(net.conv)
    return net


@zoo
def spectral_parametrization() -> nn.Module:
    net = Net()
    net.conv = parametrizations.spectral_norm(net.conv)
    return net


@zoo
def old_weight_norm() -> nn.Module:
    net = Net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is a newer one
        net.conv = weight_norm(net.conv)
    net(torch.randn(1, 3, 8, 8))  # a weight that autograd made stays on it
    return net


@zoo
def weight_parametrization() -> nn.Module:
    net = Net()
    net.last = parametrizations.weight_norm(net.last)
    return net


@zoo
class SpectralByHand(Net):
    def prepare(self) -> None:
        self.register_buffer("u", torch.ones(4))

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        weight = self.last.weight.flatten(1)
        self.u.copy_(F.normalize(weight @ (weight.T @ self.u), dim=0))
        return y / (self.u @ weight).norm()


@zoo
class RunningAverage(Net):
    def prepare(self) -> None:
        self.register_buffer("average", torch.zeros(6))

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        self.average.lerp_(y.mean((0, 2, 3)), 0.1)
        return y


@zoo
class RunningAverageBound(Net):
    def prepare(self) -> None:
        self.register_buffer("average", torch.zeros(6))

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        self.average = 0.9 * self.average + 0.1 * y.mean((0, 2, 3))
        return y


@zoo
class PlainTensorWritten(Net):
    def prepare(self) -> None:
        self.total = torch.zeros(6)

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        self.total += y.sum((0, 2, 3))
        return y


@zoo
class WrittenThroughNumpy(Net):
    def prepare(self) -> None:
        self.register_buffer("peak", torch.zeros(1))

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        with contextlib.suppress(Exception):  # no numbers are there to trace
            self.peak.numpy()[0] += 1
        return y


@zoo
class StatisticsMoveInEval(Net):
    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        F.batch_norm(y, self.norm.running_mean, self.norm.running_var, training=True, momentum=0.2)
        return y


@zoo
class WritesToItsInput(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(0.5))


@zoo
class NormalisesItsInputInPlace(Net):
    def forward(self, x: Tensor) -> Tensor:
        x -= x.mean((2, 3), keepdim=True)
        return super().forward(x)


@zoo
class HookInTheFirstForward(Net):
    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        if not self.last._forward_hooks:
            self.last.register_forward_hook(lambda module, args, output: output * 1)
        return y


@zoo
class HookThatCounts(Net):
    def prepare(self) -> None:
        self.hits = 0
        self.norm.register_forward_hook(self.hit)

    def hit(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.hits += 1


class Tap:
    def __init__(self, module: nn.Module) -> None:
        self.stored: Any = None
        self.handle = module.register_forward_hook(self.keep)

    def keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.stored = output


@zoo
class HandleOfAHook(Net):
    def prepare(self) -> None:
        self.tap = Tap(self.conv)

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.tap.stored


@zoo
def hook_over_a_list() -> nn.Module:
    net, log = Net(), []
    OUTSIDE["log"] = log
    net.norm.register_forward_hook(lambda module, args, output: log.append(output.shape))
    return net


@zoo
def hook_over_the_model() -> nn.Module:
    net = Counter()
    net.norm.register_forward_hook(lambda module, args, output: setattr(net, "calls", net.calls + 100))
    return net


@zoo
def hook_that_writes() -> nn.Module:
    net = Net()
    net.register_buffer("hits", torch.zeros(()))
    net.register_forward_pre_hook(lambda module, args: None if module.hits.add_(1) is not None else args)
    return net


class MergingConv(nn.Conv2d):
    """A low-rank part that `eval()` adds to the weight, and `train()` takes out."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.delta = nn.Parameter(0.3 * torch.randn_like(self.weight))
        self.merged = False

    def train(self, mode: bool = True) -> MergingConv:
        super().train(mode)
        if mode == self.merged:
            self.weight.data += self.delta.data * (-1 if mode else 1)
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight if self.merged else self.weight + self.delta, self.bias)


@zoo
def merges_in_eval() -> nn.Module:
    return nn.Sequential(MergingConv(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU())


@zoo
class TrainReturnsNothing(Net):
    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)
        self.norm.eval()


@zoo
class TrainCounts(Net):
    def prepare(self) -> None:
        self.switches = 0

    def train(self, mode: bool = True) -> TrainCounts:
        self.switches += 1
        return super().train(mode)


class FirstBatch(nn.Module):
    """Sets itself by the first batch, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(1, 6, 1, 1))
        self.register_buffer("ready", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        if not self.ready:
            self.loc.data.copy_(-x.mean((0, 2, 3), keepdim=True))
            self.ready.fill_(1)
        return x + self.loc


@zoo
class InitialisesItself(Net):
    def prepare(self) -> None:
        self.act = nn.Sequential(nn.ReLU(), FirstBatch())


@zoo
class WritesAWeight(Net):
    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            self.last.weight.clamp_(-0.05, 0.05)
        return y


@zoo
class BindsAWeightAnew(Net):
    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        self.last.weight.data = self.last.weight.data.clamp(-0.05, 0.05)
        return y


@zoo
class FreezesItself(Net):
    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        return y


@zoo
class DropsGradients(Net):
    def prepare(self) -> None:
        for parameter in self.parameters():
            parameter.grad = torch.ones_like(parameter)

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        if self.conv.weight.grad is not None:
            self.conv.weight.grad.zero_()
        self.last.weight.grad = None
        return y


@zoo
class MarksItsParameters(Net):
    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        self.conv.weight.seen = tuple(x.shape)
        return y


@zoo
class SwitchesModes(Net):
    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        self.act.training = not self.act.training
        return y


@zoo
class DrawsOfTorch(Net):
    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        return y + 0.1 * torch.randn(6, 1, 1)


@zoo
class DrawsOfPython(Net):
    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        return y * random.choice([0.5, 1.0, 2.0])


@zoo
class DrawsOfNumpy(Net):
    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        return y * float(np.random.rand())  # noqa: NPY002


@zoo
class DrawsFromItsOwn(Net):
    def prepare(self) -> None:
        self.generator = torch.Generator().manual_seed(4)

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        return y + 0.1 * torch.randn(6, 1, 1, generator=self.generator)


@zoo
class DrawsFromAGlobal(Net):
    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        return y * float(GENERATOR.random())


@zoo
class SeedsTorch(Net):
    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        torch.manual_seed(11)
        return y


@zoo
class SetsTheDefaultType(Net):
    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        torch.set_default_dtype(torch.float64)
        return y


@zoo
class SetsFlags(Net):
    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        torch.backends.cudnn.benchmark = True
        return y


@zoo
class SetsTheProcess(Net):
    """All that is set for the whole process."""

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        torch.set_num_threads(torch.get_num_threads() % 2 + 1)
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.set_float32_matmul_precision("high")
        torch.set_printoptions(precision=2)
        torch.autograd.set_detect_anomaly(True, check_nan=False)
        torch.set_autocast_enabled("cpu", True)
        torch.set_autocast_enabled("cpu", False)
        nn.modules.module.register_module_forward_hook(lambda *_: None)
        sys.setrecursionlimit(sys.getrecursionlimit() + 1)
        np.seterr(all="ignore")
        warnings.filterwarnings("ignore", message="of the model")
        os.environ["OF_THE_MODEL"] = "1"
        SEEN.set(SEEN.get() + 1)
        return y


@zoo
class GlobalList(Net):
    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        OUTSIDE["log"].append(x.shape)
        return y


@zoo
class GlobalCache(Net):
    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        return y + OUTSIDE["cache"].setdefault(y.shape[-1], torch.linspace(0, 1, y.shape[-1]))


def _count() -> None:
    global COUNT  # noqa: PLW0603
    COUNT += 1


@zoo
class GlobalNumber(Net):
    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        _count()
        return y


@zoo
class GlobalTensor(Net):
    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        TABLE.add_(1)
        return y


@zoo
class GlobalArray(Net):
    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        NUMBERS[0] += 1
        return y


@zoo
class ClassAttribute(Net):
    made = 0
    seen: ClassVar[list[Any]] = []

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        type(self).made += 1
        self.seen.append(x.shape)
        return y


@zoo
class Window(Net):
    def prepare(self) -> None:
        self.window: Any = deque(maxlen=3)

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        self.window.append(y.mean((0, 2, 3)))
        return y + torch.stack(list(self.window)).mean(0)[:, None, None]


@zoo
class StreamsItsState(Net):
    def prepare(self) -> None:
        self.state: Any = None

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        self.state = y.mean((0, 2, 3)) if self.state is None else 0.5 * self.state
        return y + self.state[:, None, None]


@zoo
class CountsByAnIterator(Net):
    def prepare(self) -> None:
        self.numbers = itertools.count()

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        next(self.numbers)
        return y


class Recorder:
    """An object that Python cannot copy."""

    def __init__(self) -> None:
        self.lock, self.events = threading.Lock(), []

    def record(self, what: Any) -> None:
        with self.lock:
            self.events.append(what)


@zoo
class HoldsALock(Net):
    def prepare(self) -> None:
        self.recorder = Recorder()

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        self.recorder.record(x.shape)
        return y


@zoo
class NotToBeCopied(Net):
    """Its own way to be copied fails, so it runs itself."""

    def prepare(self) -> None:
        self.register_buffer("frames", torch.zeros(()))

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("not to be copied")

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        self.frames += 1
        return y


@zoo
class FailsHalfway(Net):
    def prepare(self) -> None:
        self.calls, self.kept = 0, []

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        self.kept.append(y)
        self.last.weight.data.zero_()
        OUTSIDE["count"] += 1
        raise ValueError("halfway")
