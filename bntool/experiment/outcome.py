"""What a comparison found: the runs, their figures as mean and spread, and the table."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from bntool.core.showing import Column, Part, Said, Shown, Table
from bntool.core.text import Lines
from bntool.experiment.checkpoints import Progress
from bntool.experiment.settings import Settings
from bntool.experiment.watching import QUANTILES
from bntool.results.results import SurgeryResult, delta_lines
from bntool.results.tables import text_of

ARMS = ("plain", "batchnorm")
TITLES = {"plain": "as it is", "batchnorm": "with BatchNorm"}
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
class TrainingComparison(Shown):
    """All runs of both arms, and the two models that came of the first repeat at each arm's best rate.

    `surgery` is the insertion: its plan and its parameter delta. `models` are in eval mode, on the CPU; an
    arm of which no run came to its end has none. `warnings` tells of batches, or parts of the data, that are
    not as samples drawn at random are.
    """

    settings: Settings
    runs: tuple[Run, ...]
    surgery: SurgeryResult
    models: dict[str, nn.Module]
    origin: str
    steps_per_epoch: int
    processes: int = 1
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

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
            "warnings": list(self.warnings),
            "settings": self.settings.to_dict(),
            "init": self.settings.norm_init,
            "torch": torch.__version__,
            "processes": self.processes,
            "steps_per_epoch": self.steps_per_epoch,
            "sites": [site.to_dict() for site in self.surgery.plan.insert_sites],
            "key_map": dict(self.surgery.plan.key_map),
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

    def render(self, width: int | None = None) -> Lines:
        return text_of(self.parts(), width)

    def parts(self) -> Sequence[Part]:
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
        lines: list[Part] = [Table(columns, rows, title), ""]
        lines += [self._stopped(run) for run in self.runs if run.diverged]
        lines += [Said(warning, "    ") for warning in self.warnings]
        if len(self.settings.lrs) > 1:
            for arm in ARMS:
                rate = self.largest_rate(arm)
                told = "none of these rates trains" if rate is None else f"{rate:g}"
                lines.append(f"largest rate that trains, {TITLES[arm]}: {told}")
        return [*lines, *delta_lines(self.surgery.parameters)]

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
        return f"{TITLES[run.arm]}, rate {run.lr:g}, seed {run.seed}: {told_divergence(run.diverged)}"


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if value < 1000 else f"{value:.3g}"


def told_divergence(found: dict[str, Any]) -> str:
    where = f"began in layer {found['layer']} ({found['what']})" if found["layer"] else found["what"]
    return f"the loss was {found['loss']} at step {found['step']} (epoch {found['epoch']}); it {where}"
