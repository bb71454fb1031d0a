"""`bntool compare`: parse, call, print."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bntool.cli import options as opt
from bntool.cli.completing import files, folders
from bntool.cli.data import numbers
from bntool.cli.job import joined
from bntool.cli.session import Session, Voice, open_session, require_no_script
from bntool.errors import UsageError

if TYPE_CHECKING:
    from bntool.cli.writing import Place
    from bntool.experiment.checkpoints import Progress
    from bntool.experiment.datasets import Data
    from bntool.experiment.outcome import TrainingComparison
    from bntool.experiment.settings import Settings
    from bntool.world import World


@click.command("compare", short_help="Train with and without BatchNorm, and compare.")
@opt.model_options()
@click.option(
    "--data",
    required=True,
    metavar="DATA",
    shell_complete=files,
    callback=opt.not_empty,
    help="mnist, fashion-mnist, a folder of images, an .npz file, or pkg.mod:loader.",
)
@click.option(
    "--root",
    metavar="FOLDER",
    shell_complete=folders,
    help="Where mnist and fashion-mnist lie (default: data).",
)
@click.option("--download", is_flag=True, help="Let torchvision load the data down.")
@click.option("--mean", metavar="R,G,B", help="Mean of each channel, taken off images in 0..1.")
@click.option("--std", metavar="R,G,B", help="Standard deviation of each channel of images in 0..1.")
@click.option("--epochs", type=int, required=True, metavar="N", help="Passes over the training data.")
@click.option("--batch-size", type=int, default=128, show_default=True)
@click.option("--optimizer", type=click.Choice(["sgd", "adam", "adamw"]), default="sgd", show_default=True)
@click.option("--lr", default="0.01", show_default=True, metavar="R[,R]", help="Learning rates, a run each.")
@click.option("--momentum", type=float, default=0.9, show_default=True, help="Of SGD.")
@click.option("--weight-decay", type=float, default=0.0, show_default=True)
@click.option(
    "--schedule",
    type=click.Choice(["constant", "cosine", "step"]),
    default="constant",
    show_default=True,
    help="cosine falls to 0; step to a tenth after 1/2 of the steps and a hundredth after 3/4.",
)
@click.option("--repeats", type=int, default=1, show_default=True, help="Runs with seeds N, N + 1, …")
@click.option("--from-scratch", is_flag=True, help="Draw new weights by the seed, the same for both.")
@click.option("--activation", multiple=True, metavar="KIND", help="As in bntool insert.")
@click.option("--position", type=click.Choice(["before", "after"]), default="before", show_default=True)
@click.option("--no-affine", is_flag=True, help="BatchNorm without γ and β.")
@click.option("--sync", is_flag=True, help="SyncBatchNorm: processes of torchrun normalise together.")
@click.option(
    "--init",
    type=click.Choice(["identity", "default"]),
    help="As in bntool insert. Default: default from scratch, else identity.",
)
@click.option(
    "--watch-every",
    type=int,
    metavar="N",
    help="Look into the layers at every N-th step; 0 for never (default: a hundred times a run).",
)
@click.option(
    "--device",
    default="auto",
    show_default=True,
    callback=opt.device,
    metavar="auto|cpu|cuda",
    help="Where to train.",
)
@click.option(
    "-o",
    "--output",
    metavar="FOLDER",
    callback=opt.not_empty,
    shell_complete=folders,
    help="Default: NAME_compare.",
)
@click.option("--force", is_flag=True, help="Begin anew where the folder holds another comparison.")
@opt.job_option()
@opt.report_option()
@opt.common_options()
def command(**options: Any) -> int:
    """Train MODEL as it is and with BatchNorm, on the same batches, and compare.

    Writes NAME_compare/ here: compare.json, plots, both trained models, and a checkpoint of each run. The
    same command goes on where it was stopped, and gives the same figures. Under torchrun the processes share
    each batch.
    """
    voice = Voice.of(options)
    settings = _settings(options)
    with joined(options["timeout"], settings.device) as world:
        voice.silent = not world.is_main
        return _compare(voice, options, settings, world)


def _compare(voice: Voice, options: dict[str, Any], settings: Settings, world: World) -> int:
    session = open_session(voice, options)
    require_no_script(session, "train")
    from bntool.cli.picturing import picture_module
    from bntool.experiment.comparison import compare_training
    from bntool.experiment.folder import write_document
    from bntool.experiment.plots import require_matplotlib, write_plots
    from bntool.files.sidecar import output_name
    from bntool.runtime.torch_runner import require_torch_device

    require_torch_device(settings.device)
    require_matplotlib()
    data = _data_in_turn(session, options, world)
    for note in data.notes:
        voice.note(note)
    folder = Path(options["output"] or f"{output_name(_source(session), 'export').stem}_compare")
    places = _claim(session, folder, force=options["force"]) if world.is_main else {}
    try:
        with _progress(voice, settings) as tell:
            found = compare_training(
                session.model, data, settings, folder, force=options["force"], world=world, tell=tell
            )
    except KeyboardInterrupt:
        voice.note(f"the same command goes on from the last checkpoint in {folder}")
        raise
    if not world.is_main:
        return 0
    voice.say(found.render())
    if session.inputs is None:  # what the next command in this folder runs the trained model on
        session.inputs = data.example()
    picture_module(session, found.models.get("batchnorm"))
    files = [write_document(folder, found), *write_plots(found, folder)]
    files += _write_models(session, found, places)
    for path in files:
        if path.suffix != ".svg":
            voice.say(f"wrote       {path}")
    voice.emit({**found.to_dict(), "folder": str(folder), "files": [str(path) for path in files]})
    return 0


def _settings(options: dict[str, Any]) -> Settings:
    from bntool.experiment.settings import Settings

    same = (
        "epochs batch_size optimizer momentum weight_decay schedule repeats seed from_scratch position sync "
        "init watch_every"
    )
    return Settings(
        lrs=tuple(numbers(options["lr"], "--lr") or ()),
        activations=options["activation"] or ("relu",),
        affine=not options["no_affine"],
        device=_device(options["device"]),
        **{name: options[name] for name in same.split()},
    )


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def _data_in_turn(session: Session, options: dict[str, Any], world: World) -> Data:
    """The data, which the first process of each machine loads down, where it is to be, before the others."""
    if not options["download"]:
        return _data(session, options)
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    data = _data(session, options) if first else None
    world.gather(None)
    return data if data is not None else _data(session, options)


def _data(session: Session, options: dict[str, Any]) -> Data:
    from bntool.cli.data import example_of
    from bntool.experiment.datasets import open_dataset

    folder = Path(options["data"]).is_dir()
    return open_dataset(
        options["data"],
        root=options["root"],
        download=options["download"],
        like=example_of(session, small=False) if folder else None,
        mean=numbers(options["mean"], "--mean"),
        std=numbers(options["std"], "--std"),
        seed=session.seed,
    )


def _source(session: Session) -> str | Path:
    return session.loaded.path or session.loaded.reference


def _claim(session: Session, folder: Path, *, force: bool) -> dict[str, Place]:
    """Before any work: all files of the comparison; returns where the trained model of each arm goes."""
    from bntool.cli.writing import claim_model
    from bntool.experiment.folder import FILES, require_no_other
    from bntool.files.sidecar import is_result, output_name

    require_no_other(folder)
    target = session.voice.target
    target.claim_folder(folder)
    for name in FILES:
        target.claim(folder / name)
    sources = {"plain": _source(session), "batchnorm": output_name(_source(session), "insert")}
    paths = {arm: folder / output_name(source, "compare").name for arm, source in sources.items()}
    for path in paths.values():
        if path.is_file() and not force and not is_result(path, "compare"):
            raise UsageError(f"{path} is no file of this comparison", next_step="move it, or pass --force")
    return {arm: claim_model(path, target) for arm, path in paths.items()}


def _write_models(session: Session, found: TrainingComparison, places: dict[str, Place]) -> list[Path]:
    """The trained models as files of the kind that the input was; the one with BatchNorm is remembered."""
    from bntool.cli.writing import Made, write_model
    from bntool.report.counting import parameter_delta

    for arm, model in found.models.items():
        plan = found.surgery.plan if arm == "batchnorm" else None
        write_model(session, "compare", Made(model, parameter_delta(session.model, model), plan), places[arm])
    return [places[arm].named for arm in found.models]


@contextlib.contextmanager
def _progress(voice: Voice, settings: Settings) -> Iterator[Callable[..., None]]:
    """A line for each epoch, and a bar on stderr where that is a terminal."""
    from bntool.experiment.outcome import ARMS, TITLES

    bar: Any = None
    if not (voice.quiet or voice.as_json or voice.silent) and sys.stderr.isatty():
        from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn

        from bntool.cli.progress import Description, bar_of

        bar = bar_of(Description(), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        task = bar.add_task("training", total=None)
        bar.start()

    def tell(arm: str, lr: float, repeat: int, progress: Progress, steps: int) -> None:
        name = f"{TITLES[arm]}, rate {lr:g}, seed {settings.seed + repeat}"
        if bar is not None:
            done = ((repeat * len(settings.lrs) + settings.lrs.index(lr)) * len(ARMS) + ARMS.index(arm)) * (
                settings.epochs * steps
            )
            total = settings.repeats * len(settings.lrs) * len(ARMS) * settings.epochs * steps
            at = done + progress.epoch * steps + progress.step
            bar.update(task, description=name, completed=at, total=total)
        if progress.step == 0 and progress.history and not voice.quiet:
            last = progress.history[-1]
            voice.say(
                f"{name}, epoch {last['epoch']}: loss {last['train_loss']:.4f}, "
                f"train {last['train_accuracy']:.2%}, test {last['test_accuracy']:.2%}"
            )

    try:
        yield tell
    finally:
        if bar is not None:
            bar.stop()
