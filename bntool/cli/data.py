"""Open the data that a command was given with `--data`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bntool.cli.session import Session
from bntool.core.command_options import DataOptions, LoadOptions
from bntool.core.errors import ObserveError, UsageError

if TYPE_CHECKING:
    from bntool.data.batches import Batches
    from bntool.graph.inputs import Inputs


def opened_data(
    session: Session, data: DataOptions, load: LoadOptions, share: tuple[int, int] = (0, 1)
) -> Batches:
    """The batches of `--data`, made to fit what the model takes; of several processes, those of `share`.

    `load` tells whether the user chose the size of the inputs.
    """
    import torch

    from bntool.data.batches import open_batches

    assert data.data is not None  # the commands require it
    images = Path(data.data).is_dir()
    like = example_of(session, small=not images)
    if images and like is not None:
        why = "" if load.inputs else f": {like.origin} (--input sets another size)"
        session.voice.note(f"images are made {like.shapes()}{why}")
        if data.mean is None and data.std is None:
            session.voice.note("images are scaled to 0..1; --mean and --std if training normalised them")
    torch.manual_seed(session.seed)  # a loader that shuffles does so the same way every time
    return open_batches(
        data.data,
        batch_size=data.batch_size,
        limit=data.limit,
        like=like,
        mean=numbers(data.mean, "--mean"),
        std=numbers(data.std, "--std"),
        share=share,
    )


def example_of(session: Session, *, small: bool) -> Inputs | None:
    """What the model takes, as far as it is known: the data itself decides where it is not."""
    from bntool.observe.inference import observe_inferred

    if session.inputs is not None:
        return session.inputs
    try:
        return observe_inferred(session.model, small=small).inputs
    except ObserveError:
        return None


def numbers(text: str | None, option: str) -> list[float] | None:
    """The numbers of an option's `a,b,c`; None where it was not given. `UsageError` for anything else."""
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(
            f"{option} {text} is not a list of numbers", next_step=f"write it as {option} 0.485,0.456,0.406"
        ) from error
