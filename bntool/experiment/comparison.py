"""The comparison: the model as it is and with BatchNorm, over learning rates and repeats."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bntool.api import apply, insert
from bntool.errors import CheckFailed, NothingToDo, UsageError
from bntool.experiment.checkpoints import Progress
from bntool.experiment.datasets import Data
from bntool.experiment.randomness import random_state_kept, seed_everything
from bntool.experiment.settings import Settings
from bntool.experiment.training import logits_of, train, train_bounds
from bntool.experiment.watching import QUANTILES, Watcher, places_in_both
from bntool.files.atomic import write_atomically
from bntool.observe.copying import structural_copy
from bntool.plan import Plan
from bntool.report.tables import Column, Table, render
from bntool.results import SurgeryResult, delta_lines
from bntool.surgery.fold_modules import with_own_tensors
from bntool.world import World

SCHEMA_VERSION = 1
RUNS = "runs"
ARMS = ("plain", "batchnorm")
TITLES = {"plain": "as it is", "batchnorm": "with BatchNorm"}
_TELLING = frozenset(Settings.__dataclass_fields__) | {"torch", "number_of_processes"}
_CHANCE = 3.0
"""Standard errors above always naming the most frequent class from which a run is said to have learned."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run and its figures, epoch by epoch."""

    arm: str
    lr: float
    repeat: int
    seed: int
    progress: Progress

    @property
    def history(self) -> list[dict[str, Any]]:
        return self.progress.history

    @property
    def diverged(self) -> dict[str, Any] | None:
        return self.progress.diverged

    @property
    def trains(self) -> bool:
        """Whether it came to its end and beats always naming the most frequent class, by more than chance."""
        if self.diverged is not None or not self.history:
            return False
        last = self.history[-1]
        share, count = last["majority"], last["test_samples"]
        return bool(last["test_accuracy"] > share + _CHANCE * (share * (1 - share) / count) ** 0.5)

    def to_dict(self) -> dict[str, Any]:
        return {
            "arm": self.arm,
            "lr": self.lr,
            "repeat": self.repeat,
            "seed": self.seed,
            "trains": self.trains,
            "diverged": self.diverged,
            "history": self.history,
        }


@dataclasses.dataclass(frozen=True)
class Figure:
    """The mean over repeats, and their standard deviation (n − 1); None for a single one."""

    mean: float
    spread: float | None

    @classmethod
    def of(cls, values: list[float]) -> Figure | None:
        if not values:
            return None
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)

    def to_dict(self) -> dict[str, float | None]:
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class TrainingComparison:
    """All runs of both arms, and the two models that came of the first repeat at each arm's best rate.

    `surgery` is the insertion: its plan and its parameter delta. `models` are in eval mode, on the CPU; an
    arm of which no run came to its end has none.
    """

    settings: Settings
    runs: tuple[Run, ...]
    surgery: SurgeryResult
    models: dict[str, nn.Module]
    origin: str
    steps_per_epoch: int
    processes: int = 1
    notes: tuple[str, ...] = ()

    def of(self, arm: str, lr: float) -> list[Run]:
        return [run for run in self.runs if run.arm == arm and run.lr == lr]

    def values(self, arm: str, lr: float, key: str, epoch: int = -1) -> list[float]:
        """A figure of one epoch (the last unless said) of each repeat that came to its end."""
        runs = [run for run in self.of(arm, lr) if run.diverged is None]
        values = [run.history[epoch][key] for run in runs]
        return [value for value in values if value is not None]

    def figure(self, arm: str, lr: float, key: str, epoch: int = -1) -> Figure | None:
        """Mean and spread of `values`; None where there are none."""
        return Figure.of(self.values(arm, lr, key, epoch))

    def best_rate(self, arm: str) -> float:
        """The rate with the highest mean test accuracy; the first of equals."""

        def accuracy(lr: float) -> float:
            found = self.figure(arm, lr, "test_accuracy")
            return found.mean if found else -1.0

        return max(self.settings.lrs, key=accuracy)

    def largest_rate(self, arm: str) -> float | None:
        """The largest rate at which every repeat trains."""
        able = [lr for lr in self.settings.lrs if all(run.trains for run in self.of(arm, lr))]
        return max(able, default=None)

    @property
    def finished(self) -> list[str]:
        """The arms of which a run came to its end."""
        return [arm for arm in ARMS if any(run.arm == arm and run.diverged is None for run in self.runs)]

    def watched(self, arm: str) -> Run:
        """The run whose inside is shown: the first repeat at the first rate."""
        return self.of(arm, self.settings.lrs[0])[0]

    def to_dict(self) -> dict[str, Any]:
        return {
            "status": "ok",
            "data": self.origin,
            "settings": self.settings.to_dict(),
            "init": self.settings.norm_init,
            "torch": torch.__version__,
            "processes": self.processes,
            "steps_per_epoch": self.steps_per_epoch,
            "sites": [site.to_dict() for site in self.surgery.plan.insert_sites],
            "parameters": self.surgery.parameters,
            "arms": {arm: self._arm(arm) for arm in ARMS},
            "runs": [run.to_dict() for run in self.runs],
            "watched": {
                "lr": self.settings.lrs[0],
                "repeat": 0,
                "quantiles": list(QUANTILES),
                **{arm: self.watched(arm).progress.records for arm in ARMS},
            },
        }

    def _arm(self, arm: str) -> dict[str, Any]:
        rows = []
        for lr in self.settings.lrs:
            row: dict[str, Any] = {"lr": lr, "trained": sum(run.trains for run in self.of(arm, lr))}
            for key in ("train_loss", "train_accuracy", "test_loss", "test_accuracy"):
                found = self.figure(arm, lr, key)
                row[key] = found.to_dict() if found else None
            rows.append(row)
        return {
            "rates": rows,
            "best_rate": self.best_rate(arm) if arm in self.models else None,
            "largest_rate_that_trains": self.largest_rate(arm),
        }

    def __str__(self) -> str:
        return self.render()

    def render(self, width: int | None = None) -> str:
        """The figures of the last epoch as a table, then what diverged and the parameter delta."""
        columns = (
            Column("Network"),
            Column("Rate", number=True),
            Column("Train loss", number=True),
            Column("Train %", number=True),
            Column("Test loss", number=True),
            Column("Test %", number=True),
            Column("Trained", number=True),
        )
        rows = [self._row(arm, lr) for lr in self.settings.lrs for arm in ARMS]
        epochs, repeats = self.settings.epochs, self.settings.repeats
        spread = ", mean +- standard deviation" if repeats > 1 else ""
        title = (
            f"after {epochs} {'epoch' if epochs == 1 else 'epochs'}, "
            f"{repeats} {'repeat' if repeats == 1 else 'repeats'}{spread}"
        )
        lines = [render(Table(columns, rows, title), width), ""]
        lines += [self._stopped(run) for run in self.runs if run.diverged]
        if len(self.settings.lrs) > 1:
            for arm in ARMS:
                rate = self.largest_rate(arm)
                told = "none of these rates trains" if rate is None else f"{rate:g}"
                lines.append(f"largest rate that trains, {TITLES[arm]}: {told}")
        return "\n".join([*lines, *delta_lines(self.surgery.parameters)])

    def _row(self, arm: str, lr: float) -> list[str]:
        runs = self.of(arm, lr)
        cells = [TITLES[arm], f"{lr:g}"]
        for key, scale, digits in (
            ("train_loss", 1, 4),
            ("train_accuracy", 100, 2),
            ("test_loss", 1, 4),
            ("test_accuracy", 100, 2),
        ):
            found = self.figure(arm, lr, key)
            text = "-"
            if found is not None:
                text = _number(found.mean * scale, digits)
                text += f" +- {_number(found.spread * scale, digits)}" if found.spread is not None else ""
            cells.append(text)
        return [*cells, f"{sum(run.trains for run in runs)} of {len(runs)}"]

    def _stopped(self, run: Run) -> str:
        assert run.diverged is not None
        return f"{TITLES[run.arm]}, rate {run.lr:g}, seed {run.seed}: {_divergence(run.diverged)}"


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if value < 1000 else f"{value:.3g}"


def _divergence(found: dict[str, Any]) -> str:
    where = f"began in layer {found['layer']} ({found['what']})" if found["layer"] else found["what"]
    return f"the loss was {found['loss']} at step {found['step']} (epoch {found['epoch']}); it {where}"


Tell = Callable[[str, float, int, Progress, int], None]
"""Is told of each step: arm, rate, repeat, how far that run is, steps in an epoch."""


def compare_training(
    model: nn.Module,
    data: Data,
    settings: Settings,
    folder: Path,
    *,
    force: bool = False,
    world: World | None = None,
    tell: Tell | None = None,
) -> TrainingComparison:
    """Train `model` as it is and after `insert`, at each rate and repeat; the argument is not changed.

    Both arms begin with the same weights and see the same batches. `folder` holds a checkpoint of each run:
    called again with the same settings, it goes on where it stopped and gives the same figures. The processes
    of `world` call this together, each with the same arguments; only rank 0 looks at the folder.

    Raises:
        UsageError: data that does not fit the model, a folder with a comparison of other settings, or
            processes that do not hold the same model and data.
        NothingToDo: there is no place for a BatchNorm.
        CheckFailed: the loss of every run stopped being a number.
        ProcessError: another process has ended.
    """
    world = world or World()
    data = _fitting(model, data)
    _require_shares(data, settings, world)
    inserted = _inserted(model, data, settings)
    identity = _identity(model, data, settings, world)
    _require_alike(world.gather(identity))
    if world.is_main:
        _open_folder(folder, identity, force=force)
    job = _Job(model, inserted.plan, data, settings, folder, world, tell)
    runs = [
        Run(arm, lr, repeat, settings.seed + repeat, job.trained(arm, lr, repeat)[1])
        for repeat in range(settings.repeats)
        for lr in settings.lrs
        for arm in ARMS
    ]
    steps = len(train_bounds(data, settings, world))
    found = TrainingComparison(
        settings, tuple(runs), inserted, {}, data.origin, steps, world.size, data.notes
    )
    if all(run.diverged for run in runs):
        raise CheckFailed(
            f"nothing trained: {_divergence(runs[0].diverged or {})}",
            where=f"{TITLES[runs[0].arm]}, rate {runs[0].lr:g}",
            next_step="give a smaller --lr, or look at the data and the weights",
        )
    return dataclasses.replace(found, models={arm: job.final(arm, found) for arm in found.finished})


@dataclasses.dataclass(frozen=True)
class _Job:
    """What all runs of a comparison have in common."""

    model: nn.Module
    plan: Plan
    data: Data
    settings: Settings
    folder: Path
    world: World
    tell: Tell | None

    def trained(self, arm: str, lr: float, repeat: int) -> tuple[nn.Module, Progress]:
        """The model of one run after its last step, and its figures; at once where it was run before."""
        seed = self.settings.seed + repeat
        model = self._started(arm, seed).to(self.settings.device)
        places = places_in_both(self.model, self.plan)[ARMS.index(arm)]
        steps = self.settings.epochs * len(train_bounds(self.data, self.settings, self.world))
        tell = self.tell
        progress = train(
            model,
            dataclasses.replace(self.data, train=self.data.train.placed(torch.device(self.settings.device))),
            self.settings,
            lr=lr,
            seed=seed,
            watcher=Watcher(model, places, self.settings.watched_steps(steps)),
            checkpoint=self.folder / RUNS / f"{arm}-{lr:g}-{seed}.pt",
            world=self.world,
            tell=None if tell is None else lambda progress, steps: tell(arm, lr, repeat, progress, steps),
        )
        return model, progress

    def _started(self, arm: str, seed: int) -> nn.Module:
        """The model as both arms begin: as it was given, or drawn anew by the seed; then the insertion."""
        model = with_own_tensors(structural_copy(self.model), self.model)
        if self.settings.from_scratch:
            with random_state_kept():
                seed_everything(seed)
                draw_weights(model)
        if arm == "plain":
            return model
        return apply(model, self.plan, check="none", share=True).model

    def final(self, arm: str, found: TrainingComparison) -> nn.Module:
        """The model of the first repeat that came to its end at the arm's best rate."""
        lr = found.best_rate(arm)
        repeat = next(run.repeat for run in found.of(arm, lr) if run.diverged is None)
        model, _ = self.trained(arm, lr, repeat)
        model.zero_grad(set_to_none=True)
        return model.to("cpu").eval()


def draw_weights(model: nn.Module) -> None:
    """Give every layer new weights by its own `reset_parameters`, in order.

    Raises `UsageError` for a module that holds parameters and cannot draw them.
    """
    for name, module in model.named_modules():
        reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        if reset is not None:
            reset()
        elif module._parameters:
            raise UsageError(
                f"a {type(module).__name__} holds parameters and has no reset_parameters to draw them anew",
                where=name or "the model itself",
                next_step="compare without --from-scratch: both arms then start with the weights as they are",
            )


def write_document(folder: Path, found: TrainingComparison) -> Path:
    """Write `compare.json`: no time and no folder is in it."""
    path = folder / "compare.json"
    text = json.dumps({"schema_version": SCHEMA_VERSION, **found.to_dict()}, ensure_ascii=False) + "\n"
    write_atomically(path, lambda temporary: _write_text(temporary, text), force=True)
    return path


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def _fitting(model: nn.Module, data: Data) -> Data:
    """The data with as many classes as the model tells apart, after running the model on two samples."""
    if not any(p.requires_grad for p in model.parameters()):
        raise UsageError(
            "no parameter of the model is trainable",
            where=type(model).__name__,
            next_step="call model.requires_grad_() before saving it",
        )
    parameter = next(model.parameters())
    (inputs,) = data.example().args
    moved = inputs.to(parameter.device, parameter.dtype if inputs.is_floating_point() else None)
    copied = structural_copy(model).eval()
    try:
        with torch.no_grad(), random_state_kept():
            output = logits_of(copied(moved))
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        integers = (
            "; these are whole numbers: astype('float32') / 255" if not moved.is_floating_point() else ""
        )
        raise UsageError(
            f"the model fails on samples of shape {'x'.join(map(str, inputs.shape[1:]))}: {lines[0]}",
            where=data.origin,
            next_step=f"give data of the shape and type that the model takes{integers}",
        ) from error
    if output.dim() != 2 or len(output) != len(inputs) or output.shape[1] < 2:
        raise UsageError(
            f"the model puts out {list(output.shape)} for {len(inputs)} samples, not (N, classes)",
            where=type(model).__name__,
            next_step="give a model that classifies: one row for each sample, one column for each class",
        )
    classes = output.shape[1]
    most = max((int(labels.max()) for labels in data.labels), default=0) if data.labels else 0
    if most >= classes:
        raise UsageError(
            f"the labels go up to {most}, and the model tells {classes} classes apart (0 to {classes - 1})",
            where=data.origin,
            next_step="number the classes from 0, or give the model as many outputs",
        )
    notes = data.notes
    sums = output.float().sum(1)
    if bool((output >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), rtol=0, atol=1e-3):
        notes += ("the model puts out probabilities, which the loss takes for logits: leave its softmax out",)
    return dataclasses.replace(data, classes=classes, notes=notes)


def _inserted(model: nn.Module, data: Data, settings: Settings) -> SurgeryResult:
    parameter = next(model.parameters())
    (inputs,) = data.example().args
    moved = inputs.to(parameter.device, parameter.dtype if inputs.is_floating_point() else None)
    result = insert(
        model,
        moved,
        activations=settings.activations,
        position=settings.position,
        affine=settings.affine,
        sync=settings.sync,
        init=settings.norm_init,
    )
    if not result.plan.sites:
        skip = next(iter(result.skips), None)
        raise NothingToDo(
            "there is no place for a BatchNorm, so there is nothing to compare",
            where=f"{skip.name} [{skip.reason}] {skip.detail}" if skip else type(model).__name__,
            next_step="bntool insert MODEL --dry-run says why; --activation any takes other activations",
        )
    return result


def _require_shares(data: Data, settings: Settings, world: World) -> None:
    least = 2 * world.size
    for what, count in (("a batch", settings.batch_size), ("the training data", len(data.train))):
        if world.size > 1 and count < least:
            raise UsageError(
                f"{what} holds {count} samples for {world.size} processes",
                next_step=f"it must be {least} or more: BatchNorm needs two samples in each process",
            )


def _require_alike(identities: list[dict[str, Any]]) -> None:
    for rank, other in enumerate(identities):
        key = next((key for key in other if other[key] != identities[0][key]), None)
        if key is not None:
            raise UsageError(
                f"the processes of ranks 0 and {rank} do not have the same {key.replace('_', ' ')}",
                next_step="give each the same files; a loader that draws samples must do so by torch's seed",
            )


def _identity(model: nn.Module, data: Data, settings: Settings, world: World) -> dict[str, Any]:
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


def _open_folder(folder: Path, identity: dict[str, Any], *, force: bool) -> None:
    """Make the folder, or go on in one of the same settings; `force` begins one of others anew."""
    path = folder / "settings.json"
    text = json.dumps(identity, indent=1) + "\n"
    if path.is_file():
        # What a folder leaves out that was begun before there were several processes.
        held = {"sync": False, "number_of_processes": 1, **_read(path)}
        other = next((k for k in identity if held.get(k) != identity[k]), None)
        if other is not None and not force:
            raise UsageError(
                f"{folder} holds a comparison of another {other.replace('_', ' ')}"
                + (f": {held.get(other)} there, {identity[other]} here" if other in _TELLING else ""),
                where=str(path),
                next_step="pass --force to begin anew, or name another folder with -o",
            )
        if force:
            for checkpoint in (folder / RUNS).glob("*.pt"):
                checkpoint.unlink()
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists, and is no comparison", next_step="name another folder with -o")
    try:
        (folder / RUNS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"cannot write into {folder}: {error.strerror}", next_step="name another folder with -o"
        ) from error
    write_atomically(path, lambda temporary: _write_text(temporary, text), force=True)


def _read(path: Path) -> dict[str, Any]:
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return held if isinstance(held, dict) else {}
