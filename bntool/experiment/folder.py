"""The folder of a comparison: what must be the same for its runs to go on, and the document it ends with."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bntool.core.errors import LoadError, UsageError
from bntool.core.schema import Damaged, Name, Text, fitted, read
from bntool.experiment.outcome import ARMS, TrainingComparison
from bntool.experiment.samples import Data
from bntool.experiment.settings import Settings
from bntool.files.atomic import write_atomically, write_text
from bntool.files.placing import remove, remove_unnamed
from bntool.files.shards import own_shards
from bntool.files.sidecar import is_result, sidecar_path
from bntool.runtime.process_group import World

SCHEMA_VERSION = 1
RUNS, SETTINGS, DOCUMENT = "runs", "settings.json", "compare.json"
_PICTURES = ("curves", "distributions", "gradients", "rates")
FILES = (SETTINGS, DOCUMENT, *(f"{name}.{ending}" for name in _PICTURES for ending in ("png", "svg")))
"""All that a comparison writes into its folder, but for checkpoints and models."""
_Scalar = bool | int | float | Text | None
_Setting = _Scalar | tuple[_Scalar, ...]
_TELLING = frozenset(Settings.__dataclass_fields__) | {"torch", "number_of_processes"}


def require_alike(identities: list[dict[str, Any]]) -> None:
    for rank, other in enumerate(identities):
        key = next((key for key in other if other[key] != identities[0][key]), None)
        if key is not None:
            raise UsageError(
                f"the processes of ranks 0 and {rank} do not have the same {key.replace('_', ' ')}",
                next_step="give each the same files; a loader that draws samples must do so by torch's seed",
            )


def identity_of(model: nn.Module, data: Data, settings: Settings, world: World) -> dict[str, Any]:
    """What must be the same for runs to go on; rates, seeds and repeats each have runs of their own."""
    digest = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        if not settings.from_scratch:
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    own = {"lrs", "seed", "repeats"}
    return {
        **{name: value for name, value in settings.to_dict().items() if name not in own},
        "number_of_processes": world.size,
        "model": digest.hexdigest(),
        "data": data.fingerprint(),
        "torch": torch.__version__,
    }


def require_no_other(folder: Path) -> None:
    """Raise `UsageError` for a folder that holds anything but a comparison."""
    held = folder.exists() and not (folder / SETTINGS).is_file()
    if held and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists, and is no comparison", next_step="name another folder with -o")


def open_folder(folder: Path, identity: dict[str, Any], *, force: bool) -> None:
    """Make the folder, or go on in one of the same settings.

    `force` begins anew: the results of the comparison that is there go, and then its checkpoints, so that
    none is ever beside settings that it did not come from.
    """
    require_no_other(folder)
    path = folder / SETTINGS
    text = json.dumps(identity, indent=1) + "\n"
    if path.is_file():
        # What a folder leaves out that was begun before there were several processes.
        held = {"sync": False, "number_of_processes": 1, **_held(path)}
        other = next((k for k in identity if held.get(k) != identity[k]), None)
        if other is not None and not force:
            raise UsageError(
                f"{folder} holds a comparison of another {other.replace('_', ' ')}"
                + (f": {held.get(other)} there, {identity[other]} here" if other in _TELLING else ""),
                where=str(path),
                next_step="pass --force to begin anew, or name another folder with -o",
            )
        if other is not None and not held.keys() >= identity.keys():
            raise UsageError(f"{path} is no record of a comparison", next_step="name another folder with -o")
        if force:
            _remove_results(folder)
            for checkpoint in filter(_is_run, (folder / RUNS).glob("*.pt")):
                remove(checkpoint)
    try:
        (folder / RUNS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"cannot write into {folder}: {error.strerror}", next_step="name another folder with -o"
        ) from error
    write_atomically(path, lambda draft: write_text(draft, text), force=True)


def _remove_results(folder: Path) -> None:
    """What the comparison ended with, as it wrote it; a model that was changed since stays."""
    for name in FILES:
        if name != SETTINGS:
            remove(folder / name)
    for model in [path for path in folder.iterdir() if is_result(path, "compare")]:
        shards = own_shards(model)
        remove(model)
        for shard in shards:
            remove_unnamed(shard, set())
        remove(sidecar_path(model))


def _is_run(path: Path) -> bool:
    """`plain-0.1-0.pt`: the checkpoint of an arm, a rate and a seed."""
    return bool(re.fullmatch(rf"(?:{'|'.join(ARMS)})-[-+.e\d]+-\d+\.pt", path.name))


def _held(path: Path) -> dict[str, Any]:
    """The settings that a folder holds; `LoadError` where they are damaged, and so perhaps not bntool's."""
    try:
        data = read(path)
        fitted(data, dict[Name, _Setting])
    except Damaged as error:
        raise LoadError(
            f"{path.name} is damaged: {error.why}",
            where=f"{path}, {error.place}" if error.place else str(path),
            next_step="name another folder with -o",
        ) from error
    except OSError as error:
        raise LoadError(
            f"{path.name} cannot be read: {error.strerror}",
            where=str(path),
            next_step="name another folder with -o",
        ) from error
    held: dict[str, Any] = data
    return held


def write_document(folder: Path, found: TrainingComparison) -> Path:
    """Write `compare.json`: no time and no folder is in it."""
    path = folder / DOCUMENT
    text = json.dumps({"schema_version": SCHEMA_VERSION, **found.to_dict()}, ensure_ascii=False) + "\n"
    write_atomically(path, lambda draft: write_text(draft, text), force=True)
    return path
