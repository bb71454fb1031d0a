"""A model run in float64 as it stands: each stored number is widened when an op reads it, and let go behind.

A float64 copy of a model is twice its size, and is read once. A forward that asks for types of its own, or
writes to what it stores, runs on such a copy all the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bntool.graph.inputs import Inputs
from bntool.observe.modules import modules_of
from bntool.observe.watching import OpMode
from bntool.runtime.torch_runner import TorchRunner

_MOST_AT_ONCE = 1 << 20
"""Numbers of a matrix that are widened at a time."""
_MANY_GROUPS = 8
"""From so many groups on, PyTorch's float64 convolution costs more for each group than in arithmetic."""

Runs = list[dict[str, Tensor]]
Numbers = Mapping[int, Callable[[], Tensor]]


@dataclasses.dataclass(frozen=True)
class Unrounded:
    """A model with numbers that were rounded when they were stored, to be run as if they had not been.

    Args:
        model: the model.
        numbers: what gives these numbers in float64, by the identity of the tensor; empty where some are
            not known.
        copy: makes the same model with them in float64.
    """

    model: nn.Module
    numbers: Numbers
    copy: Callable[[], nn.Module]


def run_float64(
    model: nn.Module | Unrounded, inputs_list: Sequence[Inputs], *, parts: bool = False
) -> tuple[Runs, set[torch.dtype]]:
    """The model's outputs in float64 on the CPU, and the narrower dtypes it computed in all the same."""
    found = run_as_it_stands(model, inputs_list, parts=parts)
    return (found, set()) if found is not None else run_in_a_copy(model, inputs_list, parts=parts)


def run_in_a_copy(
    model: nn.Module | Unrounded, inputs_list: Sequence[Inputs], *, parts: bool = False
) -> tuple[Runs, set[torch.dtype]]:
    """The same in a float64 copy of the model."""
    wide = model.copy() if isinstance(model, Unrounded) else model
    seen: set[torch.dtype] = set()
    with _double_by_default():
        runner = TorchRunner(wide, "cpu", torch.float64, parts=parts, within=lambda: _NarrowWatch(seen))
        return [runner.run(inputs) for inputs in inputs_list], seen


def run_as_it_stands(
    model: nn.Module | Unrounded, inputs_list: Sequence[Inputs], *, parts: bool = False
) -> Runs | None:
    """The runs without a copy of the model; None where it takes one, or does not take the inputs."""
    stands, numbers = (model.model, model.numbers) if isinstance(model, Unrounded) else (model, {})
    if not _is_widened_as_it_runs(stands) or (isinstance(model, Unrounded) and not numbers):
        return None
    runner = TorchRunner(stands, "cpu", parts=parts, within=lambda: _widened(numbers))
    try:
        with _double_by_default():
            return [runner.run(inputs.to(dtype=torch.float64)) for inputs in inputs_list]
    except Exception:  # noqa: BLE001 - whatever a forward raises that it may not raise in a copy
        return None


@contextlib.contextmanager
def _double_by_default() -> Iterator[None]:
    """A tensor that forward makes without a dtype is float64 too."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


@contextlib.contextmanager
def _widened(numbers: Numbers) -> Iterator[None]:
    """Below autograd ops arrive whole, before PyTorch compares the types of what they are given."""
    with torch._C._AutoDispatchBelowAutograd(), _Widened(numbers):
        yield


def _is_widened_as_it_runs(model: nn.Module) -> bool:
    """Whether the model holds plain real numbers on the CPU, some of them narrower than float64."""
    slots = [slots for module in modules_of(model) for slots in (module._parameters, module._buffers)]
    tensors = [tensor for each in slots for tensor in each.values() if tensor is not None]
    plain = all(t.device.type == "cpu" and not t.is_complex() and not t.is_quantized for t in tensors)
    return plain and any(_is_narrow(t) for t in tensors)


class _NarrowWatch(OpMode):
    """Notes the floating dtypes below float64 that ops produce."""

    def __init__(self, seen: set[torch.dtype]) -> None:
        super().__init__()
        self._seen = seen

    def operator(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        result = func(*args, **kwargs)
        self._seen.update(leaf.dtype for leaf in _leaves(result) if _is_narrow(leaf))
        return result

    with_functions = operator


class _Narrows(Exception):
    """The forward makes or writes narrower numbers of its own."""


class _Widened(OpMode):
    """Hands every op its narrower numbers in float64. A view of narrow numbers stays a view."""

    def __init__(self, numbers: Numbers) -> None:
        super().__init__()
        self._numbers = numbers

    def operator(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        views, written, kind = _traits(func)
        if written and any(_is_narrow(leaf) for leaf in _written(func, written, args, kwargs)):
            raise _Narrows
        with torch._C._DisableTorchDispatch():  # what is done here concerns no other mode
            if self._numbers:
                args = [self._unrounded(arg) for arg in args]
            if not views or written:
                fast = _FASTER.get(kind)
                if fast is not None and not kwargs and (result := fast(*args)) is not None:
                    return result
                args = [_wide(arg) for arg in args]
                kwargs = {name: _wide(arg) for name, arg in kwargs.items()}
        result = func(*args, **kwargs)
        if any(map(_is_narrow, _leaves(result))) and not any(map(_is_narrow, args)):
            raise _Narrows
        return result

    def _unrounded(self, value: Any) -> Any:
        """The numbers that stand behind a tensor, where they are known; in a list too."""
        if isinstance(value, list | tuple):
            return type(value)(self._unrounded(item) for item in value)
        numbers = self._numbers.get(id(value))
        return value if numbers is None else numbers()


@functools.cache
def _traits(func: Any) -> tuple[bool, tuple[str, ...], str]:
    """Whether all that an op returns are views; the arguments that it writes to; and its name."""
    schema = func._schema
    views = bool(schema.returns) and all(r.alias_info is not None for r in schema.returns)
    written = tuple(a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write)
    return views, written, schema.name.partition("::")[2]


def _written(func: Any, names: tuple[str, ...], args: Any, kwargs: Any) -> Iterator[Any]:
    bound = {**dict(zip((a.name for a in func._schema.arguments), args, strict=False)), **kwargs}
    for name in names:
        yield from _leaves(bound.get(name))


def _leaves(value: Any) -> tuple[Any, ...] | list[Any]:
    return value if isinstance(value, tuple | list) else (value,)


def _is_narrow(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64


def _wide(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() and value.dtype != torch.float64 else value
    if isinstance(value, list | tuple):
        return type(value)(_wide(item) for item in value)
    return value


# -- two ops by ways of their own ----------------------------------------------------------------------------


def _conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] | str = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
) -> Tensor | None:
    """A convolution of many groups as one batch of matrix products, where its map is smaller than they."""
    if groups < _MANY_GROUPS or x.dim() != 4 or isinstance(padding, str):
        return None
    taps = tuple(weight.shape[2:])
    stride, padding, dilation = (tuple(n) * (3 - len(n)) for n in (stride, padding, dilation))
    sides = zip(x.shape[2:], padding, dilation, taps, stride, strict=True)
    height, width = ((n + 2 * pad - step * (k - 1) - 1) // jump + 1 for n, pad, step, k, jump in sides)
    if height * width > groups:
        return None
    columns = F.unfold(_wide(x), taps, dilation, padding, stride).view(len(x), groups, -1, height * width)
    out = torch.matmul(_wide(weight).reshape(groups, weight.shape[0] // groups, -1), columns)
    out = out.view(len(x), -1, height, width)
    return out if bias is None else out + _wide(bias).view(1, -1, 1, 1)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """A linear layer with a large narrow weight, of which some rows are widened at a time."""
    if weight.numel() <= _MOST_AT_ONCE or weight.dim() != 2 or not _is_narrow(weight):
        return None
    x = _wide(x)
    rows = max(1, _MOST_AT_ONCE // weight.shape[1])
    out = torch.cat([F.linear(x, part.double()) for part in weight.split(rows)], -1)
    return out if bias is None else out.add_(_wide(bias))


_FASTER: dict[str, Any] = {"conv2d": _conv2d, "linear": _linear}
