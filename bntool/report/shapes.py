"""Input and output shapes of every module, seen in one forward pass in eval mode.

Forward hooks on a stand-in, not torchinfo: the caller's modes, hooks and buffers stay untouched, inputs
passed by keyword are seen, and a forward pass that fails half-way still gives the shapes up to there.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bntool.graph.inputs import Inputs, named_tensors
from bntool.observe.isolation import Isolation, fresh

_MOST_TENSORS = 100


@dataclasses.dataclass
class Call:
    """What one module took and gave in its first call, and how often it ran.

    A shape is that of the first tensor; `more_inputs` and `more_outputs` count the others.
    """

    input_shape: tuple[int, ...] | None
    output_shape: tuple[int, ...] | None
    more_inputs: int
    more_outputs: int
    count: int = 1


@dataclasses.dataclass(frozen=True)
class Calls:
    """The calls by qualified name; `failure` is one line where the forward pass did not end well."""

    by_name: dict[str, Call]
    failure: str = ""


def observe_calls(model: nn.Module, inputs: Inputs) -> Calls:
    """Run a copy of the model once, in eval mode, on its own device. Never raises for a bad forward."""
    calls: dict[str, Call] = {}
    devices = {tensor.device for tensor in itertools.chain(model.parameters(), model.buffers())}
    try:
        inputs = fresh(inputs)
        if len(devices) == 1:
            inputs = inputs.to(device=devices.pop())
        with Isolation(model).run() as run, torch.no_grad():
            _hook(run, calls)
            run(*inputs.args, **inputs.kwargs)
    except Exception as error:  # noqa: BLE001 - whatever a stranger's forward raises
        message = str(error).strip().split("\n")[0]
        return Calls(calls, f"{type(error).__name__}: {message}" if message else type(error).__name__)
    return Calls(calls)


def _hook(model: nn.Module, calls: dict[str, Call]) -> None:
    for name, module in model.named_modules():
        if not isinstance(module, torch.jit.ScriptModule):
            module.register_forward_hook(_recorder(name, calls), with_kwargs=True)


def _recorder(name: str, calls: dict[str, Call]) -> Callable[[nn.Module, Any, Any, Any], None]:
    def record(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if name in calls:
            calls[name].count += 1
            return
        given, more_inputs = _first_shape([*args, *kwargs.values()])
        got, more_outputs = _first_shape(output)
        calls[name] = Call(given, got, more_inputs, more_outputs)

    return record


def _first_shape(value: Any) -> tuple[tuple[int, ...] | None, int]:
    shapes = [tuple(t.shape) for _, t in itertools.islice(named_tensors(value), _MOST_TENSORS)]
    return (shapes[0], len(shapes) - 1) if shapes else (None, 0)
