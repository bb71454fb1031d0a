"""The `.bntool.json` beside an output: what was done, to what, with which versions. And names of outputs.

Nothing in it is a grant: it holds no allow-list, and a stranger may have written it. No torch here.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from bntool.errors import LoadError
from bntool.files.atomic import sha256_of, write_atomically
from bntool.files.regular import exists, read_text

SCHEMA_VERSION = 1
Action = Literal["insert", "fold", "calibrate", "compare", "export"]

_ENDINGS: dict[str, str] = {
    "insert": "_bn",
    "fold": "_folded",
    "calibrate": "_calibrated",
    "compare": "_trained",
    "export": "",
}


def output_name(source: str | Path, action: Action, *, suffix: str | None = None) -> Path:
    """Where an action's output goes: `vgg16.pt` -> `vgg16_bn.pt`, `vgg16_bn.pt` -> `vgg16_bn_folded.pt`.

    Beside a file; in the current folder for a reference (`torchvision:vgg16` -> `vgg16_bn.pt`). `suffix`
    replaces the ending, which is `.onnx` for `export`.
    """
    text = str(source)
    head, colon, tail = text.rpartition(":")
    if colon and not Path(text).exists() and not ("/" in tail or "\\" in tail):
        folder, stem, ending = Path(), tail.replace(".", "_") if not head else tail, ".pt"
    else:
        path = Path(text)
        double = next(
            (d for d in (".pth.tar", ".pt.tar", ".safetensors.index.json") if path.name.endswith(d)), ""
        )
        ending = double or path.suffix
        folder, stem = path.parent, path.name[: len(path.name) - len(ending)]
    if action == "export":
        ending = ".onnx"
    return folder / f"{stem}{_ENDINGS[action]}{suffix or ending or '.pt'}"


def sidecar_path(output: str | Path) -> Path:
    """`vgg16_bn.pt` -> `vgg16_bn.pt.bntool.json`."""
    output = Path(output)
    return output.with_name(output.name + ".bntool.json")


def make_document(
    command: str,
    *,
    source: str,
    source_hash: str,
    output: str | Path,
    arch: str | None = None,
    weights: str | None = None,
    key: str | None = None,
    plan: Mapping[str, Any] | None = None,
    parameters: Mapping[str, Any] | None = None,
    checks: Any = (),
) -> dict[str, Any]:
    """The document for an output that exists. No time and no folder is in it: same input, same bytes."""
    output = Path(output)
    return {
        "schema_version": SCHEMA_VERSION,
        "command": command,
        "source": {"reference": _name(source), "sha256": source_hash},
        "output": {"name": output.name, "sha256": sha256_of(output)},
        "versions": {package: _version(package) for package in ("bntool", "torch")},
        "reload": {"arch": arch, "weights": _name(weights) if weights else None, "key": key},
        "plan": dict(plan) if plan is not None else None,
        "key_map": dict(plan.get("key_map", {})) if plan is not None else {},
        "parameters": dict(parameters) if parameters is not None else None,
        "checks": list(checks),
    }


def write_sidecar(output: str | Path, document: Mapping[str, Any], force: bool = False) -> Path:
    """Write the document beside `output`; `UsageError` when there is one already and not `force`."""
    path = sidecar_path(output)
    text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
    write_atomically(path, lambda temporary: _write_text(temporary, text), force=force)
    return path


def read_sidecar(output: str | Path) -> dict[str, Any] | None:
    """The document beside `output`, None when there is none; `LoadError` when it cannot be read."""
    path = sidecar_path(output)
    if not exists(path) or not path.is_file():
        return None
    try:
        document: Any = json.loads(read_text(path))
        version = document.get("schema_version") if isinstance(document, dict) else None
        if not isinstance(version, int):
            raise ValueError("it has no schema_version")  # noqa: TRY004  one kind of damage among others
    except (ValueError, RecursionError) as error:
        raise LoadError(f"{path.name} is damaged: {error}", where=str(path), next_step="remove it") from error
    if version > SCHEMA_VERSION:
        raise LoadError(
            f"{path.name} has schema version {version}; this bntool reads up to {SCHEMA_VERSION}",
            where=str(path),
            next_step="pip install --upgrade bntool",
        )
    return dict(document)


def describes(document: Mapping[str, Any], output: str | Path) -> bool:
    """Whether the document was written for `output` as it is now (its sha256 agrees)."""
    recorded = document.get("output")
    return isinstance(recorded, dict) and recorded.get("sha256") == sha256_of(output)


def _name(reference: str) -> str:
    """A file without its folder, so that the document says the same wherever it is made."""
    return Path(reference).name if ":" not in reference or Path(reference).exists() else reference


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _write_text(path: Path, text: str) -> None:
    # In JSON, half a surrogate pair is escaped in the very way that Python replaces it.
    path.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")
