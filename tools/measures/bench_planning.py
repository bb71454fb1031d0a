"""How observing, planning and applying grow with the number of ops: nets of a size made to measure."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from bntool.core.collecting import paused
from bntool.core.plan import Plan
from bntool.folding import plan_fold
from bntool.graph.dataflow import Graph
from bntool.graph.inputs import Inputs
from bntool.observe.eager import observe
from bntool.observe.onnx_model import observe_onnx
from bntool.surgery.fold_modules import apply_fold
from bntool.surgery.fold_onnx import apply_fold_onnx

SIZES = (100, 1_000, 3_000, 10_000)
_WIDTH = 4


@dataclasses.dataclass(frozen=True)
class Growth:
    """Seconds of processor time by number of ops.

    `exponent` is the slope of log(seconds to plan) over log(ops), by least squares: 1 is linear.
    """

    net: str
    ops: tuple[int, ...]
    observe: tuple[float, ...]
    plan: tuple[float, ...]
    apply: tuple[float, ...]

    @property
    def exponent(self) -> float:
        x, y = [math.log(n) for n in self.ops], [math.log(t) for t in self.plan]
        mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
        above = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
        return above / sum((a - mean_x) ** 2 for a in x)

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "exponent": self.exponent}


class _Unit(nn.Sequential):
    """Convolution, BatchNorm, ReLU."""

    def __init__(self, channels: int = _WIDTH) -> None:
        norm = nn.BatchNorm2d(_WIDTH)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
        super().__init__(nn.Conv2d(channels, _WIDTH, 1, bias=False), norm, nn.ReLU())


class Chain(nn.Module):
    """Unit after unit."""

    unit_ops = 3

    def __init__(self, units: int) -> None:
        super().__init__()
        self.units = nn.ModuleList(_Unit() for _ in range(units))

    def forward(self, x: Tensor) -> Tensor:
        for unit in self.units:
            x = unit(x)
        return x


class Residual(Chain):
    """Every unit is added to what it read, in one long trunk."""

    unit_ops = 4

    def forward(self, x: Tensor) -> Tensor:
        for unit in self.units:
            x = x + unit(x)
        return x


class Dense(nn.Module):
    """Blocks of eight: every unit reads the concatenation of all before it in its block."""

    unit_ops = 4
    block = 8

    def __init__(self, units: int) -> None:
        super().__init__()
        self.units = nn.ModuleList(_Unit(_WIDTH * (1 + i % self.block)) for i in range(units))

    def forward(self, x: Tensor) -> Tensor:
        parts = [x]
        for i, unit in enumerate(self.units):
            parts = [parts[-1]] if i % self.block == 0 else parts
            parts.append(unit(torch.cat(parts, 1)))
        return parts[-1]


class Branches(nn.Module):
    """One BatchNorm read by every convolution, and one over all that they give."""

    unit_ops = 2

    def __init__(self, units: int) -> None:
        super().__init__()
        self.first, self.last = nn.BatchNorm2d(_WIDTH), nn.BatchNorm2d(_WIDTH * units)
        for norm in (self.first, self.last):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
        self.units = nn.ModuleList(nn.Conv2d(_WIDTH, _WIDTH, 1) for _ in range(units))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(torch.relu(x))
        return self.last(torch.cat([nn.functional.avg_pool2d(unit(x), 1) for unit in self.units], 1))


def _onnx_chain(units: int) -> ir.Model:
    """The chain as an ONNX graph."""
    weights, nodes, last = [], [], "x"
    values = torch.rand(5, _WIDTH) + 0.5
    for i in range(units):
        names = [f"{slot}{i}" for slot in ("weight", "scale", "shift", "mean", "variance")]
        kernel = torch.randn(_WIDTH, _WIDTH, 1, 1).numpy()
        arrays = [kernel, *(values[k].numpy() for k in range(1, 5))]
        weights += [onnx.numpy_helper.from_array(a, n) for a, n in zip(arrays, names, strict=True)]
        nodes.append(helper.make_node("Conv", [last, names[0]], [f"conv{i}"], f"conv{i}"))
        nodes.append(
            helper.make_node("BatchNormalization", [f"conv{i}", *names[1:]], [f"norm{i}"], f"norm{i}")
        )
        nodes.append(helper.make_node("Relu", [f"norm{i}"], [f"relu{i}"], f"relu{i}"))
        last = f"relu{i}"
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, _WIDTH, 4, 4]) for n in ("x", last)]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], weights)
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]))


def growths(repetitions: int = 3) -> Iterator[Growth]:
    """One row for each kind of net; every figure is the least of the repetitions."""
    for cls in (Chain, Residual, Dense, Branches):
        yield _growth(f"eager, {cls.__name__.lower()}", repetitions, lambda n, cls=cls: _eager(cls, n))
    yield _growth("ONNX, chain", repetitions, _onnx)


Observe = Callable[[], tuple[Graph, Callable[[Plan], object]]]
"""Looks at a net: its graph, and what carries a plan out on it."""


def _growth(name: str, repetitions: int, build: Callable[[int], Observe]) -> Growth:
    rows = []
    for size in SIZES:
        rounds = []
        for _ in range(repetitions):
            look = build(size)
            with paused():
                start = time.process_time()
                graph, apply = look()
                observed = time.process_time()
                plan = plan_fold(graph)
                planned = time.process_time()
                apply(plan)
                applied = time.process_time()
            if not plan:
                raise AssertionError(f"{name} with {size} ops: nothing folds")
            rounds.append((observed - start, planned - observed, applied - planned))
        rows.append((len(graph.ops), *(min(times) for times in zip(*rounds, strict=True))))
    ops, observe_, plan_, apply_ = zip(*rows, strict=True)
    return Growth(name, ops, observe_, plan_, apply_)


def _eager(cls: Callable[[int], nn.Module], size: int) -> Observe:
    model = cls(size // cls.unit_ops).eval()  # type: ignore[attr-defined]
    inputs = Inputs((torch.randn(1, _WIDTH, 4, 4),))

    def look() -> tuple[Graph, Callable[[Plan], object]]:
        return observe(model, inputs).graph, lambda plan: apply_fold(model, plan)

    return look


def _onnx(size: int) -> Observe:
    model = _onnx_chain(size // 3)

    def look() -> tuple[Graph, Callable[[Plan], object]]:
        observed = observe_onnx(model)
        return observed.graph, lambda plan: apply_fold_onnx(observed, plan)

    return look
