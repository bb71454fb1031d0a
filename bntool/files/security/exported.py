"""Reading what `torch.export.save` wrote (`.pt2`) without running code from it.

`torch.export.load` falls back to an unrestricted unpickler, evaluates expressions, imports what containers
name and makes Python source of names. So every part that it reads is judged first; what the judges do not
know needs the user's trust.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from torch.export import ExportedProgram

from bntool.errors import LoadError
from bntool.files.limits import Limit
from bntool.files.scripts import running_user_code
from bntool.files.security.archives import Damaged, Records, Unsafe, check_archive
from bntool.files.security.operators import UnknownOperator
from bntool.files.security.payloads import check_table
from bntool.files.security.pickled_calls import shown
from bntool.files.security.pickles import check_plain_data
from bntool.files.security.program_scan import check_name, check_program, read_json
from bntool.files.security.vetting import complaints

_MODEL = "models/model.json"
_OLD_PROGRAM = "serialized_exported_program.json"
_OLD_PICKLES = ("serialized_state_dict.pt", "serialized_constants.pt", "serialized_example_inputs.pt")
_loading = threading.Lock()


def read_exported(path: Path, *, trust_pickle: bool = False, limit: Limit | None = None) -> ExportedProgram:
    """The program in a `.pt2` file, of today's format or that of PyTorch before 2.8, on the CPU.

    Nothing in the file is run unless `trust_pickle`. Raises `LoadError` for a file that is damaged, that
    cannot be shown to be harmless, is larger than `limit`, or needs operators which are not there.
    """
    with _as_load_error(path), path.open("rb") as file:
        check_archive(file)
        _require_room(path, limit or Limit())
        if trust_pickle:
            with running_user_code(Path.cwd(), first=False):
                return _load(file)
        _scan(file)
        with _only_plain_pickles():
            program = _load(file)
        wrong = next(complaints([program.state_dict, program.constants, program.example_inputs]), None)
        if wrong:
            raise Unsafe(wrong)
        return program


def why_not_read(path: Path) -> LoadError | None:
    """Why `read_exported` would not read this file without the user's trust; None where it would."""
    try:
        with _as_load_error(path), path.open("rb") as file:
            check_archive(file)
            _scan(file)
    except LoadError as error:
        return error
    return None


def _require_room(path: Path, limit: Limit) -> None:
    with zipfile.ZipFile(path) as archive:
        sizes = {member.filename: member.file_size for member in archive.infolist()}
    structure = sum(size for name, size in sizes.items() if name.endswith(".json"))
    limit.require(path.name, data=sum(sizes.values()), structure=structure, where=str(path))


def _scan(file: BinaryIO) -> None:
    """Raises `Unsafe`, `UnknownOperator` or `Damaged` for what may not be handed to `torch.export.load`."""
    old = _old_members(file)
    if old is not None:
        check_program(read_json(old[_OLD_PROGRAM], _OLD_PROGRAM))
        for member in _OLD_PICKLES:
            _check_pickle(member, old.get(member, b""))
        return
    records = Records(file)
    programs = [name for name in records.sizes if name.startswith("models/")]
    if programs != [_MODEL]:
        raise Unsafe(f"holds {len(programs)} programs, and bntool reads a single one named model")
    if any(name.startswith("data/aotinductor/") for name in records.sizes):
        raise Unsafe("holds compiled code")
    check_program(read_json(records.read(_MODEL), _MODEL))
    for folder, table in (("data/weights/", "model_weights"), ("data/constants/", "model_constants")):
        # What PyTorch 2.7 and 2.8 wrote, and what wins where both are there.
        if f"{folder}model.pt" in records.sizes:
            _check_pickle(f"{folder}model.pt", records.read(f"{folder}model.pt"))
        else:
            check_table(records, folder, f"{folder}{table}_config.json")
    _check_pickle("data/sample_inputs/model.pt", records.read("data/sample_inputs/model.pt"))


def _old_members(file: BinaryIO) -> dict[str, bytes] | None:
    """The members of an archive of PyTorch before 2.8, which has no folder; None for today's."""
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        if _OLD_PROGRAM not in names:
            return None
        known = {"version", _OLD_PROGRAM, *_OLD_PICKLES}
        if odd := [n for n in names if n not in known and not n.startswith("extra_files/")]:
            raise Unsafe(f"has a member that torch.export.save did not write: {shown(odd[0])}")
        return {name: archive.read(name) for name in names if name in known}


def _check_pickle(member: str, content: bytes) -> None:
    # torch.export.save writes no bytes for inputs that are not kept.
    if not content:
        return
    try:
        texts = check_plain_data(content)
    except Unsafe as error:
        raise Unsafe(f"has in {member} a pickle that {error}") from error
    # Keys of inputs and names of weights end up between quotes, in source code of torch's.
    for text in texts:
        check_name(text)


def _load(file: BinaryIO) -> ExportedProgram:
    file.seek(0)
    with _quiet() as said:
        try:
            return torch.export.load(file)
        except Exception as error:
            # torch tells the cause to its log only, and then that something went wrong.
            raise Damaged(_essence(said[0] if said else error)) from error


def _essence(error: BaseException) -> str:
    lines = [line for line in str(error).strip().split("\n") if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


class _Keep(logging.Handler):
    def __init__(self, errors: list[BaseException]) -> None:
        super().__init__()
        self.errors = errors

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and isinstance(record.exc_info[1], BaseException):
            self.errors.append(record.exc_info[1])


@contextlib.contextmanager
def _quiet() -> Iterator[list[BaseException]]:
    """Nothing of torch's log or warnings reaches the terminal; yields the errors that it logs."""
    errors: list[BaseException] = []
    handler = _Keep(errors)
    # torch gives handlers of their own to dozens of its loggers; the others pass on to these.
    known = [logging.getLogger(n) for n in list(logging.root.manager.loggerDict) if n.startswith("torch.")]
    loggers = [logging.getLogger("torch"), *(logger for logger in known if logger.handlers)]
    propagated = [logger.propagate for logger in loggers]
    handlers = [list(logger.handlers) for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.handlers, logger.propagate = [handler], False
            yield errors
        finally:
            for logger, before, was in zip(loggers, handlers, propagated, strict=True):
                logger.handlers, logger.propagate = before, was


@contextlib.contextmanager
def _only_plain_pickles() -> Iterator[None]:
    """A second gate: whatever `torch.export.load` asks for, torch.load reads weights only."""
    force, never = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    with _loading:
        before = {name: os.environ.pop(name, None) for name in (force, never)}
        os.environ[force] = "1"
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


@contextlib.contextmanager
def _as_load_error(path: Path) -> Iterator[None]:
    try:
        yield
    except LoadError:
        raise
    except UnknownOperator as error:
        raise LoadError(
            f"{path.name} needs the operator {shown(str(error))}, which is not known here",
            where=str(path),
            next_step="in Python, import the package that defines it, then "
            "bntool.fold(torch.export.load(FILE))",
        ) from error
    except Unsafe as error:
        raise LoadError(
            f"{path.name} was refused unread: it {error}",
            where=str(path),
            next_step="export the model again with torch.export.save; only for a file you made yourself: "
            "--trust-pickle (runs code from the file)",
        ) from error
    except Exception as error:  # any type can come out of a damaged file
        raise LoadError(
            f"{path.name} is damaged, or was written by another version of torch: {shown(_essence(error))}",
            where=str(path),
            next_step=f"download or copy it again, or export it with torch {torch.__version__.split('+')[0]}",
        ) from error
