"""The `.bntool.json` beside an output: what was done, to what, with which versions. And names of outputs.

Nothing in it is a grant: it holds no allow-list, and a stranger may have written it. No torch here.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from bntool.core.errors import LoadError
from bntool.core.schema import Damaged, Name, fitted, read, version_of
from bntool.core.text import visible
from bntool.files.atomic import sha256_of, write_atomically, write_text
from bntool.files.regular import exists

SCHEMA_VERSION = 1
Action = Literal["insert", "fold", "calibrate", "compare", "export"]

_SUFFIX = ".bntool.json"
_ENDINGS: dict[str, str] = {
    "insert": "_bn",
    "fold": "_folded",
    "calibrate": "_calibrated",
    "compare": "_trained",
    "export": "",
}


class _Output(msgspec.Struct):
    name: Name = ""
    sha256: Name = ""


class _Reload(msgspec.Struct):
    arch: Name | None = None
    weights: Name | None = None
    key: Name | None = None


class _Source(msgspec.Struct):
    untrained: Name = ""


class _SideFile(msgspec.Struct):
    """What is read back of a side file; a plan in it is read where it is replayed."""

    source: _Source | None = None
    output: _Output | None = None
    reload: _Reload | None = None
    plan: dict[str, Any] | None = None
    earlier_plans: tuple[dict[str, Any], ...] = ()


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
    return output.with_name(output.name + _SUFFIX)


UNTRAINED = ("random weights", "no weights were loaded")
"""How a note begins that says that a model has not been trained."""


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a model came from: a reference or a file, its sha256, and what else it takes to load it.

    `notes` are those of its load; of them only that it has not been trained is kept.
    """

    reference: str
    sha256: str = ""
    arch: str | None = None
    weights: str | None = None
    key: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def untrained(self) -> str:
        """Which of `UNTRAINED` the notes say; empty for none."""
        return next((kind for kind in UNTRAINED if any(n.startswith(kind) for n in self.notes)), "")


def make_document(
    command: str,
    origin: Origin,
    output: str | Path,
    *,
    digest: str = "",
    plan: Mapping[str, Any] | None = None,
    parameters: Mapping[str, Any] | None = None,
    checks: Any = (),
) -> dict[str, Any]:
    """The document for an output. No time and no folder is in it: same input, same bytes.

    `digest` is the output's sha256, for one that does not stand in its place yet.
    """
    output = Path(output)
    return {
        "schema_version": SCHEMA_VERSION,
        "command": command,
        "source": {
            "reference": _name(origin.reference),
            "sha256": origin.sha256,
            "untrained": origin.untrained,
        },
        "output": {"name": visible(output.name), "sha256": digest or sha256_of(output)},
        "versions": {package: _version(package) for package in ("bntool", "torch")},
        "reload": {
            "arch": origin.arch,
            "weights": _name(origin.weights) if origin.weights else None,
            "key": origin.key,
        },
        "plan": dict(plan) if plan is not None else None,
        "key_map": dict(plan.get("key_map", {})) if plan is not None else {},
        "parameters": dict(parameters) if parameters is not None else None,
        "checks": list(checks),
    }


def write_sidecar(output: str | Path, document: Mapping[str, Any], force: bool = False) -> Path:
    """Write the document beside `output`; `UsageError` when there is one already and not `force`."""
    path = sidecar_path(output)
    write_atomically(path, lambda draft: fill_sidecar(draft, document), force=force)
    return path


def fill_sidecar(draft: Path, document: Mapping[str, Any]) -> None:
    """Write the document into a draft of a side file."""
    write_text(draft, json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def is_sidecar(path: Path) -> bool:
    """Whether a file is a side file of bntool's, which may be replaced together with its output."""
    try:
        held: Any = read_sidecar(path.with_name(path.name.removesuffix(_SUFFIX)))
    except LoadError:
        return False
    return isinstance(held, dict) and {"command", "source", "output", "versions"} <= held.keys()


def read_sidecar(output: str | Path) -> dict[str, Any] | None:
    """The document beside `output`, None when there is none; `LoadError` when it cannot be read."""
    path = sidecar_path(output)
    if not exists(path) or not path.is_file():
        return None
    try:
        document: Any = read(path)
        version = version_of(document)
        if version is None:
            raise Damaged("it has no schema_version")
        if version <= SCHEMA_VERSION:
            fitted(document, _SideFile)
    except Damaged as error:
        raise damaged(path, error.why, error.place) from error
    except OSError as error:
        raise damaged(path, f"it cannot be read: {error.strerror}", "") from error
    if version > SCHEMA_VERSION:
        raise LoadError(
            f"{path.name} has schema version {version}; this bntool reads up to {SCHEMA_VERSION}",
            where=str(path),
            next_step="pip install --upgrade bntool",
        )
    return dict(document)


def damaged(path: Path, why: str, place: str) -> LoadError:
    """The error for a side file of which `place` is not what it must be."""
    return LoadError(
        f"{path.name} is damaged: {why}",
        where=f"{path}, {place}" if place else str(path),
        next_step=f"remove {path}, or make the model again",
    )


def is_result(output: Path, command: str) -> bool:
    """Whether `output` is what this command of bntool's wrote, as its side file says, and unchanged."""
    if not (output.is_file() and is_sidecar(sidecar_path(output))):
        return False
    document = read_sidecar(output) or {}
    return document.get("command") == command and describes(document, output)


def describes(document: Mapping[str, Any], output: str | Path) -> bool:
    """Whether the document was written for `output` as it is now (its sha256 agrees)."""
    recorded = document.get("output")
    return isinstance(recorded, dict) and recorded.get("sha256") == sha256_of(output)


def untrained(document: Mapping[str, Any]) -> str:
    """The note that a document's model has not been trained; empty where it may have been."""
    source = document.get("source")
    kind = source.get("untrained") if isinstance(source, dict) else ""
    return f"{kind} where it was made, as its side file says" if kind in UNTRAINED else ""


def _name(reference: str) -> str:
    """A file without its folder, so that the document says the same wherever it is made; fit to be read."""
    return visible(Path(reference).name if ":" not in reference or Path(reference).exists() else reference)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
