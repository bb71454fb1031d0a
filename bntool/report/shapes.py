"""Input and output shapes of every module, seen in one forward pass in eval mode.

Forward hooks on a copy, not torchinfo: the caller's modes, hooks and buffers stay untouched, inputs
passed by keyword are seen, and a forward pass that fails half-way still gives the shapes up to there.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bntool.graph.inputs import Inputs, named_tensors
from bntool.observe.copying import structural_copy

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
    cuda = [device for device in devices if device.type == "cuda"]
    try:
        stand_in = _stand_in(model).eval()
        _hook(stand_in, calls)
        inputs = inputs.map(Tensor.clone)  # a forward may write into its input
        if len(devices) == 1:
            inputs = inputs.to(device=devices.pop())
        with torch.random.fork_rng(devices=cuda), torch.no_grad():
            stand_in(*inputs.args, **inputs.kwargs)
    except Exception as error:  # noqa: BLE001 - whatever a stranger's forward raises
        message = str(error).strip().split("\n")[0]
        return Calls(calls, f"{type(error).__name__}: {message}" if message else type(error).__name__)
    return Calls(calls)


def _stand_in(model: nn.Module) -> nn.Module:
    """A structural copy with buffers of its own, and with its own parameters where these are lazy."""
    copied = structural_copy(model)
    owned: dict[int, Tensor] = {}  # a tensor that stands in two places stays one tensor
    for module in copied.modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        tables: tuple[dict[str, Any], ...] = (module._buffers, module._parameters)
        for tensors in tables:
            for key, tensor in tensors.items():
                if tensor is not None and (is_lazy(tensor) or tensors is module._buffers):
                    tensors[key] = owned.setdefault(id(tensor), _own(tensor))
    return copied


def _own(tensor: Tensor) -> Any:
    # A lazy tensor gets its shape in place, so the original would get it too. It cannot be cloned.
    if is_lazy(tensor):
        lazy_class: Any = type(tensor)
        return lazy_class(device=tensor.device, dtype=tensor.dtype)
    return tensor.detach().clone()


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
