"""Writing a model as several safetensors files: the files first, then the index that makes them one."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from bntool.errors import LoadError
from bntool.files.atomic import require_writable, sha256_of, write_atomically
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
    *,
    force: bool = False,
    forbid: Iterable[Path] = (),
) -> str:
    """Write the shards that `parts` (tensor -> old shard) names, then the index; return the index's sha256.

    `write` fills a file with the tensors of one old shard. The new files have names of their own, after
    their content, so that an index that is replaced is whole until it is gone; what it named goes then.
    """
    forbid = tuple(forbid)
    require_writable(output, force=force, forbid=forbid)
    stem = output.name.removesuffix(INDEX_SUFFIX)
    earlier = _earlier(output, stem)
    shards = list(dict.fromkeys(parts.values()))
    # Told by what will be in it, so that the same model has the same names.
    waiting = {shard: output.with_name(f".{stem[:80]}.{secrets.token_hex(6)}.tmp") for shard in shards}
    names: dict[str, str] = {}
    made: list[Path] = []
    try:
        for number, shard in enumerate(shards, start=1):
            write_atomically(waiting[shard], functools.partial(write, shard))
            digest = sha256_of(waiting[shard])[:12]
            name = f"{stem}-{digest}-{number:05}-of-{len(shards):05}.safetensors"
            names[shard] = name
            target = output.with_name(name)
            if not target.exists():
                made.append(target)
            waiting[shard].replace(target)
        total = {"total_size": sum(sizes[name] for name in parts)}
        index = {
            "metadata": {**metadata, **total},
            "weight_map": {name: names[shard] for name, shard in parts.items()},
        }
        text = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
        write_atomically(output, lambda path: _write_text(path, text), force=force, forbid=forbid)
    except BaseException:
        for path in (*waiting.values(), *made):
            with contextlib.suppress(OSError):
                path.unlink()
        raise
    for name in earlier - set(names.values()):
        with contextlib.suppress(OSError):
            output.with_name(name).unlink()
    return hashlib.sha256(text.encode()).hexdigest()


def _earlier(output: Path, stem: str) -> set[str]:
    """The shards of the index that is replaced, as far as bntool gave them their names."""
    with contextlib.suppress(LoadError, OSError):
        shards = read_index(output).shards
        return {n for n in shards if n.startswith(stem) and _OWN_SHARD.fullmatch(n[len(stem) :])}
    return set()


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")
