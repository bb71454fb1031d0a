"""The processes that work together, on torch.distributed. One process alone is a world of its own."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from typing import TypeVar

from torch import Tensor, distributed

from bntool.core.errors import BntoolError, ProcessError

_Value = TypeVar("_Value")
_SIGNS = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
"""What torch.distributed's errors say; gloo's come out of a backward as a bare RuntimeError."""


@dataclasses.dataclass(frozen=True)
class World:
    """This process: rank `rank` of `size`. What all of them must call together is said to be collective.

    A collective raises `ProcessError` where another process has ended or does not answer in time.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> World:
        """The default process group, or one process alone where there is none."""
        if distributed.is_available() and distributed.is_initialized():
            return cls(distributed.get_rank(), distributed.get_world_size())
        return cls()

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def share(self, batch: Tensor) -> Tensor:
        """This rank's part of the sample numbers of a batch."""
        return batch[self.rank :: self.size]

    def reduce(self, sums: Tensor) -> Tensor:
        """Sums over the samples of this rank -> sums over those of all ranks (CPU tensors). Collective."""
        if self.size == 1:
            return sums
        whole = sums.clone()
        with _others_needed():
            distributed.all_reduce(whole)
        return whole

    def gather(self, value: _Value) -> list[_Value]:
        """The values of all ranks, in their order. Collective."""
        if self.size == 1:
            return [value]
        values = [value] * self.size
        with _others_needed():
            distributed.all_gather_object(values, value)
        return values

    def told(self, value: _Value) -> _Value:
        """What rank 0 holds. Collective."""
        if self.size == 1:
            return value
        values = [value]
        with _others_needed():
            distributed.broadcast_object_list(values, src=0)
        return values[0]

    def spread(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors with those of rank 0. Collective."""
        if self.size == 1:
            return
        with _others_needed():
            for tensor in tensors:
                distributed.broadcast(tensor, src=0)


def lost_process(error: Exception) -> ProcessError | None:
    """What an error of torch.distributed means; None for any other error."""
    text = str(error).strip()
    if not isinstance(error, distributed.DistError) and not any(sign in text for sign in _SIGNS):
        return None
    return ProcessError(
        "another process of the job has ended, or does not answer",
        where=text.splitlines()[0].partition(". ")[0] if text else type(error).__name__,
        next_step="torchrun's report names the process that failed first; then run the same command again",
    )


@contextlib.contextmanager
def _others_needed() -> Iterator[None]:
    try:
        yield
    except BntoolError:
        raise
    except Exception as error:
        lost = lost_process(error)
        if lost is None:
            raise
        raise lost from error
