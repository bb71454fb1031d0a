"""A zip archive as a model whose every field can be set, for mutants that are wrong in one place alone."""

from __future__ import annotations

import copy
import dataclasses
import struct

KINDS = {
    "local": (b"PK\3\4", "need:H flags:H method:H time:H date:H crc:L packed:L size:L names:H extras:H"),
    "entry": (
        b"PK\1\2",
        """maker:H need:H flags:H method:H time:H date:H crc:L packed:L size:L names:H extras:H comments:H
        disk:H inner:H outer:L offset:L""",
    ),
    "record": (b"PK\6\6", "length:Q maker:H need:H disk:L first:L here:Q count:Q size:Q offset:Q"),
    "locator": (b"PK\6\7", "disk:L offset:Q disks:L"),
    "end": (b"PK\5\6", "disk:H first:H here:H count:H size:L offset:L comments:H"),
}
"""The structures of an archive: signature, then name and width of each field (PKWARE APPNOTE 6.3.10)."""

WIDTHS = {"H": 16, "L": 32, "Q": 64}
FULL_16, FULL_32 = (1 << 16) - 1, (1 << 32) - 1
DESCRIPTOR = 8
Fields = dict[str, int]


def fields_of(kind: str) -> dict[str, str]:
    """Field -> its code of `struct`."""
    return dict(field.split(":") for field in KINDS[kind][1].split())


def _code(kind: str) -> str:
    return "<4s" + "".join(fields_of(kind).values())


def read(kind: str, content: bytes, at: int) -> Fields:
    sign, *values = struct.unpack_from(_code(kind), content, at)
    assert sign == KINDS[kind][0], kind
    return dict(zip(fields_of(kind), values, strict=True))


def write(kind: str, fields: Fields) -> bytes:
    """The bytes of a structure; numbers that do not fit are cut."""
    codes = fields_of(kind)
    values = [fields[name] & ((1 << WIDTHS[code]) - 1) for name, code in codes.items()]
    return struct.pack(_code(kind), KINDS[kind][0], *values)


def size_of(kind: str) -> int:
    return struct.calcsize(_code(kind))


@dataclasses.dataclass
class Part:
    """A member: header, name, extra field, bytes, descriptor; its entry with the same and a comment."""

    local: Fields
    name: bytes
    extra: bytes
    data: bytes
    descriptor: bytes
    entry: Fields
    entry_name: bytes
    entry_extra: bytes
    comment: bytes = b""
    behind: bytes = b""

    def stored(self) -> bytes:
        return write("local", self.local) + self.name + self.extra + self.data + self.descriptor

    def listed(self) -> bytes:
        return write("entry", self.entry) + self.entry_name + self.entry_extra + self.comment

    def fit(self) -> None:
        """Lengths as they are."""
        self.local |= {"names": len(self.name), "extras": len(self.extra)}
        self.entry |= {
            "names": len(self.entry_name), "extras": len(self.entry_extra), "comments": len(self.comment),
        }  # fmt: skip


@dataclasses.dataclass
class Model:
    """An archive, and what stands before it, between its directory and its end, and behind it."""

    parts: list[Part]
    listed: list[Part]
    record: Fields | None
    locator: Fields | None
    end: Fields
    before: bytes = b""
    gap: bytes = b""
    middle: bytes = b""
    comment: bytes = b""
    behind: bytes = b""

    def copy(self) -> Model:
        return copy.deepcopy(self)

    def settle(self) -> None:
        """Every length, offset and count as an honest writer would set it for what is here."""
        at = len(self.before)
        for part in self.parts:
            part.fit()
            part.entry["offset"] = at
            at += len(part.stored()) + len(part.behind)
        begin = at + len(self.gap)
        size = sum(len(part.listed()) for part in self.listed)
        ends: Fields = {"here": len(self.listed), "count": len(self.listed), "size": size, "offset": begin}
        self.end |= ends | {"comments": len(self.comment)}
        if self.record is not None and self.locator is not None:
            self.record |= ends
            self.locator["offset"] = begin + size + len(self.middle)

    def to_bytes(self) -> bytes:
        members = b"".join(part.stored() + part.behind for part in self.parts)
        directory = b"".join(part.listed() for part in self.listed)
        record = write("record", self.record) if self.record is not None else b""
        locator = write("locator", self.locator) if self.locator is not None else b""
        tail = record + locator + write("end", self.end) + self.comment + self.behind
        return self.before + members + self.gap + directory + self.middle + tail


def model_of(content: bytes) -> Model:
    """The model of an honest archive smaller than 4 GiB."""
    at = len(content) - size_of("end")
    end = read("end", content, at)
    record = locator = None
    if content[at - size_of("locator") : at].startswith(KINDS["locator"][0]):
        locator = read("locator", content, at - size_of("locator"))
        record = read("record", content, locator["offset"])
    parts, place = [], end["offset"]
    for _ in range(end["count"]):
        entry = read("entry", content, place)
        place += size_of("entry")
        name = content[place : place + entry["names"]]
        extra = content[place + entry["names"] : place + entry["names"] + entry["extras"]]
        place += entry["names"] + entry["extras"]
        local = read("local", content, entry["offset"])
        begin = entry["offset"] + size_of("local")
        data = begin + local["names"] + local["extras"]
        behind = data + entry["packed"]
        local_extra = content[begin + local["names"] : data]
        wide = 24 if local_extra.startswith(b"\1\0") else 16
        descriptor = content[behind : behind + (wide if entry["flags"] & DESCRIPTOR else 0)]
        parts.append(Part(local, name, local_extra, content[data:behind], descriptor, entry, name, extra))
    model = Model(parts, list(parts), record, locator, end)
    assert model.to_bytes() == content, "the model loses something"
    return model
