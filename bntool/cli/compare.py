"""`bntool compare`: parse, call, print."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bntool.cli.compare_options import CompareOptions, settings_of
from bntool.cli.job import joined
from bntool.cli.opening import open_module
from bntool.cli.options import some, takes
from bntool.cli.session import Session, Voice
from bntool.core.command_options import (
    DataOptions,
    JobOptions,
    LoadOptions,
    ModelOptions,
    ReportOptions,
    SpeechOptions,
)
from bntool.core.errors import UsageError
from bntool.core.options import InsertOptions, PlaceOptions

if TYPE_CHECKING:
    from bntool.cli.writing import Place
    from bntool.experiment.checkpoints import Progress
    from bntool.experiment.outcome import TrainingComparison
    from bntool.experiment.samples import Data
    from bntool.experiment.settings import Settings
    from bntool.runtime.process_group import World


@click.command("compare", short_help="Train with and without BatchNorm, and compare.")
@takes(
    ModelOptions,
    LoadOptions,
    some(DataOptions, "data", "samples", "split", "files", "columns", "mean", "std", "resize"),
    CompareOptions,
    some(InsertOptions, "activations", "position", "affine"),
    some(PlaceOptions, "device"),
    JobOptions,
    ReportOptions,
    SpeechOptions,
    required=("data",),
    data="mnist, fashion-mnist, a folder of images, an .npz, .parquet or .tar file, or pkg.mod:loader.",
    samples="At most N samples of each part, drawn by the seed (default: all).",
    split="The parts to train and to test on (default: train,test).",
    activations="As in bntool insert.",
    position="",
    device="Where to train.",
)
def command(
    voice: Voice,
    model: ModelOptions,
    load: LoadOptions,
    data: DataOptions,
    compare: CompareOptions,
    insert: InsertOptions,
    place: PlaceOptions,
    job: JobOptions,
) -> int:
    """Train MODEL as it is and with BatchNorm, on the same batches, and compare.

    Writes NAME_compare/ here: compare.json, plots, both trained models, and a checkpoint of each run. The
    same command goes on where it was stopped, and gives the same figures. Under torchrun the processes share
    each batch.
    """
    settings = settings_of(compare, insert, seed=load.seed, device=place.device)
    with joined(job.timeout, settings.device) as world:
        voice.silent = not world.is_main
        session = open_module(voice, model.model, load, "train")
        return _compare(session, data, compare, settings, world)


def _compare(
    session: Session, named: DataOptions, compare: CompareOptions, settings: Settings, world: World
) -> int:
    from bntool.cli.picturing import picture_module
    from bntool.experiment.comparison import compare_training
    from bntool.experiment.folder import write_document
    from bntool.experiment.plots import require_matplotlib, write_plots
    from bntool.files.sidecar import output_name
    from bntool.runtime.torch_runner import require_torch_device

    voice = session.voice
    require_torch_device(settings.device)
    require_matplotlib()
    data = _data_in_turn(session, named, compare, world)
    for note in data.notes:
        voice.note(note)
    folder = Path(compare.output or f"{output_name(_source(session), 'export').stem}_compare")
    places = _claim(session, folder, force=compare.force) if world.is_main else {}
    try:
        with _progress(voice, settings) as tell:
            found = compare_training(
                session.model, data, settings, folder, force=compare.force, world=world, tell=tell
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


def _data_in_turn(session: Session, named: DataOptions, compare: CompareOptions, world: World) -> Data:
    """The data, which the first process of each machine loads down, where it is to be, before the others."""
    if not compare.download:
        return _data(session, named, compare)
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    data = _data(session, named, compare) if first else None
    world.gather(None)
    return data if data is not None else _data(session, named, compare)


def _data(session: Session, named: DataOptions, compare: CompareOptions) -> Data:
    from bntool.cli.data import choice_of, example_of, preparation_of
    from bntool.data.records import are_records
    from bntool.experiment.datasets import open_dataset

    assert named.data is not None  # the command requires it
    path = Path(named.data)
    like = example_of(session, small=False) if path.is_dir() or are_records(path) else None
    return open_dataset(
        named.data,
        choice_of(named, session.seed),
        preparation_of(named, like),
        root=compare.root,
        download=compare.download,
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
    from bntool.results.counting import parameter_delta

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
