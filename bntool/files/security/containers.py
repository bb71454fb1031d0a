"""What each kind of archive may hold: names that its honest writers give, and nothing beside them.

torch's reader ignores case, so names that differ by it alone count as one, and a name is known only as it is
written. What is not known is refused, not skipped: another reader, or a later one, may read it.
"""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from bntool.core.limits import Limit
from bntool.files.security.archives import Archive, Damaged, Member, Unsafe, quoted

_BOOKKEEPING = r"version|byteorder|\.data/version|\.data/serialization_id"
_EXTRA = r"extra/.+"


@dataclasses.dataclass(frozen=True)
class Contents:
    """What one kind of archive may hold.

    `known` are the names of its members, below its one folder where it is `foldered`; `packed` those that may
    be deflated. `maker` is who writes such archives.
    """

    maker: str
    known: re.Pattern[str]
    packed: re.Pattern[str] | None = None
    foldered: bool = True
    ignores_case: bool = True


PICKLED = Contents(
    "torch.save",
    re.compile(rf"data\.pkl|data/[0-9]+|\.format_version|\.storage_alignment|{_BOOKKEEPING}"),
)
SCRIPT = Contents(
    "torch.jit.save",
    re.compile(
        r"(data|constants|traced_inputs|bytecode|mobile_debug_handles)\.pkl|(data|constants|traced_inputs)/\d+"
        rf"|code/[\w./]+\.py(\.debug_pkl)?|{_EXTRA}|{_BOOKKEEPING}",
        re.ASCII,
    ),
    packed=re.compile(r"code/.+"),
)
PROGRAM = Contents(
    "torch.export.save",
    re.compile(
        r"archive_format|archive_version|models/model\.json|data/sample_inputs/model\.pt"
        r"|data/(weights|constants)/(\w+|model\.pt|model_(weights|constants)_config\.json)"
        rf"|{_EXTRA}|{_BOOKKEEPING}",
        re.ASCII,
    ),
)
OLD_PROGRAM = Contents(
    "torch.export.save",
    re.compile(
        r"version|serialized_exported_program\.json"
        r"|serialized_(state_dict|constants|example_inputs)\.pt|extra_files/.+"
    ),
    foldered=False,
)
ARRAYS = Contents(
    "numpy.savez",
    re.compile(r".+\.npy"),
    packed=re.compile(r".+\.npy"),
    foldered=False,
    ignores_case=False,
)


class Container(Archive):
    """An archive that holds what its kind may hold. Names are those below its one folder.

    Args:
        file: an opened file, which stays open for as long as the container is used.
        contents: what it may hold.
        room: raises where the members are too large; called before any of them is read. Without it none may
            be packed.

    Raises `Damaged` or `Unsafe`.
    """

    def __init__(self, file: BinaryIO, contents: Contents, room: Room | None = None) -> None:
        super().__init__(file)
        self._root = _root_of(self.members) if contents.foldered else ""
        self.sizes = {name[len(self._root) :]: member.size for name, member in self.members.items()}
        _check_names(self.sizes, contents)
        for name, member in zip(self.sizes, self.members.values(), strict=True):
            may_be = room is not None and contents.packed is not None and contents.packed.fullmatch(name)
            if member.is_packed and not may_be:
                raise Unsafe(f"packs {quoted(name)}, which {contents.maker} never does")
        if room is not None:
            room(self)
        self.check_sums()

    def read(self, name: str) -> bytes:
        """A member's bytes, which whoever loads `file` reads too. `Damaged` where there is none."""
        return self.content(self._named(name))

    def numbers(self, name: str) -> bytearray:
        """A member's bytes in memory of their own, not kept for anyone else."""
        member = self._named(name)
        if member.is_packed:
            return bytearray(self.content(member))
        content = bytearray(member.size)
        self.file.seek(member.begin)
        self.file.readinto(content)
        return content

    def offset(self, name: str) -> int:
        """Where in the file a member's bytes begin, as they are stored."""
        return self._named(name).begin

    def _named(self, name: str) -> Member:
        if name not in self.sizes:
            raise Damaged(f"{quoted(name)} is missing")
        return self.members[self._root + name]


Room = Callable[[Container], None]


def within(limit: Limit, path: Path) -> Room:
    """Room for an archive of a model: its tensors, and its structure of pickles, JSON and code."""

    def require(container: Container) -> None:
        structure = sum(n for name, n in container.sizes.items() if name.endswith((".pkl", ".json", ".py")))
        limit.require(path.name, data=sum(container.sizes.values()), structure=structure, where=str(path))

    return require


def _root_of(members: dict[str, Member]) -> str:
    """The one folder, with its slash: torch takes the first member's for that of all."""
    root = next(iter(members), "").split("/")[0] + "/"
    if odd := [name for name in members if not name.startswith(root)]:
        raise Unsafe(f"has a member outside its one folder: {quoted(odd[0])}")
    return root


def _check_names(names: dict[str, int], contents: Contents) -> None:
    # torch would take such a folder for the root of the archive, and everything in it for the program.
    if not contents.foldered and contents.ignores_case and "/" in next(iter(names), ""):
        raise Unsafe("begins with a folder, in which torch would look for another program")
    if odd := [name for name in names if not contents.known.fullmatch(name)]:
        raise Unsafe(f"has a member that {contents.maker} does not write: {quoted(odd[0])}")
    if contents.ignores_case and len({_folded(name) for name in names}) != len(names):
        raise Unsafe("has members whose names differ by case alone, which torch takes for one")


def _folded(name: str) -> str:
    return unicodedata.normalize("NFKC", name).casefold()
