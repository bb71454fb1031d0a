"""Reading what `torch.save` wrote without running code from it.

Three gates: a dry run of every pickle in the file against a fixed list of calls; `torch.load` with
`weights_only=True` and an allow-list made for this one file; a look at what came out.
"""

from __future__ import annotations

import contextlib
import enum
import io
import pickle
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from bntool.core.errors import LoadError, UsageError
from bntool.core.limits import Limit
from bntool.files.detect import FileKind
from bntool.files.scripts import running_user_code
from bntool.files.security.allowed import Granted, trusted_names, user_allowance
from bntool.files.security.archives import Unsafe
from bntool.files.security.containers import PICKLED, Container, within
from bntool.files.security.dry_runs import dry_run_of_archive, dry_runs, file_of, open_saved
from bntool.files.security.missing import inert_classes, may_be_missing
from bntool.files.security.opcodes import DryRun
from bntool.files.security.pickled_calls import (
    FROM_TYPE,
    PARAMETER,
    PARTIAL,
    REBUILD_PARAMETER,
    REBUILD_TENSOR,
    item_bytes,
    shown,
)
from bntool.files.security.pinned import Pinned
from bntool.files.security.rules import builtin_allowance, may_be_called, only_these
from bntool.files.security.telling import (
    absent_names,
    closed_names,
    listed,
    refused,
    unknown_classes,
    why_closed,
)
from bntool.files.security.vetting import complaints
from bntool.files.tensors import told_by

_CALLS = REBUILD_TENSOR | REBUILD_PARAMETER | {
    FROM_TYPE, PARTIAL, "collections.OrderedDict", "collections.Counter", "builtins.set",
    "builtins.bytearray", "builtins.complex", "torch.Size", "torch.device",
    "torch.serialization._get_layout", "_codecs.encode",
}  # fmt: skip
_PLAIN = (_CALLS | {PARAMETER, "torch.Tensor"}) - {PARTIAL}
_unpickling = threading.Lock()


def read_pickled(
    path: Path,
    kind: FileKind,
    *,
    allow: tuple[str, ...] = (),
    trust_pickle: bool = False,
    limit: Limit | None = None,
    stand_ins: bool = False,
    say: Callable[[str], object] | None = None,
) -> Any:
    """What a file of `torch.save` holds, on the CPU. `kind` is `TORCH_ZIP` or `TORCH_LEGACY`.

    Nothing in the file is run unless `trust_pickle`. With `stand_ins`, classes that are not known become
    classes that hold state and run nothing (`missing_names`). `say` takes a line on which classes a package
    of `allow` let in. Raises `LoadError` for a file that is damaged,
    hostile, larger than `limit`, or needs classes that neither bntool nor `allow` knows.
    """
    with _as_load_error(path), path.open("rb") as opened:
        saved = open_saved(opened, path, kind.kind, limit or Limit())
        if trust_pickle:
            return _load_trusting(path, file_of(saved), trusted_names(allow))
        runs = dry_runs(saved, path, limit or Limit())
        granted = user_allowance(allow, set().union(*(run.globals for run in runs)))
        allowed = _allowance(path, runs, granted, stand_ins)
        if say and any(entry.endswith(".*") for entry in allow):
            let_in = sorted(granted.classes.keys() & allowed.keys())
            say(f"let in by --allow: {listed(let_in) or 'no class'}")
        with _unpickling, only_these(allowed):
            loaded = torch.load(file_of(saved), map_location="cpu", weights_only=True)
        wrong = next(complaints(loaded), None)
        if wrong:
            raise Unsafe(wrong)
        return loaded


def check_plain_data(content: bytes) -> frozenset[str]:
    """Every string in what `torch.save` wrote, when it holds tensors and plain data and nothing else.

    Such bytes do the same in every unpickler, `weights_only` or not. Raises `Unsafe` for anything else.
    """
    if not content.startswith(b"PK\x03\x04"):
        raise Unsafe("is no zip archive of torch.save")
    run = dry_run_of_archive(Container(io.BytesIO(content), PICKLED))
    unknown, known = _unknown([run], {})
    needed = sorted({*unknown, *known})
    if needed:
        raise Unsafe(f"refers to {listed(needed)}, and only tensors and plain data are expected there")
    called = sorted(run.called - _CALLS)
    if run.problems or called or run.odd_states:
        raise Unsafe(run.problems[0] if run.problems else f"makes {shown([*called, *run.odd_states][0])}")
    return frozenset(run.strings)


def open_weights(opened: BinaryIO, path: Path, limit: Limit) -> Container:
    """An archive of `torch.save`; `LoadError` where it holds more than plain data and tensors."""
    with _as_load_error(path):
        container = Container(opened, PICKLED, within(limit, path))
        _allowance(path, dry_runs(container, path, limit), Granted())
        return container


def unknown_globals(path: Path, kind: FileKind) -> tuple[str, ...]:
    """The names a file of `torch.save` refers to that bntool does not know by itself, sorted."""
    limit = Limit(1 << 62)
    with _as_load_error(path), path.open("rb") as opened:
        runs = dry_runs(open_saved(opened, path, kind.kind, limit), path, limit)
    return tuple(sorted(_unknown(runs, {})[0]))


def standing(names: set[str]) -> dict[str, str]:
    """For every name that a pickle refers to, by name, what becomes of it when the file is loaded.

    `plain` is data of torch's and Python's own, `known` a class of PyTorch, torchvision or timm, `unknown`
    one that --allow may name, `other` what is no layer and no enum, `refused` one through which a file can
    run code.
    """
    run = DryRun()
    run.globals = names - _CALLS
    unknown, known = _unknown([run], {})
    closed = why_closed(unknown)

    def of(name: str) -> str:
        if name not in unknown:
            return "known" if name in known else "plain"
        if not may_be_missing(name):
            return "refused"
        return "other" if name in closed else "unknown"

    return {name: of(name) for name in sorted(names)}


def _unknown(runs: list[DryRun], user: Mapping[str, Any]) -> tuple[set[str], dict[str, Any]]:
    unknown: set[str] = set()
    known: dict[str, Any] = {}
    for name in set().union(*(run.globals for run in runs)):
        if name in user:
            known[name] = user[name]
        elif name not in _PLAIN and not _is_dtype(name) and item_bytes(name) is None:
            found = builtin_allowance(name)
            if found is None:
                unknown.add(name)
            else:
                known[name] = found
    return unknown, known


def _is_dtype(name: str) -> bool:
    module, _, attribute = name.rpartition(".")
    return module == "torch" and isinstance(getattr(torch, attribute, None), torch.dtype)


def _allowance(path: Path, runs: list[DryRun], granted: Granted, stand_ins: bool = False) -> dict[str, Any]:
    """Name -> class for torch's unpickler, or `LoadError` naming everything that is in the way."""
    unknown, known = _unknown(runs, granted.classes)
    missing = {n for n in unknown if may_be_missing(n)} if stand_ins else set()
    unknown -= missing
    closed = why_closed(unknown) | {n: why for n, why in granted.refused.items() if n in unknown}
    other = told_by(unknown, sorted(closed))
    if other is not None:
        raise other.error(path)
    if closed:
        raise closed_names(path, closed)
    if absent := sorted(unknown & granted.absent):
        raise absent_names(path, absent)
    # What a stand-in is given does no harm.
    harmless = {f"instantiates {shown(n)} with arguments of its own" for n in missing}
    problems = [p for run in runs for p in run.problems if p not in harmless]
    if problems:
        raise refused(path, problems[0])
    if unknown:
        raise unknown_classes(path, sorted(unknown))
    if misused := next((problem for run in runs for problem in _misuses(run, known, missing)), None):
        raise refused(path, misused)
    return {**known, **inert_classes(missing)}


def _misuses(run: DryRun, known: Mapping[str, Any], missing: set[str]) -> Iterator[str]:
    """What a pickle does with names that it may refer to, and no honest one does."""
    enums = {n for n, found in known.items() if isinstance(found, type) and issubclass(found, enum.Enum)}
    for name in sorted(run.odd_states - missing):
        yield f"gives a {shown(name)} attributes that are not in a dict"
    for name in sorted(enums & (run.given_state | run.instantiated)):
        yield f"changes the enum {shown(name)}"
    # An enum is restored by calling it with a value; that only looks a member up.
    for name in sorted((run.called - enums - _CALLS - missing) | (enums & run.odd_calls)):
        yield f"calls {shown(name)} with arguments of its own"
    for name in sorted(run.partial_targets):
        if name not in known or not may_be_called(known[name]):
            yield f"makes a functools.partial of {shown(name)}"


@contextlib.contextmanager
def _as_load_error(path: Path) -> Iterator[None]:
    # Any exception type can come out of a damaged file: KeyError, UnicodeDecodeError, MemoryError, ...
    try:
        yield
    except (LoadError, UsageError):
        raise
    except Unsafe as error:
        raise refused(path, str(error)) from error
    except Exception as error:
        raise _damaged(path, error) from error


def _load_trusting(path: Path, file: Pinned, user: Mapping[str, Any]) -> Any:
    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str, /) -> Any:
            return user.get(f"{module}.{name}") or super().find_class(module, name)

    # torch.load takes a module; its own subclass of Unpickler reads the storages.
    trusting = types.ModuleType("bntool_trusting_pickle")
    vars(trusting).update(vars(pickle), Unpickler=Unpickler, load=lambda f, **k: Unpickler(f, **k).load())
    with running_user_code(Path.cwd(), first=False):
        try:
            return torch.load(file, map_location="cpu", weights_only=False, pickle_module=trusting)
        except (ImportError, AttributeError) as error:
            raise LoadError(
                f"{path.name} needs code that is not here: {shown(str(error))}",
                where=str(path),
                next_step="run bntool where that code is importable; for a class of a script also "
                "pass --allow script.py:Class",
            ) from error


def _damaged(path: Path, error: Exception | str) -> LoadError:
    text = shown(str(error).strip().split("\n")[0]) or type(error).__name__
    return LoadError(
        f"{path.name} is damaged: {text}", where=str(path), next_step="download or copy it again"
    )
