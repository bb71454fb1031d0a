"""What every mode that watches or changes a forward op by op is made of."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class OpMode(TorchDispatchMode):
    """A dispatch mode for forwards that no compiler sees.

    PyTorch hides the handler of any other from its compiler. That loads the compiler, which takes up to a
    second, and costs every op two more calls.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False
