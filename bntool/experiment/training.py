"""One training run: deterministic, stopped by a loss that is no number, gone on with after a kill."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bntool.calibrating.drift import Grouping
from bntool.core.errors import UsageError
from bntool.experiment.checkpoints import Progress, read_checkpoint, write_checkpoint
from bntool.experiment.evenness import ORDERED
from bntool.experiment.failures import explained, where_it_began
from bntool.experiment.randomness import random_state, random_state_kept, seed_everything
from bntool.experiment.samples import Data, Held, Samples
from bntool.experiment.settings import Settings, seed_for
from bntool.experiment.syncing import sync_on_cpu
from bntool.experiment.watching import Watcher
from bntool.graph.inputs import named_tensors
from bntool.runtime.process_group import World

CHECKPOINT_SECONDS = 60.0
Tell = Callable[[Progress, int], None]
"""Is told of each step: how far the run is, and how many steps an epoch has."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run: its learning rate, the seed of its batches, who looks into it, and where it is saved."""

    lr: float
    seed: int
    watcher: Watcher
    checkpoint: Path


def train(
    model: nn.Module,
    data: Data,
    settings: Settings,
    trial: Trial,
    *,
    world: World,
    tell: Tell | None = None,
) -> Progress:
    """Train `model` in place to the end, or from where the trial's checkpoint left it.

    The batches of an epoch depend on (seed, epoch) alone, so that both arms see the same; so does every
    random number that an epoch begins with. Loss: cross-entropy of the output (N, classes), which may be
    logits or log-probabilities (log-softmax leaves those as they are). The training figures are those of
    the batches as they were trained on, the test figures those of eval mode after the epoch.

    The processes of `world` share each batch, and each step is the step on the whole batch; rank 0 alone
    reads and writes the checkpoint. The watcher sees the share of its own process.

    Raises `UsageError` where the model fails on a batch, `ProcessError` where another process has ended.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = _optimizer(settings, parameters, trial.lr)
    together = sync_on_cpu(model) if world.size > 1 else contextlib.nullcontext()
    with random_state_kept(), _repeatable(), together:
        progress = read_checkpoint(trial.checkpoint, model, optimizer, world) or Progress()
        trial.watcher.records = progress.records
        run = _Run(model, optimizer, data, settings, trial, world, progress)

        def save() -> None:
            run.saved = time.monotonic()
            states = world.gather(random_state())
            if world.is_main:
                write_checkpoint(trial.checkpoint, model, optimizer, progress, states)

        while progress.epoch < settings.epochs and progress.diverged is None:
            for _ in run.epoch():
                if tell is not None:
                    tell(progress, run.steps)
                if run.due:
                    save()
            save()
            if tell is not None:
                tell(progress, run.steps)
    return progress


class _Run:
    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        data: Data,
        settings: Settings,
        trial: Trial,
        world: World,
        progress: Progress,
    ) -> None:
        self.model, self.optimizer, self.data, self.settings = model, optimizer, data, settings
        self.trial, self.world, self.progress = trial, world, progress
        first = next(p for p in model.parameters() if p.requires_grad)
        self.device, self.dtype = first.device, first.dtype
        self.bounds = train_bounds(data, settings, world)
        self.steps = len(self.bounds)
        self.saved, self.due = time.monotonic(), False
        self.grouping = Grouping()
        self.parallel = self._in_parallel() if world.size > 1 else model

    def _in_parallel(self) -> nn.Module:
        """The model whose gradients are the means over the processes; all begin with rank 0's tensors."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        (inputs,) = self.data.example().args
        moved = inputs.to(self.device, self.dtype if inputs.is_floating_point() else None)
        self.model.eval()
        with random_state_kept(), explained(moved):
            output = logits_of(self.model(moved))
            reached = torch.autograd.grad(output.sum(), parameters, allow_unused=True)
        with explained(moved):
            return nn.parallel.DistributedDataParallel(
                self.model, find_unused_parameters=any(gradient is None for gradient in reached)
            )

    def epoch(self) -> Iterator[None]:
        """Go through the rest of an epoch; between two steps the run can be saved."""
        at = self.progress
        if not at.step:
            own = (self.world.rank,) if self.world.rank else ()  # dropout masks are no copies of each other
            seed_everything(seed_for(self.trial.seed, "epoch", at.epoch, *own))
        generator = torch.Generator().manual_seed(seed_for(self.trial.seed, "order", at.epoch))
        order = torch.randperm(len(self.data.train), generator=generator)
        parts = [self.world.share(order[a:b]) for a, b in self.bounds[at.step :]]
        self.model.train()
        for inputs, labels in self._moved(self.data.train, parts):
            self._look_at(inputs)
            self._step(inputs, labels)
            if at.diverged is not None:
                return
            at.step += 1
            yield
        loss, hits, count = at.sums
        figures = {"epoch": at.epoch + 1, "train_loss": loss / count, "train_accuracy": hits / count}
        at.history.append({**figures, **self._tested()})
        at.warning = at.warning or self.grouping.told("the input", ORDERED)
        at.epoch, at.step, at.sums = at.epoch + 1, 0, [0.0, 0.0, 0.0]

    def _look_at(self, inputs: Tensor) -> None:
        """Whether a data set that is asked by number heeds it, seen in the first epoch."""
        drawn_here = isinstance(self.data.train, Held)
        if not (drawn_here or self.progress.epoch) and inputs.is_floating_point() and inputs.dim() > 1:
            self.grouping.add(inputs)

    def _step(self, inputs: Tensor, labels: Tensor) -> None:
        at = self.progress
        number = at.epoch * self.steps + at.step
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate_at(self.trial.lr, number, self.settings.epochs * self.steps)
        with self.trial.watcher.step(number), explained(inputs):
            self.optimizer.zero_grad(set_to_none=True)
            output = logits_of(self.parallel(inputs))
            loss = F.cross_entropy(output, labels)
            value = loss.item()
            hits = int((output.detach().argmax(1) == labels).sum())
            total, right, count = self._together(value * len(labels), hits, len(labels))
            if not math.isfinite(total):
                at.diverged = {"epoch": at.epoch + 1, "step": number + 1, **self._began(inputs, value)}
                return
            if self.world.size > 1:  # the mean over processes becomes the mean over the samples of all
                loss = loss * (len(labels) * self.world.size / count)
            loss.backward()
        self.optimizer.step()
        for i, figure in enumerate((total, right, count)):
            at.sums[i] += figure

    def _together(self, loss: float, hits: int, count: int) -> tuple[float, float, float]:
        """The sums over all processes; they agree too whether a checkpoint is due, by rank 0's clock."""
        due = self.world.is_main and time.monotonic() - self.saved > CHECKPOINT_SECONDS
        sums = self.world.reduce(torch.tensor([loss, hits, count, due], dtype=torch.float64))
        all_loss, all_hits, all_count, all_due = sums.tolist()
        self.due = bool(all_due)
        return all_loss, all_hits, all_count

    def _began(self, inputs: Tensor, loss: float) -> dict[str, str]:
        """Where the loss stopped being a number: in the first process in which it did."""
        layer, what = where_it_began(self.model, inputs)
        own = {"layer": layer, "what": what, "loss": "NaN" if math.isnan(loss) else "infinite"}
        found = self.world.gather(None if math.isfinite(loss) else own)
        return next((where for where in found if where is not None), own)

    def _tested(self) -> dict[str, Any]:
        """Loss and accuracy on the test samples in eval mode; the share of the most frequent class."""
        self.model.eval()
        self.world.spread(self.model.buffers())
        bounds = batch_bounds(len(self.data.test), self.settings.batch_size)
        parts = [part for a, b in bounds if len(part := self.world.share(torch.arange(a, b)))]
        sums = torch.zeros(3 + self.data.classes, dtype=torch.float64)
        with torch.no_grad():
            for inputs, labels in self._moved(self.data.test, parts):
                with explained(inputs):
                    output = logits_of(self.model(inputs))
                    loss = F.cross_entropy(output, labels, reduction="sum").item()
                hits = int((output.argmax(1) == labels).sum())
                sums[:3] += torch.tensor([loss, hits, len(labels)], dtype=torch.float64)
                sums[3:] += labels.bincount(minlength=self.data.classes).cpu()
        self.model.train()
        loss, hits, count, *classes = self.world.reduce(sums).tolist()
        return {
            "test_loss": loss / count if math.isfinite(loss) else None,
            "test_accuracy": hits / count,
            "majority": max(classes) / count,
            "test_samples": int(count),
        }

    def _moved(self, samples: Samples, parts: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        for inputs, labels in samples.batches(parts):
            if int(labels.min()) < 0 or int(labels.max()) >= self.data.classes:
                raise UsageError(
                    f"a label is {int(labels.max() if int(labels.min()) >= 0 else labels.min())}, and the "
                    f"model tells {self.data.classes} classes apart",
                    where=self.data.origin,
                    next_step="number the classes from 0, or give the model as many outputs",
                )
            dtype = self.dtype if inputs.is_floating_point() else None
            yield inputs.to(self.device, dtype), labels.to(self.device)


def train_bounds(data: Data, settings: Settings, world: World) -> list[tuple[int, int]]:
    """Where the batches of an epoch begin and end; every process has two samples of each, or more."""
    return batch_bounds(len(data.train), settings.batch_size, least=2 * world.size)


def batch_bounds(length: int, batch_size: int, least: int = 2) -> list[tuple[int, int]]:
    """Where each batch begins and ends; a last one of fewer than `least` samples joins the one before.

    A sample by itself has no variance.
    """
    starts = list(range(0, length, batch_size))
    if len(starts) > 1 and length - starts[-1] < least:
        starts.pop()
    return list(zip(starts, [*starts[1:], length], strict=True))


def logits_of(output: Any) -> Tensor:
    """What the loss is taken of: the output, or the first tensor of several (auxiliary ones follow it)."""
    if isinstance(output, Tensor):
        return output
    return next((tensor for _, tensor in named_tensors(output)), torch.empty(0))


def _optimizer(settings: Settings, parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    decay = settings.weight_decay
    if settings.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=lr, weight_decay=decay)
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=decay)
    return torch.optim.SGD(parameters, lr=lr, momentum=settings.momentum, weight_decay=decay)


@contextlib.contextmanager
def _repeatable() -> Iterator[None]:
    """Have cuDNN choose the same algorithms every time."""
    cudnn: Any = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before
