"""`bntool calibrate`: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bntool.cli import options as opt
from bntool.cli.session import Session, Voice, open_session
from bntool.errors import ObserveError, UsageError

if TYPE_CHECKING:
    from bntool.batches import Batches
    from bntool.inputs import Inputs


@click.command("calibrate", short_help="Recompute running statistics from data.")
@opt.model_options()
@click.option(
    "--data",
    required=True,
    metavar="DATA",
    help="An .npy, .npz or .pt file, a folder of images, or pkg.mod:loader.",
)
@click.option("--batch-size", type=int, default=32, show_default=True, help="Samples in a batch.")
@click.option("--batches", "limit", type=int, metavar="N", help="At most N batches (default: all).")
@click.option("--mean", metavar="R,G,B", help="Mean of each channel, taken off images in 0..1.")
@click.option("--std", metavar="R,G,B", help="Standard deviation of each channel of images in 0..1.")
@click.option("--freeze", is_flag=True, help="Keep BatchNorm frozen through model.train().")
@opt.output_options()
@opt.common_options()
def command(**options: Any) -> int:
    """Recompute every BatchNorm's running mean and variance from data, exactly and without momentum.

    The data must be prepared as in training. Writes NAME_calibrated beside the input; the input is never
    touched. Layers with track_running_stats=False get running statistics, so that they can be folded.
    """
    voice = Voice(options["as_json"], options["quiet"], options["verbose"])
    session = open_session(voice, options)
    from bntool.calibrating import calibrate
    from bntool.cli.writing import chosen_output, write_model

    path = None
    if not options["dry_run"]:
        path = chosen_output(session, "calibrate", options["output"], options["force"])
        _require_storable(session, options["freeze"])
    batches = _opened(session, options)
    with voice.progress("calibrating") as step:
        result = calibrate(session.model, batches, freeze=options["freeze"], progress=step)
    voice.say(result.render(verbose=not options["quiet"]))
    if path is not None:
        write_model(session, "calibrate", result, path, options["force"])
        voice.say(f"wrote       {path}")
    voice.emit(
        {
            **result.to_dict(),
            "data": batches.origin,
            "output": str(path) if path else None,
            "dry_run": options["dry_run"],
        }
    )
    return 0


def _opened(session: Session, options: dict[str, Any]) -> Batches:
    import torch

    from bntool.batches import open_batches

    images = Path(options["data"]).is_dir()
    like = _example(session, small=not images)
    if images and like is not None:
        session.voice.note(f"images are made {like.shapes()}: {like.origin} (--input sets another size)")
        if options["mean"] is None and options["std"] is None:
            session.voice.note("images are scaled to 0..1; --mean and --std if training normalised them")
    torch.manual_seed(session.seed)  # a loader that shuffles does so the same way every time
    return open_batches(
        options["data"],
        batch_size=options["batch_size"],
        limit=options["limit"],
        like=like,
        mean=_numbers(options["mean"], "--mean"),
        std=_numbers(options["std"], "--std"),
    )


def _example(session: Session, *, small: bool) -> Inputs | None:
    """What the model takes, as far as it is known: the data itself decides where it is not."""
    from bntool.observe.inference import observe_inferred

    if session.inputs is not None:
        return session.inputs
    try:
        return observe_inferred(session.model, small=small).inputs
    except ObserveError:
        return None


def _numbers(text: str | None, option: str) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(
            f"{option} {text} is not a list of numbers", next_step=f"write it as {option} 0.485,0.456,0.406"
        ) from error


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
