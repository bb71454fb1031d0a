"""A look at an exported program: its operators counted, its tensors by the tables that describe them."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from bntool.core.limits import Limit
from bntool.files.looking import Found, TensorRow
from bntool.files.security.containers import Container
from bntool.files.security.pickled_calls import shown

# torch.ScalarType as the schema numbers it -> torch's name and the bytes of one element.
_SCALAR_TYPES = {
    1: ("uint8", 1), 2: ("int8", 1), 3: ("int16", 2), 4: ("int32", 4), 5: ("int64", 8), 6: ("float16", 2),
    7: ("float32", 4), 8: ("float64", 8), 12: ("bool", 1), 13: ("bfloat16", 2),
}  # fmt: skip


def look_at_program(container: Container, limit: Limit, found: Found) -> None:
    """Fill `found` from the JSON of the archive, as far as it is what torch.export.save writes."""
    for name, size in container.sizes.items():
        if not name.endswith(".json") or size > limit.structure:
            continue
        try:
            document = json.loads(container.read(name))
        except (ValueError, RecursionError):
            continue  # whoever reads the program says so
        graph = _table(_table(_table(document).get("graph_module")).get("graph"))
        nodes = graph.get("nodes")
        if isinstance(nodes, list):
            found.facts["torch_version"] = shown(str(_table(document).get("torch_version", "")))
            found.facts["nodes"] = dict(
                Counter(shown(str(_table(node).get("target"))) for node in nodes).most_common()
            )
        for name, entry in _table(_table(document).get("config")).items():
            row = _row(name, _table(_table(entry).get("tensor_meta")))
            found.tensors += [row] if row else []


def _row(name: str, meta: dict[str, Any]) -> TensorRow | None:
    sizes = [_table(size).get("as_int") for size in meta.get("sizes") or []]
    if not meta or not all(type(n) is int and n >= 0 for n in sizes):
        return None
    dtype, item = _SCALAR_TYPES.get(meta.get("dtype", 0), (f"type {meta.get('dtype')}", 1))
    return TensorRow.of(shown(name), dtype, tuple(n for n in sizes if n is not None), item)


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
