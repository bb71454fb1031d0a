"""Open the data that a command was given with `--data`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bntool.cli.session import Session, Voice
from bntool.core.command_options import DataOptions, LoadOptions
from bntool.core.errors import ObserveError

if TYPE_CHECKING:
    from bntool.data.batches import Batches
    from bntool.data.choosing import Choice
    from bntool.data.images import Preparation
    from bntool.graph.inputs import Inputs


def opened_data(
    session: Session, data: DataOptions, load: LoadOptions, share: tuple[int, int] = (0, 1)
) -> Batches:
    """The batches of `--data`, made to fit what the model takes; of several processes, those of `share`.

    `load` tells whether the user chose the size of the inputs.
    """
    import torch

    from bntool.data.batches import batches_from
    from bntool.data.records import are_records

    assert data.data is not None  # the commands require it
    path = Path(data.data)
    like = example_of(session, small=not path.is_dir() and not are_records(path))
    torch.manual_seed(session.seed)  # a loader that shuffles does so the same way every time
    batches = batches_from(data.data, choice_of(data, session.seed, share), preparation_of(data, like))
    if batches.images and like is not None:
        why = "" if load.inputs else f": {like.origin} (--input sets another size)"
        session.voice.note(f"images are made {like.shapes()}{why}")
        if data.mean is None and data.std is None:
            session.voice.note("images are scaled to 0..1; --mean and --std if training normalised them")
    tell_used(session.voice, batches)
    return batches


def tell_used(voice: Voice, batches: Batches) -> None:
    """Which samples are used; of a loader that is known only when it was read."""
    for note in batches.notes:
        if note not in voice.notes:
            voice.note(note)


def choice_of(data: DataOptions, seed: int, share: tuple[int, int] = (0, 1)) -> Choice:
    """Which samples the options ask for."""
    from bntool.data.choosing import Choice

    return Choice(
        batch_size=data.batch_size,
        batches=data.limit,
        samples=data.samples,
        shuffle=data.shuffle,
        seed=seed,
        split=data.split,
        include=data.files,
        columns=data.columns,
        share=share,
    )


def preparation_of(data: DataOptions, like: Inputs | None) -> Preparation:
    """What the options ask to be made of images."""
    from bntool.data.images import Preparation, normalisation

    return Preparation(like, *normalisation(data.mean, data.std), data.resize)


def example_of(session: Session, *, small: bool) -> Inputs | None:
    """What the model takes, as far as it is known: the data itself decides where it is not."""
    from bntool.observe.inference import observe_inferred

    if session.inputs is not None:
        return session.inputs
    try:
        return observe_inferred(session.model, small=small).inputs
    except ObserveError:
        return None
