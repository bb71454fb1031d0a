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
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from torch.export import ExportedProgram

from bntool.core.errors import LoadError
from bntool.core.limits import Limit
from bntool.files.scripts import running_user_code
from bntool.files.security.archives import Archive, Damaged, Unsafe
from bntool.files.security.containers import OLD_PROGRAM, PROGRAM, Container, within
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
    with _as_load_error(path), path.open("rb") as opened:
        container = open_program(opened, path, limit or Limit())
        if trust_pickle:
            with running_user_code(Path.cwd(), first=False):
                return _load(container.file)
        _scan(container)
        with _only_plain_pickles():
            program = _load(container.file)
        wrong = next(complaints([program.state_dict, program.constants, program.example_inputs]), None)
        if wrong:
            raise Unsafe(wrong)
        return program


def open_program(opened: BinaryIO, path: Path, limit: Limit) -> Container:
    """The archive of an exported program. Raises `Unsafe`, `Damaged`, or `LoadError` beyond the limit."""
    # torch looks for today's format first, and an archive cannot hold both.
    old = _OLD_PROGRAM in Archive(opened).members
    return Container(opened, OLD_PROGRAM if old else PROGRAM, within(limit, path))


def judge_program(container: Container, path: Path) -> None:
    """Raises the `LoadError` with which `read_exported` would refuse it without the user's trust."""
    with _as_load_error(path):
        _scan(container)


def _scan(container: Container) -> None:
    """Raises `Unsafe`, `UnknownOperator` or `Damaged` for what may not be handed to `torch.export.load`."""
    if _OLD_PROGRAM in container.sizes:
        check_program(read_json(container.read(_OLD_PROGRAM), _OLD_PROGRAM))
        for member in _OLD_PICKLES:
            _check_pickle(member, container.read(member))
        return
    check_program(read_json(container.read(_MODEL), _MODEL))
    for folder, table in (("data/weights/", "model_weights"), ("data/constants/", "model_constants")):
        # What PyTorch 2.7 and 2.8 wrote, and what wins where both are there.
        if f"{folder}model.pt" in container.sizes:
            _check_pickle(f"{folder}model.pt", container.read(f"{folder}model.pt"))
        else:
            check_table(container, folder, f"{folder}{table}_config.json")
    _check_pickle("data/sample_inputs/model.pt", container.read("data/sample_inputs/model.pt"))


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
