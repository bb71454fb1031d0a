"""One run on disk: everything that it needs to go on as if it had never stopped."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bntool.core.errors import BntoolError, LoadError
from bntool.experiment.randomness import set_random_state
from bntool.files.atomic import write_atomically
from bntool.runtime.process_group import World

SCHEMA_VERSION = 1


@dataclasses.dataclass
class Progress:
    """How far a run has come: `step` of `epoch` is next; `sums` of the epoch so far (loss, hits, samples).

    `history` holds the figures of each epoch that is done, `records` what was seen inside, `diverged` where
    the loss stopped being a number, `warning` that its batches differ more than chance allows.
    """

    epoch: int = 0
    step: int = 0
    sums: list[float] = dataclasses.field(default_factory=lambda: [0.0, 0.0, 0.0])
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    records: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    diverged: dict[str, Any] | None = None
    warning: str = ""


def write_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    states: list[dict[str, Any]],
) -> None:
    """Write the run as it stands between two steps, whole or not at all.

    `states` are the states of the generators, one for each process.
    """
    held = {
        "schema_version": SCHEMA_VERSION,
        "tensors": _tensors(model),
        "optimizer": optimizer.state_dict(),
        "random": states[0],
        "random_elsewhere": states[1:],
        "progress": dataclasses.asdict(progress),
    }

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            try:
                torch.save(held, file)
            except RuntimeError as error:  # torch's writer reports a full disk so
                raise OSError(f"torch.save failed ({str(error).splitlines()[0]})") from error

    write_atomically(path, write, force=True)


def read_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, world: World
) -> Progress | None:
    """Put model, optimizer and every generator back where the run stood; None where it has not begun.

    Rank 0 reads the file and tells the others what it holds: they may not see its disk. Raises `LoadError`
    for a file that is damaged or of another model.
    """
    try:
        held = world.told(_held(path) if world.is_main else None)
        if held is None:
            return None
        if held["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"it has schema version {held['schema_version']}")
        progress = Progress(**held["progress"])
        own = _tensors(model)
        if set(own) != set(held["tensors"]):
            raise ValueError("its tensors are those of another model")
        with torch.no_grad():
            for name, tensor in held["tensors"].items():
                own[name].copy_(tensor)
        optimizer.load_state_dict(held["optimizer"])
        set_random_state([held["random"], *held.get("random_elsewhere", ())][world.rank])
    except BntoolError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise LoadError(
            f"the checkpoint {path.name} cannot be read: {lines[0]}",
            where=str(path),
            next_step="remove it, and that run begins anew; the others go on",
        ) from error
    return progress


def _held(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer, those that a state_dict leaves out too."""
    return {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
