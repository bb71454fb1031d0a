"""Whether ONNX Runtime survives a file: tried in a process of its own, which may die in this one's stead.

Some valid files end ONNX Runtime by a signal, which no `except` sees: the process would be gone, without a
word. The process is started once and asked for each file; a file that it survived is not tried again.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bntool.core.errors import ExportError

Shapes = Mapping[str, Sequence["int | None"]]
_START = (
    "import json, runpy, sys; sys.path[:] = json.loads(sys.argv[2]);"
    " runpy.run_path(sys.argv[1], run_name='__main__')"
)
"""Imports as here, and nothing from the folder that it is started in."""
Namer = Callable[[Path, Callable[[Path], bool]], str]
_ODD = "ends ONNX Runtime itself"


def require_survival(path: str | Path, shapes: Shapes | None = None, name_node: Namer | None = None) -> None:
    """Raise `ExportError` where ONNX Runtime does not survive running the file.

    Args:
        path: the file.
        shapes: of inputs, by name, that it is to be run on; an axis that is None gets some length.
        name_node: tells which node it is, by trying parts of the file.
    """
    found = Path(path).stat()
    given = {name: list(axes) for name, axes in (shapes or {}).items()}
    ended = _tried(str(path), found.st_mtime_ns, found.st_size, json.dumps(given))
    if ended:
        where = name_node(Path(path), lambda part: bool(_ending(part, given))) if name_node else ""
        raise ExportError(
            f"running the file {_ODD} ({ended})",
            where=f"{path}: {where}" if where else str(path),
            next_step=f"bntool fold {shlex.quote(str(path))} --check none --no-run, or export it again",
        )


@functools.lru_cache(maxsize=256)
def _tried(path: str, changed: int, size: int, shapes: str) -> str:  # noqa: ARG001 - by these a file is known again
    return _ending(Path(path), json.loads(shapes))


def _ending(path: Path, shapes: Mapping[str, Any]) -> str:
    """What ended the process that ran the file, as `SIGSEGV`; empty where it lives."""
    process = _process()
    if process is None:
        return ""
    try:
        process.stdin.write(json.dumps({"path": str(path), "shapes": shapes}) + "\n")
        process.stdin.flush()
        answered = process.stdout.readline()
    except (OSError, ValueError):
        answered = ""
    if answered:
        return ""
    code = process.wait()
    _process.cache_clear()
    with contextlib.suppress(ValueError):
        return signal.Signals(-code).name if code < 0 else f"exit {code}"
    return f"signal {-code}"


@functools.lru_cache(maxsize=1)
def _process() -> Any:
    """The process, started; None where none can be started: then nothing is known, as without it."""
    child = Path(__file__).with_name("trial.py")
    line = [sys.executable, "-I", "-c", _START, str(child), json.dumps(sys.path)]
    try:
        process = subprocess.Popen(  # noqa: S603 - this very Python, and a file of bntool's own
            line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
    except OSError:
        return None
    atexit.register(_end, process)
    return process


def _end(process: Any) -> None:
    for stream in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            stream.close()
    process.wait()
