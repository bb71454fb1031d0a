"""One forward pass in eval mode, walked by torchinfo: shapes, kernel sizes, mult-adds and activations.

torchinfo runs on a stand-in, inside `isolation`. What it cannot see, or counts wrong, is put right here:

- inputs passed by keyword, and the first tensor of a mapping: seen by hooks of our own;
- a forward that fails half-way: caught outside torchinfo, which keeps what it has seen up to there;
- an output that is no tensor, or a scalar: shown to it as its first tensor, of one axis at least;
- mult-adds of a linear layer on more than two axes (it counts one position), of a transposed convolution (it
  counts one for each output), of a convolution without a batch, of an embedding (it multiplies nothing), and
  of a layer with children and weights of its own (left out of its total).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import traceback
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torchinfo
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy

from bntool.graph.inputs import Inputs, named_tensors
from bntool.observe.isolation import Isolation, fresh

_MOST_TENSORS = 100
Size = tuple[int, ...]


@dataclasses.dataclass
class Call:
    """What one module took and gave in its first call, how often it ran, and what all its calls cost.

    A shape is that of the first tensor; `more_inputs` and `more_outputs` count the others. `output_bytes` is
    what it gives to whatever comes next, where it holds parameters.
    """

    input_shape: Size | None = None
    output_shape: Size | None = None
    more_inputs: int = 0
    more_outputs: int = 0
    count: int = 0
    kernel: Size | None = None
    mult_adds: int = 0
    output_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Calls:
    """The calls by qualified name, in the order in which they ended.

    `failure` is one line where the forward pass did not end well, in the module `failed_in`. `input_bytes`
    are those of all input tensors. `biased_into_norm`: the output of a layer with a bias was what a BatchNorm
    read. `gave_up` is why torchinfo does not take the model, which was walked without it: costs are 0 then.
    """

    by_name: dict[str, Call]
    input_bytes: int = 0
    failure: str = ""
    failed_in: str = ""
    biased_into_norm: bool = False
    gave_up: str = ""


def observe_calls(model: nn.Module, inputs: Inputs) -> Calls:
    """Run a copy of the model once, in eval mode, on its own device. Never raises for a bad forward."""
    found = _observed(model, inputs, by_torchinfo=True)
    if found.gave_up:
        found = dataclasses.replace(_observed(model, inputs, by_torchinfo=False), gave_up=found.gave_up)
    return found


def _observed(model: nn.Module, inputs: Inputs, *, by_torchinfo: bool) -> Calls:
    devices = {tensor.device for tensor in itertools.chain(model.parameters(), model.buffers())}
    size = sum(tensor.numel() * tensor.element_size() for tensor in inputs.tensors().values())
    calls: dict[str, Call] = {}
    walk: _Walk | None = None
    failure: Exception | None = None
    try:
        given = fresh(inputs)
        if len(devices) == 1:
            given = given.to(device=devices.pop())
        with Isolation(model).run() as run, torch.no_grad():
            walk = _Walk(run, given, calls)
            walk.add_costs() if by_torchinfo else walk()
            failure = walk.failure
    except Exception as error:  # noqa: BLE001 - whatever a stranger's class does besides its forward
        failure = error
    if walk is None or failure is not None:
        told = _one_line(failure) if failure is not None else ""
        if failure is not None and _is_torchinfos(failure):
            return Calls(calls, size, gave_up=told)
        return Calls(calls, size, told, walk.failed_in if walk is not None else "")
    return Calls(calls, size, biased_into_norm=walk.biased_into_norm)


def _is_torchinfos(error: Exception) -> bool:
    """Whether an exception comes out of torchinfo's own code, which runs in hooks."""
    last = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        last = frame.f_globals.get("__name__", "")
    return str(last).startswith("torchinfo")


class _Walk(nn.Module):
    """The model on its inputs, as torchinfo is given it: it takes nothing, and fails in nobody's face."""

    def __init__(self, run: nn.Module, inputs: Inputs, calls: dict[str, Call]) -> None:
        super().__init__()
        self.run = run
        self.failure: Exception | None = None
        self._inputs = inputs
        self._calls = calls
        self._inside: list[str] = []
        self._kept: dict[int, list[Any]] = {}
        self._biased: dict[int, weakref.ref[Tensor]] = {}
        self.biased_into_norm = False
        self._names = {id(module): name for name, module in run.named_modules()}
        # Before torchinfo's own hooks, which cannot take every output.
        for name, module in _hookable(run):
            module.register_forward_pre_hook(functools.partial(self._enter, name))
            module.register_forward_hook(functools.partial(self._record, name), with_kwargs=True)

    @property
    def failed_in(self) -> str:
        """The innermost module that began and did not end."""
        return self._inside[-1] if self._inside else ""

    def train(self, mode: bool = True) -> _Walk:  # noqa: ARG002 - modes are set already, without anybody's own code
        return self

    def forward(self) -> None:
        for _, module in _hookable(self.run):
            module.register_forward_hook(self._give_back)
        try:
            self.run(*self._inputs.args, **self._inputs.kwargs)
        except Exception as error:  # noqa: BLE001 - whatever a stranger's forward raises
            self.failure = error

    def add_costs(self) -> None:
        """Walk, and add what every call costs; of a layer that runs twice both calls."""
        from torchinfo import torchinfo as home

        try:
            rows = torchinfo.summary(self, input_data=[], verbose=0, mode="eval").summary_list
        finally:  # it keeps every model that it has seen
            getattr(home, "_cached_forward_pass", {}).pop(type(self).__name__, None)
        for row in rows:
            name = self._names.get(row.layer_id)
            call = self._calls.get(name) if name is not None else None
            if name is None or call is None:
                continue
            call.kernel = _kernel(row.kernel_size)
            if row.executed:
                call.mult_adds += _mult_adds(row, call)
                call.output_bytes += row.output_bytes if _own(row.module) else 0

    def _enter(self, name: str, module: nn.Module, args: Any) -> None:
        self._inside.append(name)
        if isinstance(module, _BatchNorm) and args:
            biased = self._biased.get(id(args[0]))
            self.biased_into_norm |= biased is not None and biased() is args[0]

    def _record(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        while self._inside and self._inside.pop() != name:
            pass  # a module whose exception was caught by the one around it
        call = self._calls.setdefault(name, Call())
        call.count += 1
        first, more = _first([output])
        if first is not None and isinstance(module, _ConvNd | nn.Linear) and module.bias is not None:
            self._biased[id(first)] = weakref.ref(first)
        if call.count == 1:
            given, call.more_inputs = _first([*args, *kwargs.values()])
            call.input_shape = None if given is None else tuple(given.shape)
            call.output_shape, call.more_outputs = None if first is None else tuple(first.shape), more
        plain = first.reshape(1) if first is not None and not first.dim() else first
        if plain is output or self.failure is not None:
            return None
        self._kept.setdefault(id(module), []).append(output)
        return torch.zeros(0) if plain is None else plain

    def _give_back(self, module: nn.Module, *_: Any) -> Any:
        """Behind torchinfo's hooks: what the model goes on with is what it made."""
        kept = self._kept.get(id(module))
        return kept.pop() if kept else None


def _hookable(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((n, m) for n, m in model.named_modules() if not isinstance(m, torch.jit.ScriptModule))


def _first(values: Any) -> tuple[Tensor | None, int]:
    """The first tensor of nested ones, and how many more there are."""
    found = [tensor for _, tensor in itertools.islice(named_tensors(values), _MOST_TENSORS)]
    return (found[0], len(found) - 1) if found else (None, 0)


def _one_line(error: Exception) -> str:
    message = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def _kernel(told: Any) -> Size | None:
    sizes = told if isinstance(told, list | tuple) else [told]
    return tuple(sizes) if sizes and all(isinstance(n, int) for n in sizes) else None


# -- what torchinfo counts otherwise ----------------------------------------------------------------------


def _mult_adds(row: Any, call: Call) -> int:
    """Multiply-adds of one call, as torchinfo counts them but for the classes named above."""
    module = row.module
    out: Size = tuple(row.output_size)
    correct = next((count for cls, count in _CORRECTED if isinstance(module, cls)), None)
    if correct is not None:
        return correct(module, tuple(row.input_size) or call.input_shape or (), out)
    if row.is_leaf_layer:
        return int(row.macs)
    own = _own(module)
    held = [own[name] for name in ("weight", "bias", "in_proj_weight", "in_proj_bias") if name in own]
    positions = math.prod(out[:-1]) if "in_proj_weight" in own else math.prod(out[:1])
    return positions * sum(held)


def _own(module: nn.Module) -> Mapping[str, int]:
    """Elements of the parameters that a module holds itself."""
    return {n: p.numel() for n, p in module._parameters.items() if p is not None and not is_lazy(p)}


def _of_linear(module: Any, _: Size, out: Size) -> int:
    if isinstance(module, nn.Bilinear):
        weights: int = module.in1_features * module.in2_features * module.out_features
    else:
        weights = module.in_features * module.out_features
    bias: int = module.out_features if module.bias is not None else 0
    return math.prod(out[:-1]) * (weights + bias)


def _of_convolution(module: Any, given: Size, out: Size) -> int:
    """Each weight once at every place where the kernel stands: of a transposed one, at every input."""
    weights: int = module.in_channels * module.out_channels // module.groups * math.prod(module.kernel_size)
    stands = _places(given if isinstance(module, _ConvTransposeNd) else out, len(module.kernel_size))
    bias: int = module.out_channels if module.bias is not None else 0
    return stands * weights + _places(out, len(module.kernel_size)) * bias


def _places(shape: Size, axes: int) -> int:
    """Positions in all samples of a batch, or in one without."""
    return math.prod(shape[: -axes - 1]) * math.prod(shape[-axes:])


def _of_nothing(*_: Any) -> int:
    return 0


_CORRECTED: tuple[
    tuple[type[nn.Module] | tuple[type[nn.Module], ...], Callable[[Any, Size, Size], int]], ...
] = (
    (_ConvNd, _of_convolution),
    ((nn.Linear, nn.Bilinear), _of_linear),
    ((nn.Embedding, nn.EmbeddingBag), _of_nothing),
)
