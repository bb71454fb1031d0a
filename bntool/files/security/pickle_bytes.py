"""What a pickle's opcodes read from the file, byte by byte; one that ends early is damaged."""

from __future__ import annotations

import struct
from typing import Any, BinaryIO


class DamagedPickle(ValueError):
    """The pickle ends early or is not well formed."""


def exactly(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise DamagedPickle("it ends early")
    return data


def line_of(file: BinaryIO) -> str:
    line = file.readline(4096)
    if not line.endswith(b"\n"):
        raise DamagedPickle("a name without end")
    return line[:-1].decode("utf-8")


def number_of(file: BinaryIO, code: str) -> Any:
    return struct.unpack(code, exactly(file, struct.calcsize(code)))[0]
