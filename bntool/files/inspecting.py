"""What a file is, found without loading it: its kind, the classes it needs, its tensors, what is suspicious.

Pickles are read as pictures (`stand_ins`) and dry runs (`opcodes`), safetensors by their header, ONNX and
exported programs by their structure. No code of a file is run, and no tensor's numbers are read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from bntool.core.errors import LoadError
from bntool.core.limits import Limit
from bntool.files.detect import FileKind, Kind, detect
from bntool.files.grouping import Group, grouped
from bntool.files.inspecting_onnx import look_at_onnx
from bntool.files.inspecting_program import look_at_program
from bntool.files.looking import Found, TensorRow
from bntool.files.safetensors_files import Header, read_header, read_index
from bntool.files.security.archives import Unsafe
from bntool.files.security.containers import PICKLED, SCRIPT, Container, within
from bntool.files.security.dry_runs import dry_run_of_archive
from bntool.files.security.exported import judge_program, open_program
from bntool.files.security.opcodes import DryRun
from bntool.files.security.pickle_bytes import DamagedPickle
from bntool.files.security.pickled_calls import shown
from bntool.files.security.pickles import standing
from bntool.files.security.scripted import check_script
from bntool.files.security.stand_ins import Picture, in_words, pictured_tensors
from bntool.files.tensors import told_by


@contextlib.contextmanager
def _noted(found: Found) -> Iterator[None]:
    """What is unsafe is written down; it is no damage."""
    try:
        yield
    except Unsafe as error:
        found.suspect(str(error))


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What one file is. `error` is why it cannot be loaded as it is; None where nothing is in the way."""

    path: Path
    size: int
    kind: FileKind
    found: Found
    error: LoadError | None = None

    @property
    def tensor_bytes(self) -> int:
        return sum(row.nbytes for row in self.found.tensors)

    @property
    def groups(self) -> list[Group]:
        keyed = str(self.found.facts.get("holds", "")).startswith("a dict of ")
        return grouped(self.found.tensors, keyed=keyed)

    def to_dict(self) -> dict[str, Any]:
        return {
            "status": "ok" if self.error is None else self.error.status,
            "file": str(self.path),
            "bytes": self.size,
            "kind": str(self.kind.kind),
            "description": self.kind.description,
            "detail": self.kind.detail,
            "facts": self.found.facts,
            "classes": [{"name": n, "standing": s} for n, s in self.found.classes.items()],
            "tensors": [row.to_dict() for row in self.found.tensors],
            "tensor_bytes": self.tensor_bytes,
            "groups": [group.to_dict() for group in self.groups],
            "suspicious": self.found.suspicious,
            **({"error": self.error.to_dict()} if self.error else {}),
        }


def inspect_file(path: Path, limit: Limit | None = None) -> Inspection:
    """Look at a file. `LoadError` only where there is no file to look at."""
    limit = limit or Limit()
    kind = detect(path)
    found = Found()
    error: LoadError | None = None
    try:
        look = _LOOKS.get(kind.kind)
        if look is None:
            raise LoadError(f"{path.name} is {kind.description}", where=str(path), next_step=kind.next_step)
        with _noted(found):
            look(path, kind, limit, found)
        if found.suspicious:
            error = LoadError(
                f"{path.name} is not to be trusted: it {found.suspicious[0]}",
                where=str(path),
                next_step="get the weights as safetensors, from someone you know",
            )
    except LoadError as failure:
        error = failure
    except Exception as failure:  # noqa: BLE001  any error can come out of a damaged file
        text = shown(str(failure).strip().split("\n")[0]) or type(failure).__name__
        error = LoadError(
            f"{path.name} is damaged: {text}", where=str(path), next_step="download or copy it again"
        )
    return Inspection(path, path.stat().st_size, kind, found, error)


def _torch_zip(path: Path, _: FileKind, limit: Limit, found: Found) -> None:
    with path.open("rb") as opened:
        container = Container(opened, PICKLED, within(limit, path))
        _pickle(container.read("data.pkl"), path, found)
        dry_run_of_archive(container)
        cost = {"data": sum(row.nbytes for row in found.tensors), "tensors": len(found.tensors)}
        limit.require(path.name, **cost, structure=container.sizes["data.pkl"], where=str(path))


def _torch_legacy(path: Path, _: FileKind, limit: Limit, found: Found) -> None:
    """Magic, protocol, machine, the object, storage keys: the object is the fourth pickle."""
    with path.open("rb") as file:
        content = file.read(limit.structure)
    rest, needed = content, 0
    for number in range(5):
        picture = Picture(rest).read_all()
        if number == 3:
            storages = _pickle(rest, path, found).storages.values()
            # Before the numbers of each stands their count.
            needed = sum(8 + storage.nbytes for storage in storages)
        elif picture.globals:
            found.suspect("refers to classes before its object begins")
        if picture.damage:
            raise DamagedPickle(picture.damage)
        rest = rest[picture.file.tell() :]
    if needed > path.stat().st_size - (len(content) - len(rest)):
        raise DamagedPickle("the data of some tensors is missing")
    cost = {"data": needed, "tensors": len(found.tensors)}
    limit.require(path.name, **cost, structure=len(content) - len(rest), where=str(path))


def _unsafe_zip(_: Path, kind: FileKind, __: Limit, found: Found) -> None:
    found.suspect(kind.detail)


def _plain_pickle(path: Path, kind: FileKind, limit: Limit, found: Found) -> None:
    with path.open("rb") as file:
        _pickle(file.read(limit.structure), path, found)
    raise LoadError(f"{path.name} is {kind.description}", where=str(path), next_step=kind.next_step)


def _perhaps_pickle(path: Path, kind: FileKind, limit: Limit, found: Found) -> None:
    """Pickles of the first protocols have no mark of their own."""
    with path.open("rb") as file:
        content = file.read(limit.structure)
    picture = Picture(content).read_all()
    if picture.globals and not picture.damage:
        _plain_pickle(path, kind, limit, found)
    raise LoadError(f"{path.name} is {kind.description}", where=str(path), next_step=kind.next_step)


def _script(path: Path, _: FileKind, limit: Limit, found: Found) -> None:
    with path.open("rb") as opened:
        container = Container(opened, SCRIPT, within(limit, path))
        names = _list_members(container, found)
        found.facts["code"] = [n for n in names if n.startswith("code/") and n.endswith(".py")][:20]
        picture = Picture(container.read("data.pkl")).read_all()
        _list_tensors(picture.value, found)
        if picture.damage:
            raise DamagedPickle(picture.damage)
        found.facts["holds"] = "a TorchScript module"
        check_script(container)


def _program(path: Path, _: FileKind, limit: Limit, found: Found) -> None:
    with path.open("rb") as opened:
        container = open_program(opened, path, limit)
        found.facts["members"] = _list_members(container, found)[:200]
        for name, size in container.sizes.items():
            if name.endswith((".pt", ".pkl")) and size <= limit.structure:
                _nested(name, container.read(name), path, found)
        look_at_program(container, limit, found)
        try:
            judge_program(container, path)
        except LoadError as refusal:
            if "refused unread" in refusal.what:
                found.suspect(refusal.what.partition(": it ")[2])
            raise


def _nested(name: str, content: bytes, path: Path, found: Found) -> None:
    """A pickle inside of another archive: an archive of torch.save, or a bare one."""
    inner = Found()
    with contextlib.suppress(Exception):
        if content[:2] == b"PK":
            content = Container(io.BytesIO(content), PICKLED).read("data.pkl")
        _pickle(content, path, inner)
    found.classes.update({n: s for n, s in inner.classes.items() if n not in found.classes})
    found.suspicious += [f"has in {shown(name)} a pickle that {why}" for why in inner.suspicious]


def _safetensors(path: Path, _: FileKind, limit: Limit, found: Found) -> None:
    header = read_header(path, limit)
    found.facts["metadata"] = dict(header.metadata)
    found.tensors += _rows(header)


def _index(path: Path, _: FileKind, limit: Limit, found: Found) -> None:
    index = read_index(path, limit)
    found.facts["files"] = {
        name: {"tensors": len(header.entries), "bytes": header.path.stat().st_size}
        for name, header in index.shards.items()
    }
    found.facts["metadata"] = dict(index.metadata)
    for header in index.shards.values():
        found.tensors += _rows(header)


def _onnx(path: Path, _: FileKind, limit: Limit, found: Found) -> None:
    limit.require(path.name, data=path.stat().st_size, where=str(path))
    look_at_onnx(path, found)


_LOOKS: dict[Kind, Callable[[Path, FileKind, Limit, Found], None]] = {
    Kind.TORCH_ZIP: _torch_zip,
    Kind.TORCH_LEGACY: _torch_legacy,
    Kind.PICKLE: _plain_pickle,
    Kind.TORCHSCRIPT: _script,
    Kind.PT2: _program,
    Kind.ZIP_UNSAFE: _unsafe_zip,
    Kind.SAFETENSORS: _safetensors,
    Kind.SAFETENSORS_INDEX: _index,
    Kind.ONNX: _onnx,
    Kind.TEXT: _perhaps_pickle,
    Kind.UNKNOWN: _perhaps_pickle,
}


def _pickle(content: bytes, path: Path, found: Found) -> DryRun:
    """What one pickle holds, its classes, its tensors, and what is suspicious; the dry run of it."""
    picture = Picture(content).read_all()
    found.classes.update(standing(picture.globals))
    refused = [name for name, how in found.classes.items() if how == "refused"]
    other = told_by(found.classes, refused)
    if refused and other is None:
        found.suspect(f"refers to {', '.join(map(shown, refused[:8]))}, through which a file can run code")
    run = DryRun()
    damage = picture.damage
    try:
        run.run(io.BytesIO(content))
    except DamagedPickle as error:
        damage = damage or str(error)
    for problem in run.problems:
        found.suspect(problem)
    _list_tensors(picture.value, found)
    found.facts["holds"] = in_words(picture.value)
    if damage:
        raise LoadError(
            f"{path.name} is damaged: {shown(damage)}",
            where=str(path),
            next_step="download or copy it again",
        )
    if other is not None:
        raise other.error(path)
    return run


def _list_tensors(value: Any, found: Found) -> None:
    for tensor in pictured_tensors(value):
        item = getattr(getattr(torch, tensor.dtype, None), "itemsize", 1)
        found.tensors.append(TensorRow.of(tensor.name, tensor.dtype, tensor.shape, item))


def _rows(header: Header) -> Iterable[TensorRow]:
    return (TensorRow(n, e.torch_dtype, e.shape, e.nbytes) for n, e in header.entries.items())


def _list_members(container: Container, found: Found) -> list[str]:
    found.facts["member_count"] = len(container.sizes)
    found.facts["extensions"] = dict(Counter(Path(name).suffix for name in container.sizes).most_common(8))
    return [shown(name) for name in container.sizes]
