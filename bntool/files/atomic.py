"""Writing a file whole or not at all, and the hash of a file. No torch here."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from bntool.errors import UsageError
from bntool.files.drafts import draft_folder, place

_BLOCK = 1 << 20


def sha256_of(path: str | Path) -> str:
    """The sha256 of a file's bytes as hex, read in blocks."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def require_writable(output: str | Path, *, force: bool = False, forbid: Iterable[str | Path] = ()) -> Path:
    """The real path that `output` stands for (a link's target), or `UsageError` if it may not be written.

    Call it before long work, so that a bad output is told at once.
    """
    output = Path(output)
    for source in forbid:
        with contextlib.suppress(OSError):
            if output.exists() and output.samefile(source):
                raise UsageError(
                    f"the output {output} is the input itself", next_step="name another -o OUTPUT"
                )
    target = Path(os.path.realpath(output))
    if target.is_dir():
        raise UsageError(f"the output {output} is a folder", next_step="name a file: -o FOLDER/NAME.pt")
    if target.exists() and not target.is_file():
        raise UsageError(f"the output {output} is not a regular file", next_step="name a file: -o NAME.pt")
    if target.exists() and not force:
        raise UsageError(
            f"{output} exists already", next_step="pass --force to replace it, or name another -o OUTPUT"
        )
    if not target.parent.is_dir():
        raise UsageError(f"the folder {target.parent} does not exist", next_step=f"mkdir -p {target.parent}")
    return target


def write_atomically(
    output: str | Path,
    write: Callable[[Path], None],
    *,
    force: bool = False,
    forbid: Iterable[str | Path] = (),
) -> None:
    """Have `write` fill a draft in a folder beside `output`, then move it into place.

    `output` is either the old file or the whole new one at every moment, after a crash too, and keeps the
    permissions of the file it replaces. A link's target is replaced, not the link. Raises `UsageError` if
    `output` exists without `force`, is one of `forbid` (the inputs), or cannot be written.
    """
    forbid = tuple(forbid)
    target = require_writable(output, force=force, forbid=forbid)
    try:
        with draft_folder(target) as folder:
            draft = folder / target.name
            # Made here and not by `write`, so that the umask of the user holds.
            os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            write(draft)
            # It may have appeared while `write` ran.
            require_writable(output, force=force, forbid=forbid)
            place(draft, target)
    except OSError as error:
        raise UsageError(
            f"cannot write {output}: {error.strerror or error}",
            next_step="check the folder's permissions and the space on the disk, or name another -o OUTPUT",
        ) from error
