"""A file that lists the layers to insert behind: JSON or TOML."""

from __future__ import annotations

import glob
import sys
from pathlib import Path
from typing import Annotated, Any

import msgspec

from bntool.core.errors import UsageError
from bntool.core.schema import MOST_BYTES, Damaged, Name, fitted, read

_Names = Annotated[tuple[Name, ...], msgspec.Meta(min_length=1)]
_NEXT = 'write JSON, ["features.0", …], or TOML, sites = ["features.0", …]'


def read_site_list(path: str) -> tuple[str, ...]:
    """The layers of a site list as globs that match them alone.

    JSON: `["features.0", …]` or `{"sites": […]}`. TOML: `sites = ["features.0", …]`.

    Raises:
        UsageError: the file cannot be read, or is no such list.
    """
    try:
        document = _toml(Path(path)) if path.endswith(".toml") else read(Path(path))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"cannot read a list of sites: {error}", where=path, next_step=_NEXT) from error
    inside = isinstance(document, dict)
    try:
        names = fitted(document.get("sites") if inside else document, _Names)
    except Damaged as error:
        place = ("sites" if inside else "") + error.place
        where = f"{path}, {place}" if place else path
        raise UsageError(
            f"this is no list of layer names: {error.why}", where=where, next_step=_NEXT
        ) from error
    return tuple(glob.escape(name) for name in names)


def _toml(path: Path) -> Any:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib  # type: ignore[import-not-found]
    with path.open("rb") as file:
        raw = file.read(MOST_BYTES + 1)
    if len(raw) > MOST_BYTES:
        raise Damaged(f"it is larger than {MOST_BYTES >> 20} MiB")
    return tomllib.loads(raw.decode("utf-8"))
