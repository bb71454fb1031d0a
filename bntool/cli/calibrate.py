"""`bntool calibrate`: parse, call, print."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import click

from bntool.cli.data import opened_data, tell_used
from bntool.cli.job import joined
from bntool.cli.opening import of_session, open_module
from bntool.cli.options import takes
from bntool.cli.session import Session, Voice
from bntool.core.command_options import (
    DataOptions,
    JobOptions,
    LoadOptions,
    ModelOptions,
    SpeechOptions,
    WriteOptions,
)
from bntool.core.errors import UsageError
from bntool.core.option import Options, option

if TYPE_CHECKING:
    from bntool.runtime.process_group import World


@dataclasses.dataclass(frozen=True)
class CalibrateOptions(Options):
    """What becomes of the layers besides."""

    freeze: bool = option(False, "Keep BatchNorm frozen through model.train().")


@click.command("calibrate", short_help="Recompute running statistics from data.")
@takes(
    ModelOptions,
    LoadOptions,
    DataOptions,
    CalibrateOptions,
    WriteOptions,
    JobOptions,
    SpeechOptions,
    required=("data",),
)
def command(
    voice: Voice,
    model: ModelOptions,
    load: LoadOptions,
    data: DataOptions,
    calibrate: CalibrateOptions,
    write: WriteOptions,
    job: JobOptions,
) -> int:
    """Recompute every BatchNorm's running mean and variance from data, exactly and without momentum.

    The data must be prepared as in training. Writes NAME_calibrated beside the input; the input is never
    touched. Layers with track_running_stats=False get running statistics, so that they can be folded.
    Under torchrun each process reads its share of the batches.
    """
    with joined(job.timeout) as world:
        voice.silent = not world.is_main
        session = open_module(voice, model.model, load, "calibrate")
        return _calibrate(session, data, load, write, world, freeze=calibrate.freeze)


def _calibrate(
    session: Session, data: DataOptions, load: LoadOptions, write: WriteOptions, world: World, *, freeze: bool
) -> int:
    from bntool.calibrating.calibrating import calibrate
    from bntool.cli.writing import chosen_output, write_model

    voice, place = session.voice, None
    if world.is_main and not write.dry_run:
        place = chosen_output(voice, of_session(session), "calibrate", write.output)
        _require_storable(session, freeze)
    batches = opened_data(session, data, load, (world.rank, world.size))
    if world.size > 1:
        voice.note(f"{world.size} processes, each with one of every {world.size} batches")
    with voice.progress("calibrating") as step:
        result = calibrate(session.model, batches, freeze=freeze, progress=step)
    tell_used(voice, batches)
    voice.say(result.render(verbose=not voice.quiet))
    if place is not None:
        write_model(session, "calibrate", result, place)
        voice.say(f"wrote       {place.named}")
    voice.emit(
        {
            **result.to_dict(),
            "data": batches.origin,
            "output": str(place.named) if place else None,
            "dry_run": write.dry_run,
        }
    )
    return 0


def _require_storable(session: Session, freeze: bool) -> None:
    """Weights alone cannot hold new layers: what reads them back makes the layers from the architecture."""
    from torch import nn

    from bntool.calibrating.calibrating import untracked_layers

    loaded = session.loaded
    inside = loaded.wrapped_in
    whole = inside is None or isinstance(inside.value, nn.Module)
    if whole:
        return
    untracked = untracked_layers(session.model)
    if freeze or untracked:
        what = "that layers are frozen" if freeze else "running statistics that its layers do not have"
        raise UsageError(
            f"{loaded.reference} holds only weights, which cannot say {what}",
            where="" if freeze else untracked[0],
            next_step="start from a whole model: torch.save(model, 'model.pt')",
        )
