"""What a file is, safe loading, atomic saving, side files and model references.

Names are loaded on first use, so that `bntool.files.detect` and the rest that need no torch stay cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bntool.files.atomic import sha256_of, write_atomically
    from bntool.files.detect import FileKind, Kind, detect
    from bntool.files.loaded import Loaded
    from bntool.files.loading import load
    from bntool.files.memory import Record, last_output, recall, remember
    from bntool.files.references import is_reference
    from bntool.files.saving import allow_entries_of, save_model
    from bntool.files.sidecar import (
        Origin,
        describes,
        make_document,
        output_name,
        read_sidecar,
        sidecar_path,
        write_sidecar,
    )
    from bntool.files.targets import Target

_HOME = {
    "allow_entries_of": "saving",
    "describes": "sidecar",
    "is_reference": "references",
    "Target": "targets",
    "sha256_of": "atomic",
    "write_atomically": "atomic",
    "FileKind": "detect",
    "Kind": "detect",
    "detect": "detect",
    "Loaded": "loaded",
    "load": "loading",
    "Record": "memory",
    "last_output": "memory",
    "recall": "memory",
    "remember": "memory",
    "save_model": "saving",
    "Origin": "sidecar",
    "make_document": "sidecar",
    "output_name": "sidecar",
    "read_sidecar": "sidecar",
    "sidecar_path": "sidecar",
    "write_sidecar": "sidecar",
}

__all__ = [
    "FileKind",
    "Kind",
    "Loaded",
    "Origin",
    "Record",
    "Target",
    "allow_entries_of",
    "describes",
    "detect",
    "is_reference",
    "last_output",
    "load",
    "make_document",
    "output_name",
    "read_sidecar",
    "recall",
    "remember",
    "save_model",
    "sha256_of",
    "sidecar_path",
    "write_atomically",
    "write_sidecar",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
