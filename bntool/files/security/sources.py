"""What a name stands for, read off the source that defines it: nothing is imported, nothing is run.

What an error proposes comes from here, since a file may name any module.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from importlib.machinery import PathFinder
from pathlib import Path
from typing import NamedTuple

from bntool.files.security.rules import FUNCTION, NO_LAYER, RUN_UNASKED, runs_unasked, why_no_base, why_not

_LARGEST = 2 << 20
_MOST_FILES = 100
_MOST_STEPS = 40
_ENUMS = frozenset(f"enum.{name}" for name in ("Enum", "IntEnum", "StrEnum", "Flag", "IntFlag"))
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class _Module(NamedTuple):
    name: str
    is_package: bool
    top: Mapping[str, ast.stmt]


class Sources:
    """The source files that Python would find from here, each read once and at most 100 of them."""

    def __init__(self) -> None:
        self._path = [*sys.path, str(Path.cwd())]
        self._read: dict[str, _Module | None] = {}

    def why_not(self, name: str, steps: int = _MOST_STEPS) -> str | None:
        """Why `pkg.mod.name` may not be allowed: "" for a layer or an enum, None where no source says."""
        module_name, _, attribute = name.rpartition(".")
        if name in _ENUMS:
            return ""
        if name.startswith("torch."):  # which is here, and may be looked at itself
            found = getattr(sys.modules.get(module_name), attribute, None)
            return None if found is None else why_not(found) or ""
        if name == "builtins.object":
            return NO_LAYER
        module = self._module(module_name)
        statement = module.top.get(attribute) if module else None
        if module is None or steps <= 0:
            return None
        if isinstance(statement, _FUNCTIONS):
            return FUNCTION
        if isinstance(statement, ast.ClassDef):
            return why_no_base(name) or self._why_no_class(statement, module, steps - 1)
        if isinstance(statement, ast.Import | ast.ImportFrom):
            return self.why_not(_imported(statement, attribute, module), steps - 1)
        return None

    def _why_no_class(self, found: ast.ClassDef, module: _Module, steps: int) -> str | None:
        """By its bases, one that cannot be followed leaving it open, and by its methods."""
        reasons = [self.why_not(_full_name(ast.unparse(base), module), steps) for base in found.bases]
        known = [why for why in reasons if why and why not in (NO_LAYER, FUNCTION)]
        unasked = [s.name for s in found.body if isinstance(s, _FUNCTIONS) and s.name in RUN_UNASKED]
        if known:
            return known[0]
        if "" not in reasons and None not in reasons:
            return NO_LAYER
        if unasked:
            return runs_unasked(unasked[0])
        return "" if "" in reasons else None

    def _module(self, name: str) -> _Module | None:
        if name not in self._read and len(self._read) < _MOST_FILES:
            self._read[name] = self._parsed(name)
        return self._read.get(name)

    def _parsed(self, name: str) -> _Module | None:
        path, spec, parts = self._path, None, name.split(".")
        if not all(map(str.isidentifier, parts)):
            return None
        try:
            for depth in range(len(parts)):
                spec = PathFinder.find_spec(".".join(parts[: depth + 1]), path)
                path = list((spec and spec.submodule_search_locations) or ())
            file = Path(spec.origin) if spec and spec.origin else None
            if file is None or file.suffix != ".py" or file.stat().st_size > _LARGEST:
                return None
            top = dict(_defined(ast.parse(file.read_bytes()).body))
            return _Module(name, file.name == "__init__.py", top)
        except Exception:  # noqa: BLE001  what cannot be found or parsed, for any cause, says nothing
            return None


def _defined(body: list[ast.stmt]) -> Iterator[tuple[str, ast.stmt]]:
    for statement in body:
        if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield statement.name, statement
        elif isinstance(statement, ast.Import):
            # `import a.b` binds `a`.
            yield from ((a.asname or a.name.partition(".")[0], statement) for a in statement.names)
        elif isinstance(statement, ast.ImportFrom):
            yield from ((a.asname or a.name, statement) for a in statement.names)
        elif isinstance(statement, ast.If | ast.Try):
            handlers = getattr(statement, "handlers", ())
            yield from _defined([*statement.body, *statement.orelse, *(s for h in handlers for s in h.body)])


def _full_name(base: str, module: _Module) -> str:
    """The name, from anywhere, of what stands as `base` in a module."""
    head, dot, rest = base.partition(".")
    statement = module.top.get(head)
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return f"{_imported(statement, head, module)}{dot}{rest}"
    return f"{module.name if statement else 'builtins'}.{base}"


def _imported(statement: ast.Import | ast.ImportFrom, name: str, module: _Module) -> str:
    """The full name of what an import binds to `name`."""
    alias = next((a for a in statement.names if name == (a.asname or a.name)), None)
    if alias is None:
        return name
    if isinstance(statement, ast.Import):
        return alias.name
    parts = module.name.split(".")
    package = parts[: len(parts) - statement.level + module.is_package] if statement.level else []
    return ".".join([*package, *filter(None, [statement.module]), alias.name])
