"""`bntool calibrate`: parse, call, print."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from bntool.cli import options as opt
from bntool.cli.data import opened_data
from bntool.cli.job import joined
from bntool.cli.session import Session, Voice, open_session, require_no_script
from bntool.errors import UsageError

if TYPE_CHECKING:
    from bntool.world import World


@click.command("calibrate", short_help="Recompute running statistics from data.")
@opt.model_options()
@opt.data_options(required=True)
@click.option("--freeze", is_flag=True, help="Keep BatchNorm frozen through model.train().")
@opt.output_options()
@opt.job_option()
@opt.common_options()
def command(**options: Any) -> int:
    """Recompute every BatchNorm's running mean and variance from data, exactly and without momentum.

    The data must be prepared as in training. Writes NAME_calibrated beside the input; the input is never
    touched. Layers with track_running_stats=False get running statistics, so that they can be folded.
    Under torchrun each process reads its share of the batches.
    """
    voice = Voice.of(options)
    with joined(options["timeout"]) as world:
        voice.silent = not world.is_main
        return _calibrate(voice, options, world)


def _calibrate(voice: Voice, options: dict[str, Any], world: World) -> int:
    session = open_session(voice, options)
    require_no_script(session, "calibrate")
    from bntool.calibrating import calibrate
    from bntool.cli.writing import chosen_output, write_model

    place = None
    if world.is_main and not options["dry_run"]:
        place = chosen_output(session, "calibrate", options["output"])
        _require_storable(session, options["freeze"])
    batches = opened_data(session, options, (world.rank, world.size))
    if world.size > 1:
        voice.note(f"{world.size} processes, each with one of every {world.size} batches")
    with voice.progress("calibrating") as step:
        result = calibrate(session.model, batches, freeze=options["freeze"], progress=step)
    voice.say(result.render(verbose=not options["quiet"]))
    if place is not None:
        write_model(session, "calibrate", result, place)
        voice.say(f"wrote       {place.named}")
    voice.emit(
        {
            **result.to_dict(),
            "data": batches.origin,
            "output": str(place.named) if place else None,
            "dry_run": options["dry_run"],
        }
    )
    return 0


def _require_storable(session: Session, freeze: bool) -> None:
    """Weights alone cannot hold new layers: what reads them back makes the layers from the architecture."""
    from torch import nn

    from bntool.calibrating import untracked_layers

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
