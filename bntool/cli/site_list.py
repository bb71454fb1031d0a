"""A file that lists the layers to insert behind: JSON or TOML."""

from __future__ import annotations

import glob
import json
import sys
from typing import Any

from bntool.errors import LoadError, UsageError
from bntool.files.regular import read_text


def read_site_list(path: str) -> tuple[str, ...]:
    """The layers of a site list as globs that match them alone.

    JSON: `["features.0", …]` or `{"sites": […]}`. TOML: `sites = ["features.0", …]`.

    Raises:
        UsageError: the file cannot be read, or is no such list.
    """
    try:
        text = read_text(path)
        document = _toml(text) if path.endswith(".toml") else json.loads(text)
    except (LoadError, ValueError, RecursionError) as error:
        why = error.what if isinstance(error, LoadError) else error
        raise UsageError(
            f"cannot read a list of sites: {why}",
            where=path,
            next_step='write JSON, ["features.0", …], or TOML, sites = ["features.0", …]',
        ) from error
    names = document.get("sites") if isinstance(document, dict) else document
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UsageError("this is no list of layer names", where=path, next_step='write ["features.0", …]')
    return tuple(glob.escape(name) for name in names)


def _toml(text: str) -> Any:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib  # type: ignore[import-not-found]
    return tomllib.loads(text)
