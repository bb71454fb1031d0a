"""What `bntool compare` alone is asked, and the settings that follow."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

from bntool.core.errors import UsageError
from bntool.core.option import Options, option
from bntool.core.options import InsertOptions

if TYPE_CHECKING:
    from bntool.experiment.settings import Settings


def _rates(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"{text!r} is not a list of numbers like 0.01,0.1") from error


@dataclasses.dataclass(frozen=True)
class CompareOptions(Options):
    """How both arms are trained, on what, and where the comparison goes.

    Which numbers there may be is known to `experiment.settings.Settings`, that holds them.
    """

    root: str | None = option(
        None, "Where mnist and fashion-mnist lie (default: data).", metavar="FOLDER", names="folder"
    )
    download: bool = option(False, "Let torchvision load the data down.")
    epochs: int = option(1, "Passes over the training data.", metavar="N", required=True)
    batch_size: int = option(128, "")
    optimizer: Literal["sgd", "adam", "adamw"] = option("sgd", "")
    lr: tuple[float, ...] = option((0.01,), "Learning rates, a run each.", metavar="R[,R]", parse=_rates)
    momentum: float = option(0.9, "Of SGD.")
    weight_decay: float = option(0.0, "")
    schedule: Literal["constant", "cosine", "step"] = option(
        "constant", "cosine falls to 0; step to a tenth after 1/2 of the steps and a hundredth after 3/4."
    )
    repeats: int = option(1, "Runs with seeds N, N + 1, …")
    from_scratch: bool = option(False, "Draw new weights by the seed, the same for both.")
    sync: bool = option(False, "SyncBatchNorm: processes of torchrun normalise together.")
    init: Literal["identity", "default"] | None = option(
        None, "As in bntool insert. Default: default from scratch, else identity."
    )
    watch_every: int | None = option(
        None,
        "Look into the layers at every N-th step; 0 for never (default: a hundred times a run).",
        metavar="N",
    )
    output: str | None = option(
        None,
        "Default: NAME_compare.",
        "-o",
        "--output",
        metavar="FOLDER",
        names="folder",
        written=True,
    )
    force: bool = option(False, "Begin anew where the folder holds another comparison.")


def settings_of(compare: CompareOptions, insert: InsertOptions, *, seed: int, device: str) -> Settings:
    """What both arms are trained with: `seed` is that of the first repeat, `device` may be `auto`.

    Raises `UsageError` for a number out of range.
    """
    from bntool.experiment.settings import Settings

    return Settings(
        epochs=compare.epochs,
        batch_size=compare.batch_size,
        optimizer=compare.optimizer,
        lrs=compare.lr,
        momentum=compare.momentum,
        weight_decay=compare.weight_decay,
        schedule=compare.schedule,
        repeats=compare.repeats,
        seed=seed,
        from_scratch=compare.from_scratch,
        activations=insert.activations,
        position=insert.position,
        affine=insert.affine,
        sync=compare.sync,
        init=compare.init,
        device=_present(device),
        watch_every=compare.watch_every,
    )


def _present(device: str) -> str:
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device
