"""What a file of torch.save or safetensors holds, read and judged, before anything is made of it."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from bntool.core.errors import LoadError
from bntool.core.limits import Limit
from bntool.files.detect import FileKind, Kind, detect
from bntool.files.references import full_names
from bntool.files.regular import exists
from bntool.files.safetensors_files import read_header, read_index
from bntool.files.security.pickles import read_pickled
from bntool.files.tensors import require_dense
from bntool.files.weights import Found, StateDict, find_weights


@dataclasses.dataclass(frozen=True)
class Reading:
    """What is allowed of a file, and what in it is asked for: as `load` takes it."""

    key: str | None
    allow: tuple[str, ...]
    trust_pickle: bool
    limit: Limit
    stand_ins: bool
    tell: Callable[[str], object] | None


@dataclasses.dataclass(frozen=True)
class Read:
    """What a file held, and for safetensors what it held beside its tensors."""

    found: Found
    kind: FileKind
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    shards: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)


def read_file(path: Path, options: Reading) -> Read:
    """The weights or the module in a file. Raises `LoadError` for what is none, damaged or hostile."""
    if not exists(path):
        raise _missing(path)
    kind = detect(path)
    if kind.kind is Kind.SAFETENSORS:
        header = read_header(path, options.limit)
        held: Any = {name: header.read(name) for name in header.entries}
        return Read(_dense(held, options.key, path), kind, header.metadata)
    if kind.kind is Kind.SAFETENSORS_INDEX:
        index = read_index(path, options.limit)
        held = {name: header.read(name) for name, header in index.headers()}
        shards = {name: tuple(header.entries) for name, header in index.shards.items()}
        return Read(_dense(held, options.key, path), kind, index.metadata, shards)
    if kind.kind not in (Kind.TORCH_ZIP, Kind.TORCH_LEGACY):
        raise _not_loadable(path, kind)
    notes: list[str] = []
    held = read_pickled(
        path,
        kind,
        allow=options.allow,
        trust_pickle=options.trust_pickle,
        limit=options.limit,
        stand_ins=options.stand_ins,
        say=notes.append,
    )
    found = _dense(held, options.key, path)
    return Read(dataclasses.replace(found, notes=(*found.notes, *notes)), kind)


def _dense(held: Any, key: str | None, path: Path) -> Found:
    """The weights in what a file holds, all of them tensors that can be computed with."""
    found = find_weights(held, key, str(path))
    require_dense(_tensors_of(found.value), path)
    return found


def _tensors_of(value: nn.Module | StateDict) -> Iterable[tuple[str, Any]]:
    if isinstance(value, nn.Module):
        return itertools.chain(value.named_parameters(), value.named_buffers())
    return value.items()


def _not_loadable(path: Path, kind: FileKind) -> LoadError:
    not_yet = kind.kind is Kind.ONNX
    source = kind.kind is Kind.TEXT and path.suffix == ".py"
    return LoadError(
        f"{path.name} is {kind.description_in_full}"
        + ("; bntool does not load that kind yet" if not_yet else ""),
        where=str(path),
        next_step=f"name the class in it: {path}:Class" if source else kind.next_step,
    )


def _missing(path: Path) -> LoadError:
    try:
        near = [p.name for p in path.parent.iterdir() if p.is_file()]
    except OSError:
        near = []
    close = difflib.get_close_matches(path.name, near, n=2) or full_names(str(path))
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    return LoadError(
        f"no such file: {path}{hint}",
        next_step="name a file, torchvision:NAME, timm:NAME, pkg.mod:factory or path/file.py:Class",
    )
