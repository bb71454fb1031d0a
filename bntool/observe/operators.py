"""A mode that meets every operator of a forward, also those given functions, such as `torch.cond`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode


class OperatorMode(TorchDispatchMode):
    """Hands every operator to `operator`, and those that are given functions to `with_functions`.

    No compiler sees these forwards. PyTorch would hide the handler from its compiler, which loads that (it
    takes up to a second), and costs every op two more calls.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

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
