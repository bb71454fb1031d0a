"""Which installed packages bring a module: several that bring one overwrite each other's files."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_BUILDS = "gpu openvino directml qnn training rocm migraphx cann azure silicon coreml vitisai"
_KNOWN = (
    *("onnxruntime", "ort-nightly", "ort-nightly-gpu", "ort-nightly-directml"),
    *(f"onnxruntime-{build}" for build in _BUILDS.split()),
)
_LIBRARY = "onnxruntime_pybind11_state"


def wheels_of(module: str) -> list[str]:
    """Every installed package that brings a module of this name, whatever it is called.

    One that recorded no files is taken for what its name says.
    """
    found = list(importlib.metadata.packages_distributions().get(module, []))
    for name in _KNOWN if module == "onnxruntime" else ():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            if not importlib.metadata.files(name):
                found.append(name)
    return sorted(dict.fromkeys(found))


def whose_library(ort: Any, wheels: Sequence[str]) -> str:
    """The one of these packages whose compiled library stands there now; empty where none can be told."""
    folder = Path(str(ort.__file__)).parent
    matching = [name for name in wheels if _brought(name, folder)]
    if len(matching) > 1:
        matching = [name for name in matching if importlib.metadata.version(name) == ort.__version__]
    return matching[0] if len(matching) == 1 else ""


def _brought(name: str, folder: Path) -> bool:
    """Whether the package has recorded a library of the size that the one in `folder` has."""
    for file in importlib.metadata.files(name) or ():
        if _LIBRARY in file.name and file.suffix in (".so", ".pyd"):
            with contextlib.suppress(OSError):
                return (folder / "capi" / file.name).stat().st_size == file.size
    return False
