"""Mutations of a zip archive, structure by structure: one that readers could disagree on, and little else."""

from __future__ import annotations

import random
import struct
import zlib

from tools.sweeps.zip_model import DESCRIPTOR, FULL_16, FULL_32, WIDTHS, Model, Part, fields_of, model_of

_WIDE_A, _LONG_S = "\uff41".encode(), "\u017f".encode()
"""Letters that case folding or normalisation takes for an a and an s."""


def _number(model: Model, draw: random.Random, old: int, width: int) -> int:
    """A number that a reader may stumble over, or one that stands elsewhere in the archive."""
    part = draw.choice(model.parts)
    near = [old + d for d in (-1, 1, -2, 2, 20, 22, 46, 76, -22)]
    known = [0, 1, FULL_16, FULL_32, (1 << width) - 1, 1 << (width - 1), len(model.to_bytes())]
    known += [part.entry["offset"], part.entry["size"], model.end["offset"], model.end["size"]]
    return max(draw.choice(near + known), 0)


def _field(model: Model, draw: random.Random) -> None:
    part = draw.choice(model.parts)
    found = {"local": part.local, "entry": part.entry, "end": model.end}
    if model.record is not None and model.locator is not None:
        found |= {"record": model.record, "locator": model.locator}
    kind = draw.choice(list(found))
    name, code = draw.choice(list(fields_of(kind).items()))
    value = _number(model, draw, found[kind][name], WIDTHS[code])
    found[kind][name] = value
    # The same lie twice is the harder one to see.
    if kind in ("local", "entry") and name in part.local and draw.random() < 0.4:
        part.local[name] = part.entry[name] = value


def _name(model: Model, draw: random.Random) -> None:
    part, other = draw.choice(model.parts), draw.choice(model.parts)
    old = part.name
    new = draw.choice(
        (
            *(old.swapcase(), old.upper(), old + b"\0", old[:-1], other.name, b"/" + old, b"../" + old),
            *(old.replace(b"/", b"\\"), old.replace(b"a", _WIDE_A), old.replace(b"s", _LONG_S), old + b"/"),
            *(old + b"x" * 600, b"x/" + old, old.rpartition(b"/")[2], b"", b"\xff" + old, b"new/" + old),
            *(old.rpartition(b"/")[0] + b"/extra/" + other.name, old.replace(b"0", b"7")),
        )
    )
    where = draw.choice(("both", "both", "local", "entry"))
    if where != "entry":
        part.name = new
    if where != "local":
        part.entry_name = new
    if draw.random() < 0.3:
        part.local["flags"] ^= 0x800
        part.entry["flags"] ^= 0x800


def _members(model: Model, draw: random.Random) -> None:
    part, place = draw.choice(model.parts), draw.randrange(len(model.parts) + 1)
    twin = model.copy().parts[model.parts.index(part)]
    how = draw.choice(("double", "hide", "drop", "shuffle", "list-twice", "list-order", "swap", "alias"))
    if how in ("double", "hide"):
        twin.data, old = draw.choice((twin.data, twin.data[::-1])), twin.data
        if twin.data != old:
            _resum(twin)
        model.parts.insert(place, twin)
        if how == "double":
            model.listed.insert(place, twin)
    elif how == "drop" and min(len(model.parts), len(model.listed)) > 1:
        del draw.choice((model.parts, model.listed))[0]
    elif how == "shuffle":
        draw.shuffle(model.parts)
        model.listed = list(model.parts)
    elif how == "list-twice":
        model.listed.append(part)
    elif how == "list-order":
        draw.shuffle(model.listed)
    elif how == "swap":
        other = draw.choice(model.parts)
        part.data, other.data = other.data, part.data
    elif how == "alias":
        part.entry["offset"] = draw.choice(model.parts).entry["offset"]


def _data(model: Model, draw: random.Random) -> None:
    part = draw.choice(model.parts)
    part.data = draw.choice(
        (
            part.data + b"x",
            part.data[:-1],
            b"",
            draw.randbytes(len(part.data)),
            model.to_bytes(),
            part.data * 2,
        )
    )
    if draw.random() < 0.7:
        _resum(part)


def _resum(part: Part) -> None:
    """Sizes and checksum for the bytes that are there, as their method has them."""
    plain = part.data
    if part.entry["method"] == 8:
        squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
        part.data = squeeze.compress(plain) + squeeze.flush()
    crc, sizes = zlib.crc32(plain), {"packed": len(part.data), "size": len(plain)}
    part.entry |= {"crc": crc, **sizes}
    wide = part.extra.startswith(b"\1\0")
    if part.entry["flags"] & DESCRIPTOR:
        code = "<4sL2Q" if wide else "<4s3L"
        part.descriptor = struct.pack(code, b"PK\7\10", crc, len(part.data), len(plain))
        return
    part.local |= {"crc": crc} if wide else {"crc": crc, **sizes}
    if wide:
        part.extra = part.extra[:4] + struct.pack("<2Q", len(plain), len(part.data)) + part.extra[20:]


def _extra(model: Model, draw: random.Random) -> None:
    part = draw.choice(model.parts)
    numbers = [_number(model, draw, part.entry["offset"], 64) for _ in range(draw.choice((1, 2, 3)))]
    wide = struct.pack(f"<2H{len(numbers)}Q", 1, 8 * len(numbers), *numbers)
    path = struct.pack("<2HBL", 0x7075, 5 + len(b"data.pkl"), 1, zlib.crc32(part.name)) + b"data.pkl"
    field = draw.choice(
        (wide, wide, path, b"FB\3\0ZZZ", b"FB\3\0abc", b"UT\5\0\3\0\0\0\0", b"Z", b"FB\xff\0Z")
    )
    where = draw.choice(("extra", "entry_extra"))
    setattr(part, where, draw.choice((field, getattr(part, where) + field, b"")))
    if field is wide and draw.random() < 0.7:
        for name in draw.sample(("size", "packed", "offset"), len(numbers)):
            (part.entry if where == "entry_extra" else part.local)[name] = FULL_32


def _descriptor(model: Model, draw: random.Random) -> None:
    part = draw.choice(model.parts)
    sums = [part.entry[name] & FULL_32 for name in ("crc", "packed", "size")]
    part.descriptor = draw.choice(
        (
            *(b"", part.descriptor[4:], struct.pack("<4s3L", b"PK\7\10", *sums), struct.pack("<3L", *sums)),
            struct.pack("<4sL2Q", b"PK\7\10", *sums),
            struct.pack("<4s3L", b"PK\7\10", sums[0] ^ 1, *sums[1:]),
        )
    )
    if draw.random() < 0.6:
        part.local["flags"] ^= DESCRIPTOR
        part.entry["flags"] ^= DESCRIPTOR


def _around(model: Model, draw: random.Random) -> None:
    """Bytes where none belong: rubbish, another directory, or a whole other archive."""
    other = model.copy()
    _members(other, draw)
    other.settle()
    whole = other.to_bytes()
    stuff = draw.choice(
        (b"\0", b"#!/bin/sh\n", whole, whole[other.end["offset"] :], whole[-22:], b"PK\5\6" + bytes(18))
    )
    where = draw.choice(("before", "gap", "middle", "comment", "behind", "part", "part-comment"))
    if where == "part":
        draw.choice(model.parts).behind = stuff
    elif where == "part-comment":
        draw.choice(model.listed).comment = stuff[:FULL_16]
    else:
        setattr(model, where, stuff[:FULL_16] if where == "comment" else stuff)


def _records(model: Model, draw: random.Random) -> None:
    """ZIP64 records where there are none, none where there are, or ones that say something else."""
    if model.record is not None and draw.random() < 0.4:
        model.record = None if draw.random() < 0.6 else model.record
        model.locator = None if draw.random() < 0.6 else model.locator
        return
    ends = {name: model.end[name] for name in ("here", "count", "size", "offset")}
    model.record = {"length": 44, "maker": 45, "need": 45, "disk": 0, "first": 0, **ends}
    model.locator = {"disk": 0, "offset": ends["offset"] + ends["size"], "disks": 1}
    for name in draw.sample(list(ends), draw.randrange(3)):
        model.end[name] = FULL_32 if name in ("size", "offset") else FULL_16


MUTATIONS = (_field, _name, _members, _data, _extra, _descriptor, _around, _records)


def mutant(content: bytes, draw: random.Random) -> bytes:
    """The archive with one to three mutations; mostly all that is not mutated still fits."""
    model = model_of(content)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        mutate = draw.choice(MUTATIONS)
        late = mutate in (_field, _records) or draw.random() < 0.25
        if late:
            model.settle()
        mutate(model, draw)
        if not late:
            model.settle()
    return model.to_bytes()
