"""Standard output and error of a command: made visible, never in the way of the work, one document alone."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import sys
import warnings
from collections.abc import Iterable
from typing import Any, TextIO, cast

from bntool.core.errors import OutputError
from bntool.core.text import as_lines, visible

_READER_GONE = 141  # as a shell reports a program ended by SIGPIPE


class Stream:
    """A text stream on which only line ends move the cursor, whoever writes.

    The first write that fails is kept as `failure`, and what follows is dropped: the work goes on.
    """

    def __init__(self, raw: TextIO, *, styled: bool = False) -> None:
        self.raw = raw
        self.failure: OSError | None = None
        self._styled = styled

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)

    @property
    def encoding(self) -> str:
        """What is written is fitted to the real one here: click looks for ways past a stream in ASCII."""
        return self._real_encoding if self._styled else "utf-8"

    @property
    def _real_encoding(self) -> str:
        return getattr(self.raw, "encoding", None) or "utf-8"

    @property
    def styled(self) -> Stream:
        """The same for whoever colours text that is fit to be shown already."""
        return Stream(self.raw, styled=True)

    def write(self, text: str) -> int:
        shown = text if self._styled else self._visible(text)
        fitting = shown.encode(self._real_encoding, "backslashreplace").decode(self._real_encoding)
        self._try("write", fitting)
        return len(text)

    def _visible(self, text: str) -> str:
        # A progress bar returns to the start of its own line before it draws itself anew.
        start = "\r" if text.startswith("\r") and self.isatty() else ""
        return start + "\n".join(map(visible, text.removeprefix(start).split("\n")))

    def writelines(self, texts: Iterable[str]) -> None:
        for text in texts:
            self.write(text)

    def isatty(self) -> bool:
        return not self.raw.closed and self.raw.isatty()

    def flush(self) -> None:
        self._try("flush")

    def _try(self, method: str, *arguments: str) -> None:
        if self.failure is not None:
            return
        try:
            getattr(self.raw, method)(*arguments)
        except OSError as error:
            self._drop(error)
        except ValueError:  # somebody closed it
            self._drop(OSError(errno.EBADF, os.strerror(errno.EBADF)))

    def _drop(self, error: OSError) -> None:
        """What is still held would fail once more at the interpreter's end, with a traceback."""
        self.failure = error
        with contextlib.suppress(OSError, ValueError):
            number = self.raw.fileno()
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, number)
            os.close(null)


class Streams:
    """The streams of one command, in place of the process's own until `restore`.

    With `document`, standard output holds that document alone: descriptor 1 is where 2 is meanwhile, also
    for whoever writes past Python and for child processes.
    """

    def __init__(self, *, document: bool) -> None:
        _hold_closed_numbers()
        self._before = sys.stdout, sys.stderr, warnings.formatwarning
        self._kept: int | None = None
        out = sys.stdout or _text_on(1)
        self.error = Stream(sys.stderr or _text_on(2))
        if document:
            self._kept = _apart()
            self.results = Stream(_text_on(self._kept) if _number(out) == 1 else out)
        else:
            self.results = Stream(out)
        sys.stdout = cast(TextIO, self.error if document else self.results)
        sys.stderr = cast(TextIO, self.error)
        warnings.formatwarning = _warning_on_one_line
        _running.append(self)

    def __enter__(self) -> Streams:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

    def outcome(self, code: int) -> int:
        """The exit code of a command that would end with `code`, were it not for its streams."""
        sys.stdout.flush()
        self.results.flush()
        failure = self.results.failure
        if failure is not None and not isinstance(failure, BrokenPipeError):
            lost = OutputError.because(failure)
            say(lost.told("error: "), err=True)
            code = code or lost.exit_code
        elif failure is not None:
            code = code or _READER_GONE
        self.error.flush()
        return code

    def restore(self) -> None:
        _running.remove(self)
        sys.stdout, sys.stderr, warnings.formatwarning = self._before
        if self._kept is not None:
            _flush_below_python()
            os.dup2(self._kept, 1)
            os.close(self._kept)


_running: list[Streams] = []


def say(*parts: str, err: bool = False) -> None:
    """Write to standard output, or error. A line end within a part that is no `Lines` is made visible."""
    _write(sys.stderr if err else sys.stdout, as_lines(*parts))


def say_result(*parts: str) -> None:
    """Write to where the document of a command belongs."""
    _write(cast(TextIO, _running[-1].results) if _running else sys.stdout, as_lines(*parts))


def styled(stream: TextIO) -> TextIO:
    """`stream` for a library that colours text which is fit to be shown already."""
    return cast(TextIO, stream.styled) if isinstance(stream, Stream) else stream


def _write(stream: TextIO, text: str) -> None:
    stream.write(f"{text}\n")
    stream.flush()


def _hold_closed_numbers() -> None:
    """Without it the next file that is opened would take the number, and get what is printed."""
    for number, mode in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            # A standard output for reading alone still fails as a closed one does, which is then told.
            os.open(os.devnull, mode)


def _apart() -> int:
    """A descriptor of its own for standard output, whose number then is that of standard error."""
    _flush_below_python()
    kept = os.dup(1)
    os.dup2(2, 1)
    return kept


def _flush_below_python() -> None:
    """C keeps a buffer of its own, which would reach descriptor 1 after that has changed its meaning."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("ucrtbase" if os.name == "nt" else None).fflush(None)


def _text_on(number: int) -> TextIO:
    return open(number, "w", encoding="utf-8", closefd=False)


def _number(stream: TextIO) -> int | None:
    try:
        return stream.fileno()
    except (OSError, ValueError, AttributeError):
        return None


def _warning_on_one_line(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,  # noqa: ARG001 - the protocol of the standard library
) -> str:
    return visible(f"{filename}:{lineno}: {category.__name__}: {message}") + "\n"
