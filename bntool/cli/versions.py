"""What `--version` tells: bntool and what it stands on, read from the installed files; no imports."""

from __future__ import annotations

import platform
import re
from importlib import metadata
from pathlib import Path

from bntool.core.text import Lines, as_lines
from bntool.core.version import __version__

_CUDA_IN = {
    "torch": "torch/version.py",
    "onnxruntime-gpu": "onnxruntime/capi/build_and_package_info.py",
}
"""Distribution -> its file that names the CUDA version that it was built for."""


def version_text() -> Lines:
    """The line of bntool, then one for each of what a report of a fault should name beside it."""
    found = [_installed(name) for name in ("torch", "onnx", "onnxruntime-gpu", "onnxruntime")]
    lines = (f"bntool, version {__version__}", f"Python {platform.python_version()}", *found)
    return as_lines(*filter(None, lines))


def _installed(name: str) -> str:
    try:
        distribution = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return "" if name.startswith("onnxruntime") else f"no {name}"
    text = f"{name} {distribution.version}"
    if name not in _CUDA_IN:
        return text
    cuda = _cuda_of(Path(str(distribution.locate_file(_CUDA_IN[name]))))
    return f"{text} ({f'built for CUDA {cuda}' if cuda else 'without CUDA'})"


def _cuda_of(path: Path) -> str:
    """The value of `cuda = "13.0"` or `cuda_version = "13.0"` in a generated file; empty without one."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return ""
    match = re.search(r"^cuda(?:_version)?\b[^=\n]*=\s*['\"]([\d.]+)['\"]", text, flags=re.MULTILINE)
    return match[1] if match else ""
