"""What every mode that watches or changes a forward op by op is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch._C._dynamo import eval_frame
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode


class OpMode(TorchDispatchMode):
    """A dispatch mode for forwards that no compiler sees.

    `operator` meets every operator of tensors, `with_functions` those that are given functions, such as
    `map`. Of `torch.cond` the branch that is taken is met, as one of Python's would be.

    PyTorch hides the handler of any other mode from its compiler, by a wrapper that loads it, which takes up
    to a second. `torch.cond` compiles by itself; so the handler is hidden in another way, with all it calls.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not isinstance(func, HigherOrderOperator):
            return self.operator(func, args, kwargs or {})
        if func.name() == "cond":
            predicate, if_true, if_false, operands = args
            with self:
                return (if_true if predicate else if_false)(*operands)
        return self.with_functions(func, args, kwargs or {})

    def operator(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Carries out one operator of tensors."""
        raise NotImplementedError

    def with_functions(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Carries out one that is given functions; what they do inside is not met."""
        return func(*args, **kwargs)


_SKIPPED = eval_frame._FrameAction.SKIP
eval_frame.set_code_exec_strategy(
    OpMode.__torch_dispatch__.__code__, eval_frame._FrameExecStrategy(_SKIPPED, _SKIPPED)
)
