"""The error family. Every failure a user can mend is one of these; a bug is an `InvariantError`.

An error says what happened, where, and what to do next, and carries the exit code of the command line.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import Any

from bntool.core.text import Lines, as_lines


class BntoolError(Exception):
    """A failure the user can mend.

    Args:
        what: one line, what happened.
        where: one line, the file, layer or option it happened at; empty where `what` already names it.
        next_step: one line, what to do next (a command or flag where there is one).
    """

    exit_code = 1
    status = "failed"
    uncut = False  # True where every word of `what` is needed, however long

    def __init__(self, what: str, *, where: str = "", next_step: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.next_step = next_step

    def __str__(self) -> str:
        return self.told()

    def told(self, before: str = "") -> Lines:
        """What happened, after the word `before`; below it where, and what to do next, as far as known."""
        where = [f"  where: {self.where}"] if self.where else []
        next_step = [f"  next:  {self.next_step}"] if self.next_step else []
        return as_lines(f"{before}{self.what}", *where, *next_step)

    def to_dict(self) -> dict[str, str]:
        return {"what": self.what, "where": self.where, "next": self.next_step}


class CheckFailed(BntoolError):
    """A check ran and the candidate does not agree with the reference."""

    exit_code = 1
    status = "check-failed"


class Undecided(BntoolError):
    """The checks ran and showed nothing: no output answers to the inputs, or rounding decides them all."""

    exit_code = 10
    status = "undecided"


class UsageError(BntoolError):
    """A wrong option or argument, or an output path that cannot be used."""

    exit_code = 2
    status = "usage"


class LoadError(BntoolError):
    """The input cannot be loaded: missing, damaged, unknown, or unsafe and refused."""

    exit_code = 3
    status = "cannot-load"


class NeedsArchitecture(LoadError):
    """A file of weights alone; `weights` are its tensors by name."""

    weights: Mapping[str, Any] = {}


class NothingToDo(BntoolError):
    """No site to cut, or `--require-all` was asked for and not met."""

    exit_code = 4
    status = "nothing-to-do"


class DeviceError(BntoolError):
    """The device or execution provider asked for is not available, or did not really run."""

    exit_code = 5
    status = "device-unavailable"


class ExportError(BntoolError):
    """The model cannot be exported, or the exported file is not valid."""

    exit_code = 6
    status = "export-failed"


class StateError(BntoolError):
    """The model's own state is bad: NaN, infinite or negative running statistics."""

    exit_code = 7
    status = "bad-state"


class ProcessError(BntoolError):
    """The processes of a job do not find each other, or one of them has ended."""

    exit_code = 8
    status = "processes-lost"


class OutputError(BntoolError):
    """The work was done, and standard output, where its result is told, cannot be written."""

    exit_code = 9

    @classmethod
    def because(cls, failure: OSError) -> OutputError:
        """The error for a write to standard output that failed so."""
        why = "it is closed" if failure.errno == errno.EBADF else failure.strerror
        return cls(
            f"standard output could not be written: {why}",
            next_step="send it to a place with space, such as > results.txt; files named with -o are whole",
        )


class PlanError(UsageError):
    """A plan that cannot be read, or that was made for another model."""

    status = "bad-plan"


class DamagedPlan(PlanError, LoadError):
    """A plan that is none, or that names what its model has not; where in the plan the fault is."""

    exit_code = LoadError.exit_code
    status = LoadError.status
    why = ""

    @classmethod
    def of(cls, why: str, place: str) -> DamagedPlan:
        """The error for the place in a plan that is at fault."""
        made = cls(f"this plan is damaged: {why}", where=place, next_step="make the plan again")
        made.why = why
        return made


class ObserveError(LoadError):
    """The model could not be run once on the example input."""

    status = "cannot-run"


class InvariantError(RuntimeError):
    """A bug in bntool: a post-condition failed. Keeps its stack trace."""
