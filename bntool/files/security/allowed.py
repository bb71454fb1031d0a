"""What the user names with --allow: classes, and packages of which a file may use the classes."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import types
from collections.abc import Iterable, Mapping
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from bntool.core.errors import LoadError, UsageError
from bntool.files.scripts import import_path, import_script, script_of
from bntool.files.security.pickled_calls import shown
from bntool.files.security.rules import builtin_allowance, home_of, why_never, why_not

_WORD = r"[A-Za-z_]\w*"
_ENTRY = re.compile(
    rf"(?P<module>{_WORD}(?:\.{_WORD})*|.+\.py(?=:))(?P<colon>[.:])(?P<name>{_WORD}|\*)", re.ASCII | re.DOTALL
)


@dataclasses.dataclass(frozen=True)
class Granted:
    """Name in a file -> class, for what --allow names; why names of its packages are refused or absent."""

    classes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)
    absent: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True)
class _Entry:
    """`pkg.mod.name`, `script:name`, `path/script.py:name`, or with the name `*` all below `pkg.mod`."""

    text: str
    module: str
    name: str
    of_script: bool

    @classmethod
    def parse(cls, text: str) -> _Entry:
        match = _ENTRY.fullmatch(text)
        unclear = match is None or (match["name"] == "*" and match["colon"] == ":")
        if match is None or unclear or (match["name"] == "py" and Path(text).is_file()):
            raise UsageError(
                f"--allow {shown(text)} names no class",
                next_step="write --allow pkg.mod.Class, --allow script.py:Class for a class of a script, or "
                "--allow pkg.mod.* for the classes of a package",
            )
        entry = cls(text, match["module"], match["name"], match["colon"] == ":")
        name = f"{entry.module}.{entry.name}"
        why = why_never(name)
        if why and not entry.module.endswith(".py") and builtin_allowance(name) is None:
            raise entry.refused(why)
        return entry

    def refused(self, why: str, next_step: str = "") -> UsageError:
        return UsageError(
            f"--allow {shown(self.text)} is refused: it is {why}",
            next_step=next_step or "allow layers and enums only; --trust-pickle runs whatever a file holds",
        )

    def imported(self) -> types.ModuleType:
        if self.module.endswith(".py"):
            return import_script(Path(self.module))
        try:
            return import_path(self.module)
        except LoadError:
            outer, _, inner = self.module.rpartition(".")
            with contextlib.suppress(LoadError):
                if outer and isinstance(getattr(import_path(outer), inner, None), type):
                    raise self.refused(f"inside the class {self.module}, and no class of a module") from None
            raise

    def found(self) -> tuple[types.ModuleType, Any]:
        """The class, not judged yet, and the module that it was found in."""
        module = self.imported()
        found = getattr(module, self.name, None)
        if found is None:
            raise LoadError(
                f"--allow {shown(self.text)}: {module.__name__} has no {self.name}",
                where=getattr(module, "__file__", None) or "",
                next_step="check the name of the class",
            )
        return module, found

    def names(self, module: types.ModuleType, found: Any) -> dict[str, Any]:
        names = [f"{module.__name__}.{self.name}"]
        if isinstance(found, type):
            names.append(home_of(found))
        if self.of_script:
            names.append(f"__main__.{self.name}")
        return dict.fromkeys(names, found)


def user_allowance(entries: Iterable[str], names: Iterable[str] = ()) -> Granted:
    """What the entries let a file use that refers to `names`.

    Entries: `pkg.mod.Class`, `script:Class` and `path/script.py:Class`, which also stand for
    `__main__.Class`, and `pkg.mod.*` for the names of the file below that package. Raises `UsageError` for
    an entry that may never be allowed, `LoadError` for one that cannot be imported.
    """
    classes: dict[str, Any] = {}
    refused: dict[str, str] = {}
    absent: set[str] = set()
    for entry in map(_Entry.parse, entries):
        if entry.name == "*":
            below = _below(entry.imported(), sorted(names))
            absent.update(name for name, found in below.items() if found is None)
            refused.update({name: why for name, why in below.items() if isinstance(why, str)})
            classes.update({name: found for name, found in below.items() if isinstance(found, type)})
        else:
            classes.update(_class(entry))
    return Granted(classes, refused, frozenset(absent))


def trusted_names(entries: Iterable[str]) -> dict[str, Any]:
    """What the entries stand for in a file that is trusted wholly: found, and not judged."""
    return {
        name: found
        for entry in map(_Entry.parse, entries)
        if entry.name != "*"
        for name, found in entry.names(*entry.found()).items()
    }


def allow_entries_for(names: Iterable[str]) -> tuple[str, ...]:
    """The `--allow` entries under which these names load again; a script's classes by its path."""
    entries = []
    for name in sorted(names):
        module, _, attribute = name.rpartition(".")
        script = script_of(module)
        entries.append(f"{script}:{attribute}" if script else name)
    return tuple(entries)


def _class(entry: _Entry) -> dict[str, Any]:
    known = builtin_allowance(f"{entry.module}.{entry.name}")
    if known is not None:
        return {f"{entry.module}.{entry.name}": known}
    module, found = entry.found()
    why = why_not(found)
    if why:
        raise entry.refused(why)
    home = home_of(found)
    own = {module.__name__} if entry.of_script else {module.__name__, entry.module.partition(".")[0]}
    if not any(_is_below(home, package) for package in own):
        why = why_never(home)
        raise entry.refused(f"defined elsewhere: {home}", f"--allow {home}" if why is None else "")
    return entry.names(module, found)


def _below(package: types.ModuleType, names: Iterable[str]) -> dict[str, Any]:
    """For each name below the package: its class, or in words why it is refused, or None for none there."""
    found: dict[str, Any] = {}
    for name in names:
        module, _, attribute = name.rpartition(".")
        if not _is_below(module, package.__name__) or builtin_allowance(name) is not None:
            continue
        inside = _module_inside(package, module)
        # Not getattr: the package's own __getattr__ would be called with the file's words.
        value = vars(inside).get(attribute) if inside else None
        why = None if value is None else why_never(name) or why_not(value)
        if value is not None and not why and not _is_below(home_of(value), package.__name__):
            why = f"defined elsewhere: {home_of(value)}"
        found[name] = why or value
    return found


def _module_inside(package: types.ModuleType, name: str) -> types.ModuleType | None:
    """A module of the package, imported only where it lies in the package's own folder."""
    roots = [Path(root).resolve() for root in getattr(package, "__path__", ())]
    module, path = package, package.__name__
    for part in name.removeprefix(package.__name__).split(".")[1:]:
        path = f"{path}.{part}"
        spec = PathFinder.find_spec(path, getattr(module, "__path__", ()))
        # __main__ is no module to import, but a program.
        if part.startswith("__") or spec is None or not _lies_in(spec, roots):
            return None
        module = import_path(path)
    return module


def _lies_in(spec: ModuleSpec, roots: list[Path]) -> bool:
    """Whether the file of a module, or every folder of a package without one, lies below one of the roots."""
    places = [spec.origin] if spec.origin else [*(spec.submodule_search_locations or ())]
    return bool(places) and all(any(Path(p).resolve().is_relative_to(r) for r in roots) for p in places)


def _is_below(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")
