"""Names of files as ONNX Runtime takes them, whatever bytes they are made of."""

from __future__ import annotations

import dataclasses
import os


def opened_by(model: str | bytes) -> str | bytes | os.PathLike[bytes]:
    """The model as ONNX Runtime takes it, which makes UTF-8 of a text: not every name can be that."""
    if isinstance(model, str) and os.fsencode(model) != model.encode(errors="replace"):
        return _NativePath(model)
    return model


@dataclasses.dataclass(frozen=True)
class _NativePath(os.PathLike[bytes]):
    """A path as the system's own bytes."""

    path: str

    def __fspath__(self) -> bytes:
        return os.fsencode(self.path)
