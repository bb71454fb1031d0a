"""What a document may hold, whoever wrote it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec import inspect

from bntool.cli import site_list
from bntool.core import maps, plan, schema
from bntool.core.schema import Damaged, Finite, Index, Name, Shape, fitted, parsed, version_of
from bntool.experiment import folder
from bntool.files import memory, sidecar
from bntool.inserting import InsertOptions
from bntool.report import shapes


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\x80\x02", "not JSON"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "'c' twice"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"1" * 5_000, "5,000 digits"),
        (b"[" + b"1" * 21 + b"]", "21 digits"),
        (b"[" + b"0," * (1 << 22) + b"0]", "more than 2,097,152 values"),
        (b'"' + b"x" * (1 << 26) + b'"', "larger than 64 MiB"),
        (b'{"a": "\\ud800"}', "half a character"),
        (b'{"\\udfff\\ud800": 1}', "half a character"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_document_within_bounds_is_damaged_at_once(raw: bytes, why: str) -> None:
    started = time.monotonic()
    with pytest.raises(Damaged, match=why):
        parsed(raw)
    assert time.monotonic() - started < 2


def test_a_mark_before_the_text_is_let_pass_and_what_is_no_number_is_nothing() -> None:
    assert parsed(b'\xef\xbb\xbf{"a": [NaN, -Infinity, 1]}') == {"a": [None, None, 1]}
    assert parsed(rb'"\ud83d\ude00"') == "\U0001f600"
    assert parsed(rb'"\udcff"', halves=True) == "\udcff"


def test_no_more_of_a_file_is_read_than_a_document_may_have(tmp_path: Path) -> None:
    with (tmp_path / "x.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(Damaged, match="larger than 64 MiB"):
        schema.read(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("data", "kind", "place"),
    [
        ({"a": [1, "x"]}, dict[str, tuple[Index, ...]], "[...][1]"),
        (True, Index, ""),
        (1.0, Index, ""),
        (1 << 70, Index, ""),
        ([1] * 33, Shape, ""),
        ([-1], Shape, "[0]"),
        ([1 << 40], Shape, "[0]"),
        (math.inf, Finite, ""),
        (None, Finite, ""),
        ("x" * 5000, Name, ""),
    ],
    ids=ascii,
)
def test_what_does_not_fit_is_damaged_with_its_place(data: Any, kind: Any, place: str) -> None:
    with pytest.raises(Damaged) as caught:
        fitted(data, kind)
    assert caught.value.place == place
    assert caught.value.why


@pytest.mark.parametrize(("data", "kind"), [("layer.0/Conv:0 ∂", Name), ([3, 0], Shape), (1, Finite)])
def test_what_fits_comes_back(data: Any, kind: Any) -> None:
    assert list(fitted(data, kind)) == data if isinstance(data, list) else fitted(data, kind) == data


@pytest.mark.parametrize("version", [None, "1", True, 1.0, 0, -1, [1]])
def test_a_version_is_a_whole_number_from_one(version: Any) -> None:
    assert version_of({"schema_version": version}) is None
    assert version_of(json.loads('{"schema_version": 1}')) == 1
    assert version_of([version]) is None


KINDS: dict[str, Any] = {
    "plan of an insertion": plan._Insertion,
    "plan of a fold": plan._Fold,
    "side file": sidecar._SideFile,
    "record": memory.Record,
    "report": shapes._Reported,
    "sites of a fold": tuple[shapes._Folded, ...],
    "sites of an insertion": tuple[shapes._Inserted, ...],
    "list of sites": site_list._Names,
    "settings": dict[Name, folder._Setting],
    "options": InsertOptions,
    **{f"step {name}": kinds for name, (kinds, _) in maps._STEPS.items()},
}


def _types_in(found: Any, seen: set[type]) -> Iterator[Any]:
    """Every type in what msgspec tells of one."""
    if isinstance(found, inspect.Type | inspect.Field):
        if cls := getattr(found, "cls", None):
            if cls in seen:
                return
            seen.add(cls)
        yield found
        for field in type(found).__struct_fields__:
            yield from _types_in(getattr(found, field), seen)
    elif isinstance(found, tuple):
        for one in found:
            yield from _types_in(one, seen)


def _unsafe(told: Any) -> list[Any]:
    """Unions of a text with a pattern and something that holds others."""
    return [
        union
        for union in _types_in(told, set())
        if isinstance(union, inspect.UnionType)
        and any(getattr(one, "pattern", None) for one in union.types)
        and any(isinstance(one, inspect.CollectionType | inspect.DictType) for one in union.types)
    ]


@pytest.mark.parametrize("name", KINDS)
def test_no_kind_is_one_that_the_library_reads_unsafely(name: str) -> None:
    assert not _unsafe(inspect.type_info(KINDS[name]))


def test_such_a_kind_would_be_found() -> None:
    # told by hand: to have the library tell of one is to have it write beyond its memory
    name, held = inspect.StrType(pattern="a"), inspect.ListType(inspect.IntType())
    assert _unsafe(inspect.ListType(inspect.UnionType((inspect.NoneType(), name, held))))
    assert _unsafe(inspect.UnionType((name, inspect.DictType(name, name))))
    assert not _unsafe(inspect.UnionType((name, inspect.NoneType())))
