"""Work in a process of its own, with a time limit: a crash or a hang costs one row, not the sweep."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

OUT_OF_MEMORY = "out of memory"


def in_own_process(
    work: Callable[[], dict[str, Any]], limit: float, memory: int | None = None
) -> dict[str, Any]:
    """What `work` returns, run in a fork of this process with so many seconds of processor time
    (ten times that by the clock), and with so many bytes of memory where that is given.

    A row with `status` and `error` where it raises, is killed, or dies.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        seconds = math.ceil(limit)
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
        if memory is not None:  # of its own: what is mapped from files is not counted
            resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
        warnings.simplefilter("ignore")
        # The descriptors too: libraries in C++ print past sys.stdout.
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - ends with the process
        try:
            row = work()
        except BaseException as error:  # noqa: BLE001 - the row is the report
            last = traceback.extract_tb(error.__traceback__)[-1]
            row = {
                "status": OUT_OF_MEMORY if _no_memory(error) else "failed",
                "error": f"{type(error).__name__}: {error}"[:500],
                "at": f"{Path(last.filename).name}:{last.lineno}",
            }
        with os.fdopen(write, "w") as pipe:
            pipe.write(json.dumps(row))
        os._exit(0)
    os.close(write)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, 10 * limit)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    signal.setitimer(signal.ITIMER_REAL, 0)
    _, status = os.waitpid(child, 0)
    if text:
        found: dict[str, Any] = json.loads(text)
        return found
    late = os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGXCPU)
    return {"status": "time limit" if late else f"died ({status})"}


def _no_memory(error: BaseException) -> bool:
    """Torch has no exception of its own for the memory of the processor."""
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error)
