"""A file whose judged bytes can no longer change: they are read from memory, and all others from the file."""

from __future__ import annotations

import bisect
import io
import os
from collections.abc import Iterator
from typing import Any, BinaryIO

_CHUNK = 1 << 20


class Pinned(io.RawIOBase, BinaryIO):
    """An opened file, for judges and for the library that loads it afterwards.

    The file is opened once, so another one put under its name changes nothing. What a judge read is kept, so
    that a write into the file itself reaches numbers at most, and never what was judged.
    """

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file = file
        self._at = 0
        self._pieces: dict[int, bytes] = {}
        self._starts: list[int] = []
        self.size = file.seek(0, os.SEEK_END)

    def pin(self, start: int, length: int) -> bytes:
        """The bytes there, the same ones for every reader from now on; fewer where the file ends.

        A piece is pinned as a whole: two of them are equal or do not overlap.
        """
        if length == 0:
            return b""
        if start not in self._pieces:
            self._pieces[start] = self.look(start, length)
            self._starts = []
        return self._pieces[start]

    def look(self, start: int, length: int) -> bytes:
        """The bytes there as the file has them now, not pinned."""
        self._file.seek(start)
        content = self._file.read(length)
        while len(content) < length and (more := self._file.read(length - len(content))):
            content += more
        return content

    def chunks(self, start: int, length: int) -> Iterator[bytes]:
        """The bytes there a part at a time: the pinned ones, and others as the file has them now."""
        for at in range(start, start + length, _CHUNK):
            self._at = at
            yield self.read(min(_CHUNK, start + length - at))

    def readinto(self, buffer: Any, /) -> int:
        view, done = memoryview(buffer).cast("B"), 0
        self._starts = self._starts or sorted(self._pieces)
        view = view[: max(self.size - self._at, 0)]
        while done < len(view):
            part = self._part(view[done:])
            if part == 0:
                break
            done += part
            self._at += part
        return done

    def _part(self, view: memoryview) -> int:
        """Fill the beginning of the view, as far as it comes from one place."""
        following = bisect.bisect_right(self._starts, self._at)
        if following:
            begin = self._starts[following - 1]
            piece = memoryview(self._pieces[begin])[self._at - begin :]
            if piece:
                part = min(len(piece), len(view))
                view[:part] = piece[:part]
                return part
        if following < len(self._starts):
            view = view[: self._starts[following] - self._at]
        self._file.seek(self._at)
        return int(self._file.readinto(view) or 0)  # type: ignore[attr-defined]

    def readall(self) -> bytes:
        content = bytearray(max(self.size - self._at, 0))
        return bytes(memoryview(content)[: self.readinto(content)])

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True
