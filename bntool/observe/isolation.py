"""The one place where a user's model is run: on a stand-in, with everything a run may leave behind put back.

A stand-in shares the parameters with the original, and closures lead where they lead. So every write to a
tensor of the original is seen by a dispatch mode and undone, and so is what a parameter points to, its
gradient and flags; what code can reach outside the model is noted before (`global_state`), and the random
states and torch's defaults are put back. It holds after an exception and an interrupt too.
"""

from __future__ import annotations

import contextlib
import functools
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bntool.core.errors import ObserveError
from bntool.graph.inputs import Inputs
from bntool.observe.global_state import LARGEST_COPIED, Surroundings
from bntool.observe.modules import modules_of
from bntool.observe.settings import settings_kept
from bntool.observe.side_effects import Kept, random_state_kept, undeclared_writes
from bntool.observe.stand_in import StandIn, set_each, set_modes, stand_in
from bntool.observe.watching import WatchMode

SEED = 0
"""A run that draws random numbers must draw the same ones every time, or two runs cannot be compared."""


class Isolation:
    """Runs of one model that leave no trace, each from the model's state as it is now.

    Args:
        model: the user's own.
        own_parameters: whether each run gets parameters of its own; for runs that are not watched.
        writes: tensors outside that a watched run wrote to; for runs that are not.

    `notes` says what could not be isolated; `written` are the shared tensors that runs wrote to.
    """

    def __init__(
        self, model: nn.Module, *, own_parameters: bool = False, writes: Sequence[Tensor] = ()
    ) -> None:
        self.model = model
        self.notes: list[str] = []
        self.written: list[Tensor] = []
        self._writes = writes
        self._own_parameters = own_parameters

    @contextlib.contextmanager
    def run(self, *, watched: bool = True, in_eval: bool = True) -> Iterator[nn.Module]:
        """The module to call meanwhile.

        Args:
            watched: whether writes to shared tensors are looked for, which costs some microseconds an op.
            in_eval: whether the module is in eval mode; else it is in the model's own modes, for the caller
                to set. The model itself is in eval mode meanwhile, for a closure may lead to it.
        """
        copied = self._stand_in()
        modules = list(modules_of(self.model))
        surroundings = Surroundings(modules, copied.shared)
        kept = Kept(modules)
        kept.add(surroundings.tensors)
        for tensor in self._writes:
            kept.before_write(tensor)
        self._say(surroundings.notes)
        with contextlib.ExitStack() as stack:
            stack.callback(self._notice, kept)
            stack.callback(kept.restore)
            stack.callback(surroundings.restore)
            stack.enter_context(_parameters_kept(modules))
            stack.enter_context(_modes_kept(modules))
            stack.enter_context(settings_kept())
            stack.enter_context(_not_compiled(modules))
            stack.enter_context(random_state_kept())
            set_each(modules, training=False)
            if in_eval:
                set_modes(copied.module, training=False)
            if watched:
                stack.enter_context(_Watch(kept))
            yield copied.module

    def _stand_in(self) -> StandIn:
        if getattr(self.model, "leaves_no_trace", False):
            return StandIn(self.model)
        try:
            return stand_in(self.model, own_parameters=self._own_parameters)
        except ObserveError as error:
            self._say([f"the model itself was run, since {error.what}"])
            return StandIn(self.model, ((type(self.model).__name__, self.model),))

    def _say(self, notes: list[str]) -> None:
        self.notes += [note for note in notes if note not in self.notes]

    def _notice(self, kept: Kept) -> None:
        self.written += [tensor for tensor, _ in kept.copies.values()]


def fresh(inputs: Inputs) -> Inputs:
    """The inputs in memory of their own, for one run: a forward may write to them."""
    return inputs.map(lambda tensor: tensor.detach().clone().requires_grad_(tensor.requires_grad))


@contextlib.contextmanager
def surroundings_kept(model: nn.Module) -> Iterator[None]:
    """What copies of the model do to what lies around it is put back: globals, attributes of its classes.

    For trainings, which are not watched op by op: a tensor around is copied first, unless it is very large.
    """
    modules = list(modules_of(model))
    surroundings = Surroundings(modules)
    kept = Kept(())
    kept.add(tensor for tensor in surroundings.tensors if tensor.nbytes <= LARGEST_COPIED)
    for tensor in surroundings.tensors:
        kept.before_write(tensor)
    with _parameters_kept(modules), _modes_kept(modules), settings_kept():
        try:
            yield
        finally:
            surroundings.restore()
            kept.restore()


@contextlib.contextmanager
def _modes_kept(modules: Sequence[nn.Module]) -> Iterator[None]:
    before = [(module, module.training) for module in modules if hasattr(module, "training")]
    try:
        yield
    finally:
        for module, training in before:
            if module.training != training:
                module.training = training


@contextlib.contextmanager
def same_random_numbers(seed: int) -> Iterator[None]:
    """Meanwhile the generators of PyTorch, Python and NumPy stand where this seed puts them."""
    with random_state_kept():
        if torch.accelerator.is_available():
            torch.manual_seed(seed)
        else:  # a hundred times as fast: nothing is noted for a device that may come
            torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002  what models use
        yield


@contextlib.contextmanager
def _not_compiled(modules: Sequence[nn.Module]) -> Iterator[None]:
    """What torch.compile made runs as it was written meanwhile, so that its layers can be seen."""
    # asked for only where there is any: torch's compiler takes a second to load
    if not any(type(module).__name__ == "OptimizedModule" for module in modules):
        yield
        return
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        # of hooks that fire twice, which nothing here counts
        warnings.filterwarnings(
            "ignore", message=r"Using `torch\.compile\(module\)` when there are global hooks"
        )
        yield


@contextlib.contextmanager
def _parameters_kept(modules: Sequence[nn.Module]) -> Iterator[None]:
    """What `data =`, `grad =`, `requires_grad_()` and the like do to a parameter, which no dispatch shows."""
    before = [
        (p, p.detach(), p.requires_grad, _grad_of(p), dict(vars(p)))
        for p in {id(p): p for module in modules for p in module._parameters.values()}.values()
        if p is not None and not is_lazy(p)
    ]
    try:
        yield
    finally:
        for parameter, data, trains, grad, attributes in before:
            _put_back(parameter, data, trains, grad, attributes)


def _put_back(parameter: Tensor, data: Tensor, trains: bool, grad: Tensor | None, attributes: Any) -> None:
    if not _is_same_memory(parameter, data):
        parameter.data = data
    if parameter.requires_grad != trains:
        parameter.requires_grad_(trains)
    if _grad_of(parameter) is not grad:
        parameter.grad = grad
    if vars(parameter) != attributes:
        vars(parameter).clear()
        vars(parameter).update(attributes)


def _grad_of(parameter: Tensor) -> Tensor | None:
    """Its gradient; TorchScript has parameters that are no leaves, and torch warns of asking them."""
    return parameter.grad if parameter.is_leaf else None


def _is_same_memory(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
        return False
    try:
        return one.data_ptr() == other.data_ptr() and one.stride() == other.stride()
    except RuntimeError:  # a kind of tensor without memory of its own
        return True


class _Watch(WatchMode):
    """Keeps what a run is about to write to, where it belongs to somebody else."""

    def __init__(self, kept: Kept) -> None:
        super().__init__()
        self._kept = kept

    def before(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        written = _written(func)
        if written:
            name, schema = _name(func), func._schema
            bound = {**dict(zip((a.name for a in schema.arguments), args, strict=False)), **kwargs}
            for argument in undeclared_writes(name, bound) if written == _DEPENDS else written:
                for tensor in _tensors_in(bound.get(argument)):
                    self._kept.before_write(tensor)


_DEPENDS = ("?",)
"""Whether an operator writes, and to what, depends on how it is called."""


@functools.cache
def _written(func: Any) -> tuple[str, ...]:
    """The arguments that an operator writes to."""
    found = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return tuple(found) or (_DEPENDS if undeclared_writes(_name(func), {"training": True}) else ())


def _name(func: Any) -> str:
    return str(func._schema.name).rpartition("::")[2]


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors_in(item)
