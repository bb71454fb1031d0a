"""What every mode that watches or changes a forward op by op is made of."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from torch._C._dynamo import eval_frame
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode,
    _pop_mode,
    _push_mode,
)


class OpMode(TorchDispatchMode):
    """A dispatch mode for forwards that no compiler sees.

    `operator` meets every operator of tensors, `with_functions` those that are given functions, such as
    `map`. Of `torch.cond` the branch that is taken is met, as one of Python's would be.

    PyTorch hides the handler of any other mode from its compiler, by a wrapper that loads it, which takes up
    to a second. `torch.cond` compiles by itself; so the handler is hidden in another way, with all it calls.

    Inside of a mode that only watches, it tells that one of every op and stands in its place meanwhile: each
    mode that an op passes costs as much again.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._watch: WatchMode | None = None
        self._left: list[WatchMode | None] = []

    def __enter__(self) -> Any:
        outer = _get_current_dispatch_mode()
        self._left.append(self._watch)
        if isinstance(outer, WatchMode):
            self._watch = outer
            _pop_mode()
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        watch, self._watch = self._watch, self._left.pop()
        if watch is not None and watch is not self._watch:
            _push_mode(watch)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not isinstance(func, HigherOrderOperator):
            watch = self._watch
            while watch is not None:
                watch.before(func, args, kwargs or {})
                watch = watch._watch
            return self.operator(func, args, kwargs or {})
        if func.name() == "cond":
            predicate, if_true, if_false, operands = args
            with self:
                return (if_true if predicate else if_false)(*operands)
        with self._watch or contextlib.nullcontext():
            return self.with_functions(func, args, kwargs or {})

    def operator(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Carries out one operator of tensors."""
        raise NotImplementedError

    def with_functions(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Carries out one that is given functions; what they do inside is not met."""
        return func(*args, **kwargs)


class WatchMode(OpMode):
    """A mode that looks at every operator before it runs, and changes nothing."""

    def before(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Is shown an operator that is about to run."""
        raise NotImplementedError

    def operator(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        self.before(func, args, kwargs)
        return func(*args, **kwargs)


_SKIPPED = eval_frame._FrameAction.SKIP
eval_frame.set_code_exec_strategy(
    OpMode.__torch_dispatch__.__code__, eval_frame._FrameExecStrategy(_SKIPPED, _SKIPPED)
)
