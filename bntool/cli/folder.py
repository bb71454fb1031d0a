"""The folder that a command is run in. No torch here."""

from __future__ import annotations

import os

from bntool.core.errors import UsageError


def require_folder() -> None:
    """Raise `UsageError` where the working folder was removed: torch would abort while it is imported."""
    try:
        os.getcwd()  # noqa: PTH109  Path.cwd() is the same call
    except OSError as error:
        raise UsageError(
            "the folder that bntool was started in is gone",
            next_step="cd to a folder that is there, and try again",
        ) from error
