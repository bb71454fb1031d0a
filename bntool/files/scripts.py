"""Importing the user's own code, when the user names it: a module or a script."""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import random
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bntool.core.errors import LoadError
from bntool.files.security.pickled_calls import shown

_scripts: dict[str, Path] = {}


def import_path(module: str) -> types.ModuleType:
    """Import `pkg.mod` with the current folder on the path, behind everything installed."""
    with running_user_code(Path.cwd(), first=False):
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise LoadError(
                f"cannot import {shown(module)}: {error}",
                where=str(Path.cwd()),
                next_step="run bntool in the folder that holds it, or set PYTHONPATH",
            ) from error
        except Exception as error:
            raise _raised(module, error) from error


def named_in(ref: str, kinds: str) -> Any:
    """What `pkg.mod:name` or `file.py:name` names; `kinds` is what else there could be, for an error."""
    head, colon, name = ref.rpartition(":")
    if not colon or not name.isidentifier():
        raise LoadError(f"no such data: {ref}", next_step=f"give {kinds}")
    module = import_script(Path(head)) if head.endswith(".py") else import_path(head)
    if not hasattr(module, name):
        raise LoadError(f"{head} has no {name}", where=ref, next_step="check the name of the loader")
    return getattr(module, name)


def import_script(path: Path) -> types.ModuleType:
    """Import a `.py` file under its own name, with its folder first on the path as Python has it."""
    path = path.resolve()
    if not path.is_file():
        raise LoadError(f"no such file: {path}", next_step="check the name and the folder")
    if (path.parent / "__init__.py").is_file() and _imports_its_neighbours(path):
        return _import_of_package(path)
    name = path.stem
    if name in _scripts and _scripts[name] == path and name in sys.modules:
        return sys.modules[name]
    if name in sys.modules and _file_of(sys.modules[name]) == path:
        return sys.modules[name]
    if name in sys.modules and name not in _scripts:
        # Its classes must be found again by name, and that name is taken.
        raise LoadError(
            f"{path.name} cannot be imported: a module named {name} is loaded already",
            where=str(path),
            next_step="rename the script",
        )
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise LoadError(f"{path} is not a Python file", next_step="name a .py file")
    module = importlib.util.module_from_spec(spec)
    previous = sys.modules.get(name)
    sys.modules[name] = module
    try:
        with running_user_code(path.parent, first=True):
            spec.loader.exec_module(module)
    except Exception as error:
        sys.modules.pop(name)
        if previous is not None:
            sys.modules[name] = previous
        raise _raised(path.name, error) from error
    _scripts[name] = path
    return module


def _imports_its_neighbours(path: Path) -> bool:
    """Whether the file has relative imports, which work in a package alone."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return False  # importing it says what is wrong
    return any(isinstance(node, ast.ImportFrom) and node.level > 0 for node in ast.walk(tree))


def _import_of_package(path: Path) -> types.ModuleType:
    """Import a file that stands in a package as part of it, so that its relative imports work."""
    root, parts = path.parent, [path.stem]
    while (root / "__init__.py").is_file():
        root, parts = root.parent, [root.name, *parts]
    name = ".".join(parts)
    try:
        with running_user_code(root, first=True):
            module = importlib.import_module(name)
    except Exception as error:
        raise _raised(path.name, error) from error
    if _file_of(module) != path:
        raise LoadError(
            f"{path.name} cannot be imported: another {name} comes first",
            where=str(_file_of(module)),
            next_step="rename the package, or take the other one off PYTHONPATH",
        )
    _scripts[name] = path
    return module


def script_of(module: str) -> Path | None:
    """The script that `module` was imported from, None for a module that Python finds by itself."""
    return _scripts.get(module)


@contextlib.contextmanager
def running_user_code(folder: Path, *, first: bool) -> Iterator[None]:
    """Have `folder` on the path meanwhile, and keep what the code prints out of stdout."""
    entry = str(folder)
    if first:
        sys.path.insert(0, entry)
    else:
        sys.path.append(entry)
    importlib.invalidate_caches()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(entry)


@contextlib.contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Seed torch's CPU generator and `random` meanwhile, then put both back where they were."""
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(torch_state)
        random.setstate(python_state)


def _file_of(module: types.ModuleType) -> Path | None:
    file = getattr(module, "__file__", None)
    return Path(file).resolve() if file else None


def _raised(what: str, error: Exception) -> LoadError:
    return LoadError(
        f"importing {shown(what)} raised {type(error).__name__}: {shown(str(error))}",
        next_step='make it importable; put what a script runs under `if __name__ == "__main__":`',
    )
