"""Zip archives read in the one way that every reader of them agrees on; any other archive is refused.

torch's reader, Python's and NumPy's take different bytes for an archive's members as soon as it has bytes
before, between or behind them, counts or offsets that lie, or headers that contradict each other. torch.save,
torch.jit.save, torch.export.save and numpy.savez write none of that (PKWARE APPNOTE 6.3.10; 4.3 and 4.5.3).
No torch here.
"""

from __future__ import annotations

import dataclasses
import re
import struct
import zlib
from typing import Any, BinaryIO, NamedTuple

from bntool.files.security.pinned import Pinned

MAX_DIRECTORY = 1 << 26
_END = struct.Struct("<4s4H2LH")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_FULL_16, _FULL_32 = 0xFFFF, 0xFFFFFFFF
_DESCRIPTOR, _UTF_8 = 0x8, 0x800
_STORED, _DEFLATED = 0, 8
_NEWEST = 45  # the version that knows ZIP64
_ZIP_64, _PADDING = 1, int.from_bytes(b"FB", "little")
_LONGEST_NAME = 511  # torch's reader cuts longer ones
_COMMENT = 1 << 16
_UPWARD = re.compile(r"(^|/)\.{0,2}(/|$)|\\|^[A-Za-z]:")  # also a folder: its name ends with a slash


class Unsafe(ValueError):
    """What no honest file holds, in words that follow `it`."""


class Damaged(ValueError):
    """The file is cut short or its bytes have changed."""


@dataclasses.dataclass(frozen=True)
class Member:
    """One member: its bytes lie at `begin`, `packed` of them, and unpack to `size`."""

    name: str
    begin: int
    packed: int
    size: int
    crc: int
    method: int

    @property
    def is_packed(self) -> bool:
        return self.method != _STORED


class _Entry(NamedTuple):
    """A central directory file header; its fields in their order in the file."""

    sign: bytes
    made_by: int
    newest: int
    flags: int
    method: int
    time: int
    date: int
    crc: int
    packed: int
    size: int
    name_length: int
    extra_length: int
    comment_length: int
    disk: int
    inner: int
    outer: int
    offset: int


class Archive:
    """An archive whose members are what every reader takes them for. `file` is for whoever loads it.

    Args:
        file: an opened file, which stays open for as long as the archive is used.

    Raises `Damaged` where the file is cut short, `Unsafe` where readers could disagree on it.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = Pinned(file)
        self.members: dict[str, Member] = {}
        count, begin, size = self._directory()
        directory = self.file.pin(begin, size)
        place = end = 0
        for _ in range(count):
            if len(directory) - place < _ENTRY.size:
                raise Unsafe("counts more members than its directory holds")
            member, place, end = self._member(directory, place, end)
            if member.name in self.members:
                raise Unsafe(f"holds two members of the same name: {quoted(member.name)}")
            self.members[member.name] = member
        if place != len(directory):
            raise Unsafe("holds more in its directory than the members that it counts")
        if end != begin:
            raise Unsafe("has bytes between its members and its directory")

    @property
    def has_sums(self) -> bool:
        """False for what `torch.save` writes after `torch.serialization.set_crc32_options(False)`."""
        return any(member.crc for member in self.members.values())

    def content(self, member: Member) -> bytes:
        """A member's bytes, unpacked, and pinned: whoever loads the file reads these and no others.

        Raises `Damaged` where they are not what the directory says.
        """
        raw = self.file.pin(member.begin, member.packed)
        content = _unpacked(raw, member) if member.is_packed else raw
        wrong = self.has_sums and zlib.crc32(content) != member.crc
        if len(content) != member.size or wrong:
            raise _wrong_sum(member)
        return content

    def check_sums(self) -> None:
        """Raises `Damaged` for the first member whose checksum does not match; torch checks none."""
        for member in self.members.values() if self.has_sums else ():
            if member.is_packed:
                self.content(member)
                continue
            crc = 0
            for chunk in self.file.chunks(member.begin, member.size):
                crc = zlib.crc32(chunk, crc)
            if crc != member.crc:
                raise _wrong_sum(member)

    def _directory(self) -> tuple[int, int, int]:
        """Count of members, place and size of the directory, where all that says so agrees."""
        at = self.file.size - _END.size
        end = self.file.pin(at, _END.size) if at >= 0 else b""
        if end[:4] != b"PK\5\6" or end[-2:] != b"\0\0":
            start = max(self.file.size - _COMMENT - _END.size, 0)
            tail = b"".join(self.file.chunks(start, self.file.size - start))
            if b"PK\5\6" in tail[: 4 - _END.size]:
                raise Unsafe("has a comment, or something else behind its end")
            raise Damaged("it ends before its directory")
        _, *disks, count_here, count, size, begin, _ = _END.unpack(end)
        said = count_here, count, size, begin
        if at >= _LOCATOR.size and self.file.look(at - _LOCATOR.size, 4) == b"PK\6\7":
            locator = self.file.pin(at - _LOCATOR.size, _LOCATOR.size)
            at -= _LOCATOR.size + _END_64.size
            end = self.file.pin(at, _END_64.size) if at >= 0 else b""
            if end[:4] != b"PK\6\6" or _LOCATOR.unpack(locator) != (b"PK\6\7", 0, at, 1):
                raise Unsafe("has a ZIP64 record that is not where it says")
            _, length, _, newest, *more, count_here, count, size, begin = _END_64.unpack(end)
            disks += more
            full = _FULL_16, _FULL_16, _FULL_32, _FULL_32
            true = count_here, count, size, begin
            if length != _END_64.size - 12 or newest > _NEWEST:
                raise Unsafe("has a ZIP64 record of an unknown kind")
            if said != tuple(map(min, true, full)):
                raise Unsafe("says two different things about where its directory is")
        if any(disks) or count_here != count:
            raise Unsafe("is a part of an archive on several disks")
        if size > MAX_DIRECTORY:
            raise Unsafe(f"claims a directory of {size:,} bytes")
        if begin + size != at:
            raise Unsafe("has bytes before it, or a directory that is not where it says")
        return count, begin, size

    def _member(self, directory: bytes, place: int, begin: int) -> tuple[Member, int, int]:
        """A member that must begin at `begin`, the place of the next entry, and where the member ends."""
        entry = _Entry(*_ENTRY.unpack_from(directory, place))
        place += _ENTRY.size
        name = directory[place : place + entry.name_length]
        extra = directory[place + entry.name_length : place + entry.name_length + entry.extra_length]
        if entry.sign != b"PK\1\2" or len(extra) != entry.extra_length:
            raise Unsafe("counts more members than its directory holds")
        text = _name_of(name, entry.flags)
        if entry.flags & ~(_DESCRIPTOR | _UTF_8) or entry.newest > _NEWEST:
            raise Unsafe(f"holds an encrypted member, or one of an unknown kind: {quoted(text)}")
        if entry.method not in (_STORED, _DEFLATED):
            raise Unsafe(f"holds a member packed by an unknown method: {quoted(text)}")
        if entry.comment_length or entry.disk:
            raise Unsafe(f"holds a member with a comment, or on another disk: {quoted(text)}")
        # Where MS-DOS's bit for a folder is set, torch's reader leaves memory as it was and says nothing.
        if entry.outer & _FULL_16:
            raise Unsafe(f"holds a member with the attributes of a folder: {quoted(text)}")
        size, packed, offset = _true_sizes(entry, extra, text)
        if entry.method == _STORED and size != packed:
            raise Unsafe(f"says two different sizes for {quoted(text)}")
        if offset != begin:
            raise Unsafe("has bytes before or between its members, or members that overlap")
        begin, tail = self._local_header(entry, name, size, packed, offset)
        end = begin + packed + len(tail)
        if end > self.file.size or self.file.look(begin + packed, len(tail)) != tail:
            raise Unsafe(f"contradicts itself behind the member {quoted(text)}")
        member = Member(text, begin, packed, size, entry.crc, entry.method)
        return member, place + entry.name_length + entry.extra_length, end

    def _local_header(
        self, entry: _Entry, name: bytes, size: int, packed: int, offset: int
    ) -> tuple[int, bytes]:
        """Where the member's bytes begin, and what must stand behind them."""
        head = self.file.look(offset, _LOCAL.size)
        if len(head) < _LOCAL.size or head[:4] != b"PK\3\4":
            raise Damaged(f"the header of {quoted(name.decode('utf-8'))} is missing")
        length = _LOCAL.size + sum(_LOCAL.unpack(head)[-2:])
        whole = self.file.pin(offset, length)
        _, newest, *same, crc, packed_32, size_32, name_length, _ = _LOCAL.unpack_from(whole)
        extra = _fields(whole[_LOCAL.size + name_length :])
        wide = extra.pop(_ZIP_64, None)
        differs = (
            same != [entry.flags, entry.method, entry.time, entry.date]
            or whole[_LOCAL.size : _LOCAL.size + name_length] != name
            or (crc, packed_32, size_32, wide) not in _headers_of(entry, size, packed, offset)
        )
        if differs or newest > _NEWEST or len(whole) != length:
            raise Unsafe(f"has a header that differs from its directory at {quoted(name.decode('utf-8'))}")
        if extra.pop(_PADDING, b"").strip(b"Z") or extra:
            raise Unsafe(f"hides bytes in the header of {quoted(name.decode('utf-8'))}")
        if not entry.flags & _DESCRIPTOR:
            return offset + length, b""
        sizes = struct.pack("<2Q" if wide is not None else "<2L", packed, size)
        return offset + length, b"PK\7\10" + struct.pack("<L", entry.crc) + sizes


def quoted(name: str) -> str:
    """A member's name between quotes, fit for a terminal."""
    return repr(name if len(name) <= 100 else name[:97] + "...")


def _name_of(raw: bytes, flags: int) -> str:
    """A name that no reader decodes, cuts or takes for a path in another way."""
    try:
        name = raw.decode("utf-8" if flags & _UTF_8 else "ascii")
    except UnicodeDecodeError as error:
        raise Unsafe("has a member whose name readers decode in different ways") from error
    if _UPWARD.search(name) or not name.isprintable():
        raise Unsafe(f"has a member whose name is no plain path inside of it: {quoted(name)}")
    if len(raw) > _LONGEST_NAME:
        raise Unsafe(f"has a member whose name is too long: {quoted(name)}")
    return name


def _true_sizes(entry: _Entry, extra: bytes, name: str) -> tuple[int, int, int]:
    """Size, packed size and offset: those that need more than 32 bits stand in a field of their own."""
    short = entry.size, entry.packed, entry.offset
    needed = [value == _FULL_32 for value in short]
    wide = _fields(extra).get(_ZIP_64, b"")
    if len(wide) != 8 * sum(needed) or len(extra) != (4 + len(wide) if any(needed) else 0):
        raise Unsafe(f"has a size in its directory that it does not need at {quoted(name)}")
    values = iter(struct.unpack(f"<{sum(needed)}Q", wide))
    size, packed, offset = (
        next(values) if long else value for value, long in zip(short, needed, strict=True)
    )
    return size, packed, offset


def _fields(extra: bytes) -> dict[int, bytes]:
    """The extra fields of a header, each once."""
    fields: dict[int, bytes] = {}
    while extra:
        kind, length = struct.unpack("<2H", extra[:4]) if len(extra) >= 4 else (-1, 0)
        field, extra = extra[4 : 4 + length], extra[4 + length :]
        if kind < 0 or len(field) != length or kind in fields:
            raise Unsafe("has extra fields that are cut short or doubled")
        fields[kind] = field
    return fields


def _headers_of(entry: _Entry, size: int, packed: int, offset: int) -> set[tuple[Any, ...]]:
    """The checksum, packed size, size and ZIP64 field of a header that an honest writer gives this member."""
    both = struct.pack("<2Q", size, packed)
    if not entry.flags & _DESCRIPTOR:
        return {(entry.crc, packed, size, None), (entry.crc, _FULL_32, _FULL_32, both)}
    # torch writes them behind the member, and Python where it cannot go back.
    place = struct.pack("<Q", offset) if offset >= _FULL_32 else b""
    wide = (
        {both + place, struct.pack("<2Q", size, 0) + place}
        if max(size, packed) >= _FULL_32
        else {place or None}
    )
    return {(0, _FULL_32, _FULL_32, bytes(16)), *((0, 0, 0, field) for field in wide)}


def _unpacked(raw: bytes, member: Member) -> bytes:
    """Never more than the size that the directory gives, which is bounded before."""
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        content = inflate.decompress(raw, member.size + 1)
    except zlib.error as error:
        raise Damaged(f"{quoted(member.name)} cannot be unpacked") from error
    if not inflate.eof or inflate.unused_data or inflate.unconsumed_tail:
        raise Unsafe(f"hides bytes in the packed member {quoted(member.name)}")
    return content


def _wrong_sum(member: Member) -> Damaged:
    return Damaged(f"the checksum of {quoted(member.name)} does not match")
