"""What a document that is read back may hold: how many bytes and values, which names and numbers. No torch.

Anybody may have written it. It is parsed within bounds, then fitted to a type that says what stands where.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

MOST_BYTES = 1 << 26
MOST_VALUES = 1 << 21
"""Of some hundred bytes each in Python: a document takes a quarter of a GiB at most."""
_MOST_DIGITS = 20
_MOST_AXES = 32

# No pattern: msgspec 0.22 corrupts memory where a text with one and a container stand in one union.
Name = Annotated[str, Meta(max_length=1 << 12)]
Text = Annotated[str, Meta(max_length=1 << 16)]
Size = Annotated[int, Meta(ge=0, le=1 << 31)]
Count = Annotated[int, Meta(ge=0, le=1 << 53)]
Positive = Annotated[int, Meta(ge=1, le=1 << 31)]
Index = Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
Finite = Annotated[float, Meta(ge=-1.7976931348623157e308, le=1.7976931348623157e308)]
Axes = Annotated[int, Meta(ge=0, le=_MOST_AXES)]
Shape = Annotated[tuple[Size, ...], Meta(max_length=_MOST_AXES)]

_T = TypeVar("_T")


class Damaged(ValueError):
    """A document that is not what it must be: why, and the place in it, such as `sites[0].edits[1].map`."""

    def __init__(self, why: str, place: str = "") -> None:
        super().__init__(f"{why} (at {place})" if place else why)
        self.why, self.place = why, place

    def within(self, place: str) -> Damaged:
        """The same, seen from the document that holds this part of it at `place`."""
        return Damaged(self.why, f"{place}.{self.place}".rstrip("."))


def read(path: Path, *, halves: bool = False) -> Any:
    """What the JSON in a file says; `Damaged` where it is none or too large."""
    if path.exists() and not path.is_file():
        raise Damaged("it is not a regular file")  # a pipe would keep us waiting, a device never end
    with path.open("rb") as file:
        return parsed(file.read(MOST_BYTES + 1), halves=halves)


def parsed(raw: bytes, *, halves: bool = False) -> Any:
    """What a JSON text says. No key stands twice, no number is endless; a NaN, which is no JSON, is None.

    With `halves` a text may hold half a character, as Python has them for names of files that are not UTF-8.
    """
    if len(raw) > MOST_BYTES:
        raise Damaged(f"it is larger than {MOST_BYTES >> 20} MiB")
    # counted before any of it is made into objects
    if sum(map(raw.count, (b",", b":", b"[", b"{"))) > MOST_VALUES:
        raise Damaged(f"it holds more than {MOST_VALUES:,} values")
    try:
        text = raw.decode("utf-8-sig")
        said = json.loads(text, object_pairs_hook=_once, parse_int=_integer, parse_constant=lambda _: None)
        if "\\u" in text and not halves:
            json.dumps(said, ensure_ascii=False).encode()
        return said
    except UnicodeEncodeError:
        raise Damaged("it holds a text with half a character") from None
    except Damaged:
        raise
    except RecursionError:
        raise Damaged("it is not JSON that can be read: it is nested too deeply") from None
    except ValueError as error:
        raise Damaged(f"it is not JSON: {error}") from error


def fitted(data: Any, kind: type[_T]) -> _T:
    """`data` as a value of `kind`; `Damaged`, with the place, where it is not one."""
    try:
        return msgspec.convert(data, type=kind)
    except msgspec.ValidationError as error:
        why, _, place = str(error).partition(" - at `$")
        why = "this text cannot stand here" if " matching regex " in why else why
        raise Damaged(why[:1].lower() + why[1:], place.strip("`.")) from None
    except UnicodeError:
        raise Damaged("it holds a text with half a character") from None
    except RecursionError:
        raise Damaged("it is nested too deeply") from None


def require_known(rows: Iterable[Mapping[str, Any]], kind: type, place: str) -> None:
    """`Damaged` where one of the tables holds a key that `kind`, a dataclass, has no field for."""
    known = {field.name for field in dataclasses.fields(kind)}
    for number, row in enumerate(rows):
        for key in row.keys() - known:
            raise Damaged(f"there is no {key[:80]!r} here", f"{place}[{number}]")


def version_of(data: Any) -> int | None:
    """The schema version that a document states; None where it states none."""
    version = data.get("schema_version") if isinstance(data, dict) else None
    stated = isinstance(version, int) and not isinstance(version, bool) and version > 0
    return version if stated else None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise Damaged(f"it says {twice[:80]!r} twice")
    return table


def _integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise Damaged(f"it holds a whole number of {len(digits):,} digits")
    return int(digits)
