"""What makes two readers of zip archives see two archives, a trick at a time, for archives of any kind."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable

from tools.sweeps.zip_model import DESCRIPTOR, FULL_16, FULL_32, Model

Trick = Callable[[Model], object]


def _set(place: str, **values: int) -> Trick:
    """Fields of the end, of the first member's header (`local`) or entry, or of every record there is."""

    def change(model: Model) -> None:
        model.settle()
        fields = model.end if place == "end" else getattr(model.parts[0], place)
        assert not values.items() <= fields.items()
        fields.update(values)

    return change


def _with_records(**values: int) -> Trick:
    """ZIP64 records that are right but for these fields; those with a ! in the end record too."""

    def change(model: Model) -> None:
        model.settle()
        ends = {name: model.end[name] for name in ("here", "count", "size", "offset")}
        model.record = {"length": 44, "maker": 45, "need": 45, "disk": 0, "first": 0, **ends}
        model.locator = {"disk": 0, "offset": ends["offset"] + ends["size"], "disks": 1}
        for name, value in values.items():
            owner, _, field = name.partition("_")
            fields = {"record": model.record, "locator": model.locator, "end": model.end}[owner]
            fields[field] = value

    return change


def _other(model: Model) -> bytes:
    """Another archive of the same members, with other bytes in the first."""
    twin = model.copy()
    twin.parts[0].data = bytes(len(twin.parts[0].data))
    return twin.to_bytes()


def _put(place: str, stuff: Callable[[Model], bytes], *, settled: bool) -> Trick:
    def change(model: Model) -> None:
        setattr(model, place, stuff(model))
        if settled:
            model.settle()

    return change


def _rename(new: Callable[[bytes], bytes], *, where: str = "both") -> Trick:
    def change(model: Model) -> None:
        part = model.parts[-1]
        part.name = new(part.name) if where != "entry" else part.name
        part.entry_name = new(part.entry_name) if where != "local" else part.entry_name
        model.settle()

    return change


def _unicode_name(name: bytes) -> Trick:
    def change(model: Model) -> None:
        part = model.parts[-1]
        part.name = part.entry_name = name
        part.local["flags"] &= ~0x800
        part.entry["flags"] &= ~0x800
        model.settle()

    return change


def _twin(change: Callable[[bytes], bytes] = lambda name: name) -> Trick:
    """The last member a second time, under its name or one like it."""

    def trick(model: Model) -> None:
        twin = model.copy().parts[-1]
        twin.name = twin.entry_name = change(twin.name)
        model.parts.append(twin)
        model.listed.append(twin)
        model.settle()

    return trick


def _fields(where: str, extra: bytes, **entry: int) -> Trick:
    def change(model: Model) -> None:
        part = model.parts[0]
        setattr(part, where, extra)
        model.settle()
        (part.local if where == "extra" else part.entry).update(entry)

    return change


def _alias(model: Model) -> None:
    model.parts[-1].entry["offset"] = model.parts[0].entry["offset"]


def _inside_another(model: Model) -> None:
    """The last member's header lies in the bytes of the first, and both are whole."""
    first, last = model.parts[0], model.parts.pop()
    last.behind = b""
    first.data += last.stored()
    first.entry["packed"] = first.entry["size"] = first.local["packed"] = first.local["size"] = len(
        first.data
    )
    first.entry["crc"] = first.local["crc"] = zlib.crc32(first.data)
    model.settle()
    last.fit()
    last.entry["offset"] = model.parts[0].entry["offset"] + len(first.stored()) - len(last.stored())


def _hidden(model: Model) -> None:
    """A member between the others that the directory does not list."""
    model.parts.insert(1, model.copy().parts[-1])
    model.settle()


def _descriptor(change: Callable[[bytes], bytes], flag: bool = True) -> Trick:
    def trick(model: Model) -> None:
        part = model.parts[0]
        sums = struct.pack("<3L", *(part.entry[n] for n in ("crc", "packed", "size")))
        part.descriptor = change(b"PK\7\10" + sums)
        for fields in (part.local, part.entry) if flag else ():
            fields["flags"] |= DESCRIPTOR
        if flag:
            part.local.update(crc=0, packed=0, size=0)
            part.extra = b""
        model.settle()

    return trick


def _flip_descriptor_flag(model: Model) -> None:
    model.parts[0].local["flags"] ^= DESCRIPTOR


def _swap_listed(model: Model) -> None:
    model.listed.reverse()


def _forget(model: Model) -> None:
    """One entry less than there are members."""
    del model.listed[-1]
    model.settle()


def _wide(*numbers: int) -> bytes:
    return struct.pack(f"<2H{len(numbers)}Q", 1, 8 * len(numbers), *numbers)


RUBBISH, EMPTY_END = b"#!/bin/sh\n", b"PK\5\6" + bytes(18)
TRICKS: dict[str, Trick] = {
    # bytes around the archive, and a second archive there, whose offsets fit or not
    "text-before": _put("before", lambda m: RUBBISH, settled=False),
    "text-before-counted": _put("before", lambda m: RUBBISH, settled=True),
    "archive-before": _put("before", _other, settled=False),
    "archive-before-counted": _put("before", _other, settled=True),
    "byte-behind": _put("behind", lambda m: b"\0", settled=False),
    "end-behind": _put("behind", lambda m: EMPTY_END, settled=False),
    "archive-behind": _put("behind", _other, settled=False),
    "end-of-another-behind": _put("behind", lambda m: m.to_bytes()[-22:], settled=False),
    "text-before-directory": _put("gap", lambda m: RUBBISH, settled=True),
    "directory-before-directory": _put(
        "gap", lambda m: b"".join(p.listed() for p in m.listed), settled=True),
    "text-behind-directory": _put("middle", lambda m: RUBBISH, settled=True),
    "directory-behind-directory": _put(
        "middle", lambda m: b"".join(p.listed() for p in m.listed), settled=False),
    "text-between-members": lambda m: (setattr(m.parts[0], "behind", RUBBISH), m.settle()),
    "hidden-member": _hidden,
    # comments
    "comment": _put("comment", lambda m: b"hello", settled=True),
    "end-in-comment": _put("comment", lambda m: EMPTY_END, settled=True),
    "archive-in-comment": _put("comment", lambda m: _other(m)[:FULL_16], settled=True),
    "comment-not-counted": _put("comment", lambda m: EMPTY_END, settled=False),
    "comment-missing": _set("end", comments=7),
    "comment-of-a-member": lambda m: (setattr(m.parts[0], "comment", EMPTY_END), m.settle()),
    "comment-of-the-last": lambda m: (setattr(m.parts[-1], "comment", b"PK\6\7" + bytes(16)), m.settle()),
    # the end record
    "counts-one-more": lambda m: m.end.update(count=m.end["count"] + 1, here=m.end["here"] + 1),
    "counts-one-less": lambda m: m.end.update(count=m.end["count"] - 1, here=m.end["here"] - 1),
    "counts-none": _set("end", count=0, here=0),
    "counts-here-one-less": lambda m: m.end.update(here=m.end["here"] - 1),
    "lists-one-less": _forget,
    "disk": _set("end", disk=1, first=1),
    "first-disk": _set("end", first=1),
    "directory-offset-small": lambda m: m.end.update(offset=m.end["offset"] - 46),
    "directory-size-small": lambda m: m.end.update(size=m.end["size"] - 1),
    "directory-moved": lambda m: m.end.update(size=m.end["size"] - 46, offset=m.end["offset"] + 46),
    "all-ones-without-record": _set("end", offset=FULL_32),
    # ZIP64 records, fake ones beside right ones
    "record-of-another-size": _with_records(record_size=1),
    "record-of-another-offset": _with_records(record_offset=0),
    "record-counts-none": _with_records(record_count=0, record_here=0),
    "record-counts-others": _with_records(record_count=1),
    "record-on-another-disk": _with_records(record_disk=1),
    "record-longer": _with_records(record_length=45),
    "record-shorter": _with_records(record_length=0),
    "record-of-the-future": _with_records(record_need=63),
    "locator-to-the-start": _with_records(locator_offset=0),
    "locator-to-the-end": _with_records(locator_offset=FULL_32),
    "locator-of-two-disks": _with_records(locator_disks=2),
    "locator-of-no-disk": _with_records(locator_disks=0),
    "locator-on-another-disk": _with_records(locator_disk=1),
    "end-contradicts-record": _with_records(end_offset=FULL_32),
    "end-counts-others": _with_records(end_count=FULL_16, end_here=FULL_16),
    "record-without-locator": lambda m: (_with_records()(m), setattr(m, "locator", None)),
    "locator-without-record": lambda m: (_with_records()(m), setattr(m, "record", None)),
    "text-behind-record": lambda m: (_with_records()(m), setattr(m, "middle", b"\0" * 56)),
    # sizes and offsets in extra fields
    "extra-sizes-not-needed": _fields("entry_extra", _wide(1, 1)),
    "extra-offset-not-needed": _fields("entry_extra", _wide(0)),
    "extra-offset": _fields("entry_extra", _wide(4), offset=FULL_32),
    "extra-size-alone": _fields("entry_extra", _wide(1), size=FULL_32),
    "extra-missing": _fields("entry_extra", b"", size=FULL_32, packed=FULL_32),
    "extra-too-long": _fields("entry_extra", _wide(1, 1, 0), size=FULL_32, packed=FULL_32),
    "extra-twice": _fields("entry_extra", _wide(0) + _wide(4), offset=FULL_32),
    "extra-cut": _fields("entry_extra", b"\1"),
    "extra-runs-over": _fields("entry_extra", b"\1\0\xff\0"),
    "extra-unicode-path": _fields("entry_extra", struct.pack("<2HBL", 0x7075, 9, 1, 0) + b"data"),
    "extra-time": _fields("entry_extra", b"UT\5\0\3\0\0\0\0"),
    "header-hides-text": _fields("extra", struct.pack("<2s1H", b"FB", len(RUBBISH)) + RUBBISH),
    "header-hides-a-field": _fields("extra", b"UT\5\0\3\0\0\0\0"),
    "header-other-size": _fields("extra", _wide(1, 1), size=FULL_32, packed=FULL_32),
    # a header that contradicts its entry
    "other-name": _rename(lambda name: name[:-1] + b"X", where="local"),
    "other-name-in-directory": _rename(lambda name: name[:-1] + b"X", where="entry"),
    "longer-name": _rename(lambda name: name + b"X", where="local"),
    "other-case": _rename(bytes.swapcase, where="local"),
    "other-sum": lambda m: m.parts[0].local.update(crc=m.parts[0].local["crc"] ^ 1),
    "other-size": lambda m: m.parts[0].local.update(size=m.parts[0].local["size"] ^ 1),
    "other-packed-size": lambda m: m.parts[0].local.update(packed=m.parts[0].local["packed"] ^ 1),
    "other-method": lambda m: m.parts[0].local.update(method=m.parts[0].local["method"] ^ 8),
    "other-time": lambda m: m.parts[0].local.update(time=7),
    "other-flags": lambda m: m.parts[0].local.update(flags=m.parts[0].local["flags"] ^ 0x800),
    "other-header": lambda m: m.parts[0].local.update(names=m.parts[0].local["names"] + 2),
    "other-extra-length": lambda m: m.parts[0].local.update(extras=m.parts[0].local["extras"] + 4),
    # members
    "overlap": _alias,
    "one-inside-another": _inside_another,
    "reversed-directory": _swap_listed,
    "twice": _twin(),
    "encrypted": lambda m: [f.update(flags=f["flags"] | 1) for f in (m.parts[0].local, m.parts[0].entry)],
    "masked": lambda m: [f.update(flags=f["flags"] | 0x2000) for f in (m.parts[0].local, m.parts[0].entry)],
    "patched": lambda m: [f.update(flags=f["flags"] | 0x20) for f in (m.parts[0].local, m.parts[0].entry)],
    "bzip2": lambda m: [f.update(method=12) for f in (m.parts[0].local, m.parts[0].entry)],
    "lzma": lambda m: [f.update(method=14) for f in (m.parts[0].local, m.parts[0].entry)],
    "folder-by-attribute": _set("entry", outer=0x10),
    "everything-by-attribute": _set("entry", outer=FULL_32),
    "member-on-another-disk": _set("entry", disk=1),
    "size-is-none": _set("entry", size=FULL_32),
    "size-is-short": lambda m: m.parts[0].entry.update(size=m.parts[0].entry["size"] - 1),
    "bytes-changed": lambda m: setattr(m.parts[0], "data", bytes(len(m.parts[0].data))),
    # names
    "nul": _rename(lambda name: name + b"\0"),
    "nul-inside": _rename(lambda name: name + b"\0.py"),
    "empty-name": _rename(lambda name: b""),
    "upwards": _rename(lambda name: name.rpartition(b"/")[0] + b"/../" + name.rpartition(b"/")[2]),
    "absolute": _rename(lambda name: b"/" + name),
    "backslash": _rename(lambda name: b"a\\" + name),
    "drive": _rename(lambda name: b"C:" + name),
    "folder": _rename(lambda name: name + b"/"),
    "escape": _rename(lambda name: b"\x1b[2J" + name),
    "too-long": _rename(lambda name: name + b"x" * 600 + name[-4:]),
    "bytes-of-no-encoding": _rename(lambda name: name[:-4] + b"\xff" + name[-4:]),
    "utf-8-unsaid": _unicode_name("archive/extra/größe.npy".encode()),
    # descriptors
    "descriptor-of-another-sum": _descriptor(lambda d: d[:4] + bytes([d[4] ^ 1]) + d[5:]),
    "descriptor-of-another-size": _descriptor(lambda d: d[:-1] + b"\1"),
    "descriptor-without-sign": _descriptor(lambda d: d[4:]),
    "descriptor-twice": _descriptor(lambda d: d + d),
    "descriptor-missing": _descriptor(lambda d: b""),
    "descriptor-wide": _descriptor(lambda d: d[:8] + b"".join(d[i : i + 4] + bytes(4) for i in (8, 12))),
    "descriptor-unsaid": _descriptor(lambda d: d + b"\0", flag=False),
    "descriptor-flag-in-one": _flip_descriptor_flag,
}  # fmt: skip
