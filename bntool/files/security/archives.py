"""What must hold of a zip archive before any part of it is read as a model: one meaning, whole, unpacked."""

from __future__ import annotations

import os
import re
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import torch

from bntool.files.security.pickled_calls import shown

Source = Path | BinaryIO

_UPWARD = re.compile(r"(^|/)\.{1,2}(/|$)|^/|\\|^[A-Za-z]:")


# A header that points outside the file is a ValueError of the seek.
_UNREADABLE = (zipfile.BadZipFile, OSError, EOFError, ValueError, RuntimeError, struct.error)


class Unsafe(ValueError):
    """What no honest file holds, in words that follow `it`."""


class Damaged(ValueError):
    """The file is cut short or its bytes have changed."""


def check_archive(source: Source, *, packed: int = 0) -> None:
    """Refuse what torch's reader would let pass: doubled or packed members, and flipped bits.

    `packed` is how many bytes packed members may unpack to, none by default. Raises `Unsafe` or `Damaged`.
    torch reads the first of two members of one name, Python the last; torch
    unpacks without a limit, and checks no CRC.
    """
    try:
        with zipfile.ZipFile(source) as archive:
            members = archive.infolist()
            if len({m.filename.casefold() for m in members}) != len(members):
                raise Unsafe("holds two members of the same name")
            for member in members:
                if member.compress_type != zipfile.ZIP_STORED and not member.flag_bits & 1:
                    packed -= member.file_size
                if packed < 0 or member.flag_bits & 1:
                    raise Unsafe("holds packed or encrypted members, which torch.save never writes")
                if _UPWARD.search(member.filename) or not member.filename.isprintable():
                    raise Unsafe(f"has a member whose name leads out of it: {shown(member.filename)}")
            bad = archive.testzip()
    except (Unsafe, Damaged):
        raise
    except (*_UNREADABLE, NotImplementedError, zlib.error) as error:
        raise Damaged(str(error) or type(error).__name__) from error
    if bad is not None:
        raise Damaged(f"the checksum of {shown(bad)} does not match")


class Records:
    """The members of an archive with one root folder, as torch's reader and Python's both see them."""

    def __init__(self, source: Source) -> None:
        # The very bytes torch will read, whatever another zip reader makes of the archive.
        if not isinstance(source, Path):
            # torch takes the place it finds the file at for its beginning.
            source.seek(0)
        # A path as bytes, since not every name is UTF-8.
        place: Any = os.fsencode(source) if isinstance(source, Path) else source
        try:
            self._reader = torch._C.PyTorchFileReader(place)
        except RuntimeError as error:
            raise Damaged(str(error).split("\n")[0]) from error
        self._source = source
        with zipfile.ZipFile(source) as archive:
            names = archive.namelist()
            root = names[0].split("/")[0] + "/" if names else ""
            if any(not name.startswith(root) for name in names):
                raise Unsafe("has members outside its one folder")
            self._root = root
            self.sizes = {m.filename[len(root) :]: m.file_size for m in archive.infolist()}
        if set(self._reader.get_all_records()) != set(self.sizes):
            raise Unsafe("reads differently to different readers")

    def read(self, name: str) -> bytes:
        """A member's bytes; `Damaged` where it is missing, `Unsafe` where two readers disagree on it."""
        if name not in self.sizes:
            raise Damaged(f"{shown(name)} is missing")
        try:
            content = bytes(self._reader.get_record(name))
            with zipfile.ZipFile(self._source) as archive:
                same = archive.read(self._root + name) == content
        except _UNREADABLE as error:
            raise Damaged(f"{shown(name)} cannot be read") from error
        if not same:
            raise Unsafe("reads differently to different readers")
        return content

    def offset(self, name: str) -> int:
        """Where in the file a member's bytes begin; they lie there unpacked."""
        if name not in self.sizes:
            raise Damaged(f"{shown(name)} is missing")
        reader: Any = self._reader
        return int(reader.get_record_offset(name))
