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
from typing import Any

import torch

from bntool.errors import LoadError, UsageError
from bntool.files.detect import FileKind, Kind
from bntool.files.limits import Limit
from bntool.files.scripts import running_user_code
from bntool.files.security.allowed import Granted, trusted_names, user_allowance
from bntool.files.security.archives import Records, Source, Unsafe, check_archive
from bntool.files.security.missing import inert_classes, may_be_missing
from bntool.files.security.opcodes import DamagedPickle, DryRun
from bntool.files.security.pickled_calls import (
    FROM_TYPE,
    PARAMETER,
    PARTIAL,
    REBUILD_PARAMETER,
    REBUILD_TENSOR,
    item_bytes,
    shown,
)
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
    if kind.kind is Kind.TORCH_ZIP:
        with _as_load_error(path):
            check_archive(path)
    if trust_pickle:
        return _load_trusting(path, trusted_names(allow))
    runs = _dry_runs(path, kind, limit or Limit())
    granted = user_allowance(allow, set().union(*(run.globals for run in runs)))
    allowed = _allowance(path, runs, granted, stand_ins)
    if say and any(entry.endswith(".*") for entry in allow):
        say(f"let in by --allow: {listed(sorted(granted.classes.keys() & allowed.keys())) or 'no class'}")
    with _unpickling, only_these(allowed):
        loaded = _load(path, weights_only=True)
    with _as_load_error(path):
        wrong = next(complaints(loaded), None)
    if wrong:
        raise refused(path, wrong)
    return loaded


def check_plain_data(content: bytes) -> frozenset[str]:
    """Every string in what `torch.save` wrote, when it holds tensors and plain data and nothing else.

    Such bytes do the same in every unpickler, `weights_only` or not. Raises `Unsafe` for anything else.
    """
    if not content.startswith(b"PK\x03\x04"):
        raise Unsafe("is no zip archive of torch.save")
    check_archive(io.BytesIO(content))
    # torch.load takes an archive with this member for TorchScript.
    if "constants.pkl" in Records(io.BytesIO(content)).sizes:
        raise Unsafe("is a TorchScript archive")
    run = _dry_run_zip(io.BytesIO(content))
    unknown, known = _unknown([run], {})
    needed = sorted({*unknown, *known})
    if needed:
        raise Unsafe(f"refers to {listed(needed)}, and only tensors and plain data are expected there")
    called = sorted(run.called - _CALLS)
    if run.problems or called or run.odd_states:
        raise Unsafe(run.problems[0] if run.problems else f"makes {shown([*called, *run.odd_states][0])}")
    return frozenset(run.strings)


def require_plain_weights(path: Path, kind: FileKind, limit: Limit) -> None:
    """Refuse an archive of `torch.save` that is damaged or holds more than tensors and plain data."""
    with _as_load_error(path):
        check_archive(path)
    runs = _dry_runs(path, kind, limit)
    _allowance(path, runs, Granted())


def unknown_globals(path: Path, kind: FileKind) -> tuple[str, ...]:
    """The names a file of `torch.save` refers to that bntool does not know by itself, sorted."""
    return tuple(sorted(_unknown(_dry_runs(path, kind, Limit(1 << 62)), {})[0]))


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


def _dry_runs(path: Path, kind: FileKind, limit: Limit) -> list[DryRun]:
    with _as_load_error(path):
        if kind.kind is Kind.TORCH_ZIP:
            structure = Records(path).sizes.get("data.pkl", 0)
            limit.require(path.name, structure=structure, where=str(path))
            runs = [_dry_run_zip(path)]
        else:
            runs, structure = _dry_run_legacy(path, limit)
        storages = {key: s.nbytes for run in runs for key, s in run.storages.items()}
        cost = {"data": sum(storages.values()), "tensors": len(storages), "structure": structure}
        limit.require(path.name, **cost, where=str(path))
        return runs


def _dry_run_zip(source: Source) -> DryRun:
    records = Records(source)
    run = DryRun().run(io.BytesIO(records.read("data.pkl")))
    for key, storage in run.storages.items():
        if records.sizes.get(f"data/{key}", -1) < storage.nbytes:
            raise DamagedPickle(f"the data of tensor {shown(key)} is missing or cut short")
    return run


def _dry_run_legacy(path: Path, limit: Limit) -> tuple[list[DryRun], int]:
    """Five pickles in a row (magic, protocol, machine, object, storage keys), then the raw storages.

    Also gives the bytes that the pickles take.
    """
    size = path.stat().st_size
    with path.open("rb") as opened:
        file = io.BytesIO(opened.read(limit.structure))
    runs: list[DryRun] = []
    try:
        while len(runs) < 5:
            runs.append(DryRun().run(file))
            if not runs[-1].whole:
                return runs, file.tell()
    except DamagedPickle:
        limit.require(path.name, structure=size if file.read(1) == b"" else 0, where=str(path))
        raise
    left = size - file.tell()
    storages = runs[3].storages
    if not storages.keys() <= runs[4].strings or sum(s.nbytes for s in storages.values()) > left:
        raise DamagedPickle("the data of some tensors is missing")
    return runs, file.tell()


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


def _load(path: Path, **options: Any) -> Any:
    with _as_load_error(path):
        return torch.load(path, map_location="cpu", **options)


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


def _load_trusting(path: Path, user: Mapping[str, Any]) -> Any:
    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str, /) -> Any:
            return user.get(f"{module}.{name}") or super().find_class(module, name)

    # torch.load takes a module; its own subclass of Unpickler reads the storages.
    trusting = types.ModuleType("bntool_trusting_pickle")
    vars(trusting).update(vars(pickle), Unpickler=Unpickler, load=lambda f, **k: Unpickler(f, **k).load())
    with running_user_code(Path.cwd(), first=False):
        try:
            return _load(path, weights_only=False, pickle_module=trusting)
        except LoadError as error:
            cause = error.__cause__
            if isinstance(cause, ImportError | AttributeError):
                raise LoadError(
                    f"{path.name} needs code that is not here: {shown(str(cause))}",
                    where=str(path),
                    next_step="run bntool where that code is importable; for a class of a script also "
                    "pass --allow script.py:Class",
                ) from cause
            raise


def _damaged(path: Path, error: Exception | str) -> LoadError:
    text = shown(str(error).strip().split("\n")[0]) or type(error).__name__
    return LoadError(
        f"{path.name} is damaged: {text}", where=str(path), next_step="download or copy it again"
    )
