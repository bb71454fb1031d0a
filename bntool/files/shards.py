"""Writing a model as several safetensors files: the files first, then the index that makes them one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from bntool.core.errors import LoadError
from bntool.files.atomic import sha256_of, write_text
from bntool.files.drafting import Drafts
from bntool.files.safetensors_files import INDEX_SUFFIX, read_index

_OWN_SHARD = re.compile(r"-[0-9a-f]{12}-\d{5}-of-\d{5}\.safetensors")


def shard_of(before: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    """The shard of every name: where it was, else where its layer is, else the first."""
    first = next(iter(before.values()))
    by_layer = {name.rpartition(".")[0]: shard for name, shard in before.items()}
    return {name: before.get(name) or by_layer.get(name.rpartition(".")[0], first) for name in names}


def write_shards(
    output: Path,
    parts: Mapping[str, str],
    sizes: Mapping[str, int],
    metadata: Mapping[str, Any],
    write: Callable[[str, Path], None],
    drafts: Drafts,
) -> str:
    """Write drafts of the shards that `parts` (tensor -> old shard) names, and of the index; its sha256.

    `write` fills a file with the tensors of one old shard. The new files have names of their own, after
    their content, so that an index that is replaced is whole until it is gone; what it named goes then.
    """
    stem = output.name.removesuffix(INDEX_SUFFIX)
    shards = list(dict.fromkeys(parts.values()))
    names: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        draft = drafts.folder_for(output) / "shard"
        write(shard, draft)
        # Told by what is in it, so that the same model has the same names.
        names[shard] = f"{stem}-{sha256_of(draft)[:12]}-{number:05}-of-{len(shards):05}.safetensors"
        drafts.put(draft, output.with_name(names[shard]))
    drafts.retire(lambda: own_shards(output) - {output.with_name(name) for name in names.values()})
    total = {"total_size": sum(sizes[name] for name in parts)}
    index = {
        "metadata": {**metadata, **total},
        "weight_map": {name: names[shard] for name, shard in parts.items()},
    }
    text = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
    write_text(drafts.of(output), text)
    return hashlib.sha256(text.encode()).hexdigest()


def own_shards(index: Path) -> set[Path]:
    """The shards of an index, as far as bntool gave them their names."""
    stem = index.name.removesuffix(INDEX_SUFFIX)
    with contextlib.suppress(LoadError, OSError):
        shards = read_index(index).shards
        own = (n for n in shards if n.startswith(stem) and _OWN_SHARD.fullmatch(n[len(stem) :]))
        return {index.with_name(name) for name in own}
    return set()
