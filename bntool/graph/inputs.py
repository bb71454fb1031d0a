"""Example inputs, and flattening of whatever a model takes or returns into named tensors."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from bntool.core.errors import CheckFailed, UsageError
from bntool.graph.drawing import Draw

_MAX_DEPTH = 32


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The positional and keyword inputs of one forward call. `origin` says where they come from."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    origin: str = "given"

    @classmethod
    def of(cls, example_inputs: Any) -> Inputs:
        """Accept `Inputs`, a tensor, a tuple of positional inputs, or `(args, kwargs)`."""
        if isinstance(example_inputs, Inputs):
            return example_inputs
        if isinstance(example_inputs, Tensor):
            return cls((example_inputs,))
        if isinstance(example_inputs, tuple | list):
            if (
                len(example_inputs) == 2
                and isinstance(example_inputs[0], tuple)
                and isinstance(example_inputs[1], Mapping)
            ):
                return cls(example_inputs[0], dict(example_inputs[1]))
            return cls(tuple(example_inputs))
        raise UsageError(
            f"example_inputs is a {type(example_inputs).__name__}",
            next_step="pass a tensor, a tuple of positional inputs, or (args, kwargs)",
        )

    def named_for(self, forward: Callable[..., Any]) -> Inputs:
        """The same, by the names that `forward` cannot do without where it takes nothing by position."""
        try:
            parameters = inspect.signature(forward).parameters.values()
        except ValueError:  # a method of TorchScript tells none
            return self
        keywords = [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in self.kwargs]
        needed = [p.name for p in keywords if p.default is p.empty] or [p.name for p in keywords]
        by_position = any(p.kind not in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in parameters)
        if by_position or len(self.args) > len(needed):
            return self
        named = dict(zip(needed, self.args, strict=False))
        return dataclasses.replace(self, args=(), kwargs={**named, **self.kwargs})

    def map(self, fn: Any) -> Inputs:
        """The same structure with `fn` applied to every tensor."""
        return dataclasses.replace(
            self,
            args=tuple(map_tensors(a, fn) for a in self.args),
            kwargs={k: map_tensors(v, fn) for k, v in self.kwargs.items()},
        )

    def to(self, *, device: Any = None, dtype: torch.dtype | None = None) -> Inputs:
        """Move every tensor to `device`; cast the floating-point ones to `dtype`."""

        def move(t: Tensor) -> Tensor:
            return t.to(device=device, dtype=dtype if dtype and t.is_floating_point() else None)

        return self.map(move)

    def batched(self, seed: int = 0) -> Callable[[int], Inputs | None]:
        """Seeded inputs like these, of any batch size; nested ones (images in a list) only as they are."""
        if self.nested:
            return lambda batch: self if batch == 1 else None
        return lambda batch: self.rebatched(batch, seed)

    def rebatched(self, batch: int, seed: int = 0) -> Inputs:
        """Seeded random inputs like these with a leading axis of `batch`.

        Floating tensors are drawn from N(0, 1), integer ones resampled from the values they hold.
        Scalars and 0-d tensors stay.
        """
        draw = Draw(seed)
        return self.map(lambda t: draw.like(t, (batch, *t.shape[1:])) if t.dim() else t)

    @property
    def nested(self) -> bool:
        """Whether they lie in a list (the images of a detection model) or a dict: no axis is the batch's."""
        return any(isinstance(a, list | tuple | dict) for a in (*self.args, *self.kwargs.values()))

    def redrawn(self, seed: int = 0) -> Inputs:
        """The same with other floating numbers, seeded, from N(0, 1)."""
        draw = Draw(seed)
        return self.map(lambda t: draw.like(t) if t.is_floating_point() else t)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by a stable name: `input` or `input_0`, `input_1`, keyword names, nested paths."""
        single = len(self.args) == 1
        named = {("input" if single else f"input_{i}"): a for i, a in enumerate(self.args)}
        named.update(self.kwargs)
        return dict(named_tensors(named))

    def shapes(self) -> str:
        """`1x3x224x224` for each tensor, joined by commas."""
        return ", ".join("x".join(map(str, t.shape)) or "scalar" for t in self.tensors().values())


def map_tensors(value: Any, fn: Any) -> Any:
    """Apply `fn` to every tensor in nested tuples, lists, mappings and dataclasses; leave the rest."""
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(v, fn) for v in value))
    if isinstance(value, tuple | list):
        return type(value)(map_tensors(v, fn) for v in value)
    if isinstance(value, dict):
        return {k: map_tensors(v, fn) for k, v in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        made = copy.copy(value)
        for field in dataclasses.fields(value):
            object.__setattr__(made, field.name, map_tensors(getattr(value, field.name), fn))
        return made
    return value


def plain(value: Any, depth: int = 0) -> Any:
    """The tensors as tuples, lists and dicts, each under the name that `named_tensors` gives it."""
    if isinstance(value, Tensor):
        return value
    if depth > _MAX_DEPTH or isinstance(value, type):
        return None
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return {key: plain(item, depth + 1) for key, item in zip(value._fields, value, strict=True)}
    if isinstance(value, tuple | list):
        return type(value)(plain(item, depth + 1) for item in value)
    items = value if isinstance(value, Mapping) else getattr(value, "__dict__", None)
    return {str(k): plain(v, depth + 1) for k, v in items.items()} if items else None


def named_tensors(value: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in a nested structure with a stable dotted name; each container visited in order.

    Tuples, lists, mappings, named tuples, and plain objects that hold tensors as attributes
    (dataclasses, `ModelOutput`-like classes).
    """
    if isinstance(value, Tensor):
        yield name or "output", value
        return
    if depth > _MAX_DEPTH or value is None or isinstance(value, str | bytes | int | float | torch.nn.Module):
        return

    def child(key: Any) -> str:
        return f"{name}.{key}" if name else str(key)

    if isinstance(value, tuple) and hasattr(value, "_fields"):
        items: Any = zip(value._fields, value, strict=True)
    elif isinstance(value, tuple | list):
        items = ((f"output_{i}" if not name else i, v) for i, v in enumerate(value))
    elif isinstance(value, Mapping):
        items = value.items()
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        items = vars(value).items()
    else:
        return
    for key, item in items:
        yield from named_tensors(item, child(key), depth + 1)


def outputs_of(value: Any) -> dict[str, Tensor]:
    """The tensors a model returned, by stable name. An empty result is an error, never a pass."""
    found = dict(named_tensors(value))
    if not found:
        raise CheckFailed(
            f"the model returned no tensor (a {type(value).__name__})",
            next_step="wrap the model so that forward returns its tensors",
        )
    return found
