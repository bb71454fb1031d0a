"""What the last command in a folder wrote, so that the next one needs no MODEL.

It lies in the user's own state folder and not beside the model, so that a stranger's folder can grant
nothing. No torch here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path

from bntool.core.errors import BntoolError, LoadError, UsageError
from bntool.core.schema import Damaged, Text, fitted, read, version_of
from bntool.files.atomic import sha256_of, write_atomically

SCHEMA_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Record:
    """The file the last command in a folder wrote, and what is needed to load it and its source again.

    `output` and `source` are absolute paths, or `source` a reference; `source` is the baseline that a
    summary compares with. `allow` and `trust_pickle` are what the user granted for that command.
    """

    command: Text
    output: Text
    output_sha256: Text
    source: Text = ""
    source_sha256: Text = ""
    arch: Text | None = None
    weights: Text | None = None
    key: Text | None = None
    allow: tuple[Text, ...] = ()
    trust_pickle: bool = False
    pretrained: bool = False
    input_shapes: tuple[Text, ...] = ()

    def granted(self, path: str | Path) -> Grant:
        """What may be used to load `path`: nothing, unless it is still the very file it was granted for.

        Trust holds for the output only, which bntool wrote itself; never for the source.
        """
        if _is_file(path, self.output, self.output_sha256):
            return Grant(self.allow, self.trust_pickle)
        if _is_file(path, self.source, self.source_sha256):
            return Grant(self.allow, False)
        return Grant()


@dataclasses.dataclass(frozen=True)
class Grant:
    """The allow-list and the trust that hold for one file."""

    allow: tuple[str, ...] = ()
    trust_pickle: bool = False


def remember(folder: str | Path, record: Record) -> str | None:
    """Keep `record` for `folder`; return a note, and do not fail, when it cannot be kept."""
    text = json.dumps({"schema_version": SCHEMA_VERSION, **dataclasses.asdict(record)}, indent=1) + "\n"
    try:
        path = _record_path(folder)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)

        def write(temporary: Path) -> None:
            temporary.chmod(0o600)
            temporary.write_text(text, encoding="utf-8")

        write_atomically(path, write, force=True)
    except (OSError, RuntimeError, BntoolError) as error:
        reason = error.what if isinstance(error, BntoolError) else error
        return f"the next command here needs MODEL named: {reason}"
    return None


def recall(folder: str | Path) -> Record | None:
    """The record kept for `folder`; None when there is none or it cannot be read."""
    try:
        return _record(folder)
    except (OSError, RuntimeError, Damaged):
        return None


def last_output(folder: str | Path) -> Record:
    """The record for a command given no MODEL.

    Raises `UsageError` when there is none or its file is gone, `LoadError` when it is damaged.
    """
    try:
        record = _record(folder)
    except Damaged as error:
        path = _record_path(folder)
        raise LoadError(
            f"no MODEL given, and the record of this folder is damaged: {error.why}",
            where=f"{path}, {error.place}" if error.place else str(path),
            next_step="name a MODEL",
        ) from error
    except (OSError, RuntimeError):
        record = None
    if record is None:
        raise UsageError(
            "no MODEL given, and no bntool command has written a file in this folder yet",
            where=str(folder),
            next_step="name a MODEL, such as model.pt or torchvision:resnet50",
        )
    if not Path(record.output).is_file():
        raise UsageError(
            f"no MODEL given, and what the last bntool command here wrote is gone: {record.output}",
            where=str(folder),
            next_step="name a MODEL",
        )
    return record


def _record(folder: str | Path) -> Record:
    """The record kept for `folder`; `Damaged` for one that is none, `OSError` where there is none."""
    data = read(_record_path(folder), halves=True)
    if version_of(data) != SCHEMA_VERSION:
        raise Damaged("not a record of this version", "schema_version")
    return fitted(data, Record)


def _record_path(folder: str | Path) -> Path:
    key = hashlib.sha256(os.fsencode(Path(folder).resolve())).hexdigest()
    return _state_folder() / "bntool" / "folders" / f"{key}.json"


def _state_folder() -> Path:
    chosen = Path(os.environ.get("XDG_STATE_HOME", ""))
    # The XDG specification has a relative one ignored; it would lie in the stranger's folder.
    return chosen if chosen.is_absolute() else Path("~").expanduser() / ".local" / "state"


def _is_file(path: str | Path, recorded: str, sha256: str) -> bool:
    if not recorded or not sha256:
        return False
    try:
        return Path(path).samefile(recorded) and sha256_of(path) == sha256
    except OSError:
        return False
