"""Twelve ways to break a copy of a model, or the file it was exported to, and where each of them sits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import nn


def network() -> nn.Module:
    """Two convolutions with BatchNorm, and a square linear layer before the head."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential()
        model.add_module("conv1", nn.Conv2d(3, 8, 3, padding=1, bias=False))
        model.add_module("bn1", nn.BatchNorm2d(8))
        model.add_module("relu1", nn.ReLU())
        model.add_module("conv2", nn.Conv2d(8, 8, 3, padding=1))
        model.add_module("bn2", nn.BatchNorm2d(8))
        model.add_module("relu2", nn.ReLU())
        model.add_module("pool", nn.AdaptiveAvgPool2d(1))
        model.add_module("flat", nn.Flatten())
        model.add_module("square", nn.Linear(8, 8))
        model.add_module("head", nn.Linear(8, 5))
        for bn in (model.bn1, model.bn2):
            nn.init.normal_(bn.running_mean, 0, 0.3)
            nn.init.uniform_(bn.running_var, 0.5, 2.0)
            nn.init.uniform_(bn.weight, 0.5, 1.5)
            nn.init.normal_(bn.bias, 0, 0.2)
    return model.eval()


class AlwaysTraining(nn.BatchNorm2d):
    """A BatchNorm that normalises by the batch, whatever mode it is in."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)


class Overflowing(nn.Conv2d):
    """A convolution whose result does not fit into float16, and goes through it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (super().forward(x) * 1e6).half().float() / 1e6


class NotANumber(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = super().forward(x)
        result[0, 2] = float("nan")
        return result


def _retyped(name: str, kind: type[nn.Module]) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        model.get_submodule(name).__class__ = kind

    return change


def _tensor(name: str, edit: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        held = model.state_dict()[name]
        held.copy_(edit(held.clone()))

    return change


def _one_off(tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(-1)[0] += 1e-3
    return tensor


def _swapped(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[[1, 0, *range(2, len(tensor))]]


def _other_padding(model: nn.Module) -> None:
    model.conv2.padding_mode = "reflect"


def _other_eps(model: nn.Module) -> None:
    model.bn2.eps = 1e-3


MODULES: dict[str, tuple[Callable[[nn.Module], None], str]] = {
    "one weight off by 1e-3": (_tensor("conv2.weight", _one_off), "conv2"),
    "two channels swapped": (_tensor("conv1.weight", _swapped), "conv1"),
    "bias forgotten": (_tensor("conv2.bias", torch.zeros_like), "conv2"),
    "wrong eps": (_other_eps, "bn2"),
    "BatchNorm in train mode": (_retyped("bn1", AlwaysTraining), "bn1"),
    "wrong padding": (_other_padding, "conv2"),
    "float16 overflow": (_retyped("conv2", Overflowing), "conv2"),
    "NaN in one output": (_retyped("head", NotANumber), "head"),
    "transposed weight": (_tensor("square.weight", lambda t: t.T), "square"),
    "stale running statistics": (_tensor("bn2.running_mean", torch.zeros_like), "bn2"),
}
"""What is broken, how, and the layer that it sits in."""


def broken_module(model: nn.Module, how: str) -> nn.Module:
    candidate = copy.deepcopy(model)
    MODULES[how][0](candidate)
    return candidate


def _stored(name: str, edit: Callable[[np.ndarray], np.ndarray]) -> Callable[[onnx.ModelProto], None]:
    def change(file: onnx.ModelProto) -> None:
        (tensor,) = (t for t in file.graph.initializer if t.name == name)
        array = np.ascontiguousarray(edit(numpy_helper.to_array(tensor).copy()))
        tensor.CopyFrom(numpy_helper.from_array(array, name))

    return change


def _np_nan(array: np.ndarray) -> np.ndarray:
    array.reshape(-1)[2] = np.nan
    return array


def _np_one_off(array: np.ndarray) -> np.ndarray:
    array.reshape(-1)[0] += 1e-3
    return array


def _attribute(node_name: str, **values: object) -> Callable[[onnx.ModelProto], None]:
    def change(file: onnx.ModelProto) -> None:
        (node,) = (n for n in file.graph.node if n.name == node_name)
        kept = [a for a in node.attribute if a.name not in values]
        del node.attribute[:]
        node.attribute.extend([*kept, *(helper.make_attribute(k, v) for k, v in values.items())])

    return change


def _through_float16(file: onnx.ModelProto) -> None:
    """The second convolution's result goes through float16, scaled so that it does not fit."""
    graph = file.graph
    at, node = next((i, n) for i, n in enumerate(graph.node) if n.name == "conv2/Conv")
    result = node.output[0]
    node.output[0] = "wide"
    graph.initializer.append(numpy_helper.from_array(np.float32(1e6), "large"))
    more = [
        helper.make_node("Mul", ["wide", "large"], ["scaled"], name="conv2/Mul"),
        helper.make_node("Cast", ["scaled"], ["narrow"], name="conv2/Cast", to=onnx.TensorProto.FLOAT16),
        helper.make_node("Cast", ["narrow"], ["back"], name="conv2/Cast_1", to=onnx.TensorProto.FLOAT),
        helper.make_node("Div", ["back", "large"], [result], name="conv2/Div"),
    ]
    for offset, added in enumerate(more, 1):
        graph.node.insert(at + offset, added)


def _output_dropped(file: onnx.ModelProto) -> None:
    del file.graph.output[-1]


FILES: dict[str, tuple[Callable[[onnx.ModelProto], None], str]] = {
    "one weight off by 1e-3": (_stored("conv2.weight", _np_one_off), "conv2/Conv"),
    "two channels swapped": (_stored("conv1.weight", lambda a: a[[1, 0, *range(2, 8)]]), "conv1/Conv"),
    "bias forgotten": (_stored("conv2.bias", np.zeros_like), "conv2/Conv"),
    "wrong eps": (_attribute("bn2/BatchNormalization", epsilon=1e-3), "bn2/BatchNormalization"),
    "BatchNorm in train mode": (_attribute("bn1/BatchNormalization", training_mode=1), ""),
    "wrong padding": (_attribute("conv2/Conv", pads=[2, 2, 0, 0]), "conv2/Conv"),
    "float16 overflow": (_through_float16, "conv2/Div"),
    "NaN in one output": (_stored("head.bias", _np_nan), "head/Gemm"),
    "one node's attribute changed": (_attribute("head/Gemm", alpha=1.01), "head/Gemm"),
    "transposed weight": (_stored("square.weight", lambda a: a.T), "square/Gemm"),
    "stale running statistics": (_stored("bn2.running_mean", np.zeros_like), "bn2/BatchNormalization"),
}  # fmt: skip
"""What is broken, how, and the node that it sits in; empty where ONNX Runtime does not run such a file."""


def broken_file(path: Path, how: str, target: Path) -> Path:
    file = onnx.load(path)
    FILES[how][0](file)
    onnx.save(file, target)
    return target
