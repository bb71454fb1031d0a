"""A mode that meets every operator of a forward, also those given functions, such as `torch.cond`."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode

Asked = ParamSpec("Asked")
Given = TypeVar("Given")


def compiler_is_loaded() -> bool:
    return "torch._dynamo" in sys.modules


def again_with_the_compiler(run: Callable[Asked, Given]) -> Callable[Asked, Given]:
    """What runs a forward, run once more where that failed and has loaded the compiler meanwhile."""

    @functools.wraps(run)
    def ran(*args: Asked.args, **kwargs: Asked.kwargs) -> Given:
        there = compiler_is_loaded()
        try:
            return run(*args, **kwargs)
        except Exception:
            if there or not compiler_is_loaded():
                raise
            return run(*args, **kwargs)

    return ran


class OperatorMode(TorchDispatchMode):
    """Hands every operator to `operator`, and those that are given functions to `with_functions`.

    PyTorch hides the handler of a mode from its compiler, and loads that to do so, which takes up to a
    second. This one is hidden once the compiler is there; a forward that loads it, for `torch.cond`, is run
    again.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        if compiler_is_loaded():
            _hide()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, HigherOrderOperator):
            return self.operator(func, args, kwargs)
        if func.name() == "cond":
            # the branch that is taken is met as one of Python's would be
            predicate, if_true, if_false, operands = args
            with self:
                return (if_true if predicate else if_false)(*operands)
        return self.with_functions(func, args, kwargs)

    def operator(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Carries out one operator of tensors."""
        raise NotImplementedError

    def with_functions(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Carries out one that is given functions; what they do inside is not met."""
        return func(*args, **kwargs)


@functools.cache
def _hide() -> None:
    hidden: Any = torch._dynamo.disable(OperatorMode.__torch_dispatch__)
    OperatorMode.__torch_dispatch__ = hidden  # type: ignore[method-assign]
