"""How deep a pickle nests, however it is written."""

from __future__ import annotations

import pickle
import pickletools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bntool.files.security.archives import Damaged
from bntool.files.security.nesting import DEEPEST, is_nested_deeply

_WRAPPINGS = {
    "list": lambda inner: [inner, 0],
    "tuple": lambda inner: (inner,),
    "long tuple": lambda inner: (0, 1, 2, inner),
    "dict": lambda inner: {"a": inner},
    "beside others": lambda inner: [1, [], inner],
}


def _wrapped(kinds: list[str], leaf: Any) -> Any:
    for kind in kinds:
        leaf = _WRAPPINGS[kind](leaf)
    return leaf


@given(
    st.lists(st.sampled_from(sorted(_WRAPPINGS)), max_size=60),
    st.none() | st.integers() | st.text(max_size=3),
    st.integers(0, 4),
)
def test_what_is_not_deep_passes(kinds: list[str], leaf: object, protocol: int) -> None:
    # Without the memo, which Python fills before a list and torch after it.
    written = pickletools.optimize(pickle.dumps(_wrapped(kinds, leaf), protocol=protocol))
    assert not is_nested_deeply(written)


@pytest.mark.parametrize(
    "deep",
    [
        b")" + b"\x85" * (DEEPEST + 1),
        b"]" * (DEEPEST + 2) + b"a" * (DEEPEST + 1),
        b"(" * (DEEPEST + 2) + b"t" * (DEEPEST + 2),
        b"}U\x01k" * (DEEPEST + 2) + b"N" + b"s" * (DEEPEST + 2),
        b")" + b"q\x000h\x00\x85" * (DEEPEST + 1),
        b"]q\x000]h\x00a0h\x00]a",
        b")" + b"\x85" * (DEEPEST + 1) + b"0)",
    ],
    ids="tuples lists marked dicts memo filled-later dropped".split(),
)
def test_depth_is_counted_however_it_is_made(deep: bytes) -> None:
    assert is_nested_deeply(b"\x80\x02" + deep + b".")


@pytest.mark.parametrize(
    "damaged", [b"", b"\x80\x02", b"\x80\x02\x85.", b"h\x07.", b"t.", b"(\x85.", b"\xff."]
)
def test_no_pickle_at_all(damaged: bytes) -> None:
    with pytest.raises(Damaged):
        is_nested_deeply(damaged)
