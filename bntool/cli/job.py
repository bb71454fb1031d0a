"""The processes that torchrun starts: find each other, speak with one voice, end together. No torch here."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

from bntool.core.errors import DeviceError, ProcessError, UsageError

if TYPE_CHECKING:
    from bntool.runtime.process_group import World

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_FAILED = "bntool/failed"
_joined: list[Any] = []
"""The store that all processes of the job share, once they have found each other."""


@contextlib.contextmanager
def joined(timeout: float, device: str = "cpu") -> Iterator[World]:
    """The processes of the job that this one belongs to by its environment; itself alone without one.

    Sums and texts go over gloo, tensors on `device` cuda over nccl, where each process takes the GPU of its
    LOCAL_RANK. `timeout` in seconds holds for finding each other and for every wait after. Meanwhile SIGTERM,
    with which torchrun ends a job that one process has failed, is an error like others: files are left whole.

    Raises:
        ProcessError: the others were not found in time; later, the job is told to end.
        DeviceError: there are fewer GPUs than processes on this machine.
    """
    from bntool.runtime.process_group import World

    if not _in_job():
        yield World()
        return
    from torch import distributed
    from torch.distributed.rendezvous import rendezvous

    cuda = device.startswith("cuda")
    if cuda:
        _take_gpu(device)
    span = timedelta(seconds=timeout)
    where = f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}, " + ":".join(
        os.environ[name] for name in _VARIABLES[2:]
    )
    try:
        store, rank, size = next(rendezvous("env://", timeout=span))
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=span)
    except (RuntimeError, ValueError, OSError) as error:
        told = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ProcessError(
            f"the processes of the job do not find each other: {told}",
            where=where,
            next_step="look at torchrun's --nnodes and --rdzv-endpoint on each machine, or raise --timeout",
        ) from error
    _joined.append(store)
    before = signal.signal(signal.SIGTERM, _told_to_end)
    yield World(rank, size)
    # Not after an error: the others would see this process go before it has said why.
    signal.signal(signal.SIGTERM, before)
    _joined.clear()
    distributed.destroy_process_group()


def first_to_fail() -> bool:
    """Whether this process is to tell of its failure: one of a job does, and its cause is the first.

    Before the processes have found each other it is the first of each machine.
    """
    if _joined:
        try:
            return bool(_joined[0].add(_FAILED, 1) == 1)
        except Exception:  # noqa: BLE001 - whoever kept the store is gone, and the failure must be told
            return True
    return not _in_job() or os.environ.get("LOCAL_RANK", "0") == "0"


def require_alone(command: str, but: Sequence[str]) -> None:
    """Raise `UsageError` where torchrun started several processes of `command`, which only `but` are for."""
    if _in_job():
        raise UsageError(
            f"{command} runs in one process, and torchrun started {os.environ['WORLD_SIZE']}",
            next_step="run it without torchrun (or unset RANK and WORLD_SIZE); several processes share the "
            f"work of {' and '.join(but)}",
        )


def _in_job() -> bool:
    return all(os.environ.get(name) for name in _VARIABLES) and os.environ["WORLD_SIZE"] != "1"


def _take_gpu(device: str) -> None:
    import torch

    number, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if device != "cuda" or number >= count:
        raise DeviceError(
            f"process {number} of this machine has no GPU of its own: {count} here, --device {device}",
            next_step="give --nproc-per-node as many processes as there are GPUs, and --device cuda; or cpu",
        )
    torch.cuda.set_device(number)


def _told_to_end(_number: int, _frame: Any) -> NoReturn:
    raise ProcessError(
        "the job was told to end (SIGTERM)",
        next_step="torchrun's report names the process that failed first; then run the same command again",
    )
