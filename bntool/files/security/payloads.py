"""The tensors of an exported program: a table of them in JSON, and one member for the bytes of each."""

from __future__ import annotations

import math
import re
from typing import Any

from bntool.files.security.archives import Damaged, Unsafe
from bntool.files.security.containers import Container
from bntool.files.security.pickled_calls import MAX_EXPANSION_BYTES, MOST_EXPANDED, shown
from bntool.files.security.pickles import check_plain_data
from bntool.files.security.program_scan import check_name, read_json

_MEMBER = re.compile(r"\w+", re.ASCII)
# torch.ScalarType as the schema numbers it -> bytes of one element.
_ITEM_BYTES = {
    1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 2, 7: 4, 8: 8, 9: 4, 10: 8, 11: 16, 12: 1, 13: 2, 28: 2,
    29: 1, 30: 1, 31: 1, 32: 1, 33: 1, 34: 4, 35: 8,
}  # fmt: skip


def check_table(container: Container, folder: str, table: str) -> None:
    """Judge every entry of a table of weights or constants. Raises `Unsafe` or `Damaged`."""
    document = read_json(container.read(table), table)
    entries = document.get("config") if isinstance(document, dict) else None
    if not isinstance(entries, dict):
        raise Damaged(f"{table} has no table of tensors")
    expanded = 0
    for name, entry in entries.items():
        check_name(name)
        if not isinstance(entry, dict):
            raise Damaged(f"{table} does not describe {shown(name)}")
        member = entry.get("path_name")
        if not isinstance(member, str) or not _MEMBER.fullmatch(member):
            raise Unsafe(f"keeps {shown(name)} in a member of an odd name: {shown(str(member))}")
        if member.startswith(("custom_obj", "opaque_obj")):
            raise Unsafe(f"holds a custom object, {shown(name)}, which is made by code of its own")
        if entry.get("use_pickle"):
            _check_pickled(container, folder + member, name)
        else:
            expanded += _check_tensor(entry.get("tensor_meta"), container, folder + member, name)
    if expanded > MOST_EXPANDED:
        raise Unsafe(f"makes tensors of over {MOST_EXPANDED} bytes from far fewer bytes of data")


def _check_pickled(container: Container, member: str, name: str) -> None:
    try:
        check_plain_data(container.read(member))
    except Unsafe as error:
        raise Unsafe(f"holds a pickle for {shown(name)} that {error}") from error


def _check_tensor(meta: Any, container: Container, member: str, name: str) -> int:
    """A tensor reads its own bytes and no others; by how many bytes it is larger than they are."""
    if member not in container.sizes:
        raise Damaged(f"the data of {shown(name)} is missing")
    if not isinstance(meta, dict):
        raise Damaged(f"{shown(name)} is not described")
    sizes, strides = (_numbers(meta.get(k), name) for k in ("sizes", "strides"))
    (offset,) = _numbers([meta.get("storage_offset")], name)
    item = _ITEM_BYTES.get(meta.get("dtype", 0))
    if item is None or len(sizes) != len(strides):
        raise Unsafe(f"describes the tensor {shown(name)} wrongly")
    held = container.sizes[member]
    if 0 in sizes:
        return 0
    last = offset + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
    if (last + 1) * item > held:
        raise Unsafe(f"describes a tensor, {shown(name)}, that reaches past the end of its data")
    nbytes = math.prod(sizes) * item
    if nbytes > max(held, MAX_EXPANSION_BYTES):
        raise Unsafe(f"makes a tensor, {shown(name)}, far larger than its data")
    return max(nbytes - held, 0)


def _numbers(values: Any, name: str) -> list[int]:
    plain = [v.get("as_int") if isinstance(v, dict) and len(v) == 1 else None for v in values or ()]
    numbers = [n for n in plain if isinstance(n, int) and n >= 0]
    if len(numbers) != len(plain) or any(isinstance(n, bool) for n in numbers):
        raise Unsafe(f"describes the tensor {shown(name)} by something else than numbers")
    return numbers
