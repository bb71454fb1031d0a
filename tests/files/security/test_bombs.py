"""Small pickles that would take much memory or time: refused within both."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import pytest

from bntool.core.errors import LoadError
from bntool.files.detect import detect
from bntool.files.security.pickles import read_pickled
from tests.files.torch_files import write_members

COPIES = 20_000


def _called(name: bytes, argument: bytes, extra: bytes = b"") -> bytes:
    """One object, kept once, that a function is called with again and again."""
    begin = b"\x80\x02c" + name + b"q\x02" + argument + b"q\x00" + extra
    call = b"h\x02h\x00" + (b"h\x01\x86" if extra else b"\x85") + b"R"
    return begin + b"(" + call * COPIES + b"t."


TEXT = b"X" + struct.pack("<I", 1 << 20) + b"a" * (1 << 20)
TUPLE = b"(" + b"K\x01" * 200_000 + b"t"
DICT = b"}(" + b"".join(b"J" + struct.pack("<i", n) + b"K\x01" for n in range(100_000)) + b"u"
BOMBS = {
    "text": _called(b"_codecs\nencode\n", TEXT, b"X\x06\0\0\0latin1q\x01"),
    "dict": _called(b"collections\nOrderedDict\n", DICT),
    "tuple": _called(b"torch\nSize\n", TUPLE),
    "set": _called(b"builtins\nset\n", b"](" + b"K\x01" * 200_000 + b"e"),
    "of a name that is not known": _called(b"some.package\nThing\n", TUPLE),
}


@pytest.mark.parametrize("name", BOMBS)
def test_one_object_copied_over_and_over_is_refused_at_once(tmp_path: Path, name: str) -> None:
    path = tmp_path / "bomb.pt"
    write_members(path, [("data.pkl", BOMBS[name]), ("version", b"3\n"), ("byteorder", b"little")])
    begun = time.monotonic()
    with pytest.raises(LoadError, match="copies what it holds over and over"):
        read_pickled(path, detect(path))
    assert time.monotonic() - begun < 20  # seconds; without a bound it is an hour, or twenty gigabytes
