"""One training run: deterministic, stopped by a loss that is no number, gone on with after a kill."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bntool.errors import BntoolError, UsageError
from bntool.experiment.checkpoints import Progress, read_checkpoint, write_checkpoint
from bntool.experiment.datasets import Data, Samples
from bntool.experiment.randomness import random_state_kept, seed_everything
from bntool.experiment.settings import Settings, seed_for
from bntool.experiment.watching import Watcher
from bntool.experiment.world import World
from bntool.inputs import named_tensors

CHECKPOINT_SECONDS = 60.0
Tell = Callable[[Progress, int], None]
"""Is told of each step: how far the run is, and how many steps an epoch has."""


def train(
    model: nn.Module,
    data: Data,
    settings: Settings,
    *,
    lr: float,
    seed: int,
    watcher: Watcher,
    checkpoint: Path,
    world: World,
    tell: Tell | None = None,
) -> Progress:
    """Train `model` in place to the end, or from where `checkpoint` left it.

    The batches of an epoch depend on (seed, epoch) alone, so that both arms see the same; so does every
    random number that an epoch begins with. Loss: cross-entropy of the output (N, classes), which may be
    logits or log-probabilities (log-softmax leaves those as they are). The training figures are those of
    the batches as they were trained on, the test figures those of eval mode after the epoch.

    Raises `UsageError` where the model fails on a batch.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = _optimizer(settings, parameters, lr)
    with random_state_kept(), _repeatable():
        progress = read_checkpoint(checkpoint, model, optimizer) or Progress()
        watcher.records = progress.records
        run = _Run(model, optimizer, data, settings, lr, seed, watcher, world, progress)
        saved = time.monotonic()

        def save() -> None:
            nonlocal saved
            saved = time.monotonic()
            if world.is_main:
                write_checkpoint(checkpoint, model, optimizer, progress)

        while progress.epoch < settings.epochs and progress.diverged is None:
            for _ in run.epoch():
                if tell is not None:
                    tell(progress, run.steps)
                if time.monotonic() - saved > CHECKPOINT_SECONDS:
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
        lr: float,
        seed: int,
        watcher: Watcher,
        world: World,
        progress: Progress,
    ) -> None:
        self.model, self.optimizer, self.data, self.settings = model, optimizer, data, settings
        self.lr, self.seed, self.watcher, self.world, self.progress = lr, seed, watcher, world, progress
        first = next(p for p in model.parameters() if p.requires_grad)
        self.device, self.dtype = first.device, first.dtype
        self.steps = len(batch_bounds(len(data.train), settings.batch_size))

    def epoch(self) -> Iterator[None]:
        """Go through the rest of an epoch; between two steps the run can be saved."""
        at = self.progress
        if not at.step:
            seed_everything(seed_for(self.seed, "epoch", at.epoch))
        generator = torch.Generator().manual_seed(seed_for(self.seed, "order", at.epoch))
        order = torch.randperm(len(self.data.train), generator=generator)
        bounds = batch_bounds(len(order), self.settings.batch_size)[at.step :]
        parts = [self.world.share(order[a:b]) for a, b in bounds]
        self.model.train()
        for inputs, labels in self._moved(self.data.train, parts):
            self._step(inputs, labels)
            if at.diverged is not None:
                return
            at.step += 1
            yield
        loss, hits, count = self.world.reduce(torch.tensor(at.sums, dtype=torch.float64)).tolist()
        figures = {"epoch": at.epoch + 1, "train_loss": loss / count, "train_accuracy": hits / count}
        at.history.append({**figures, **self._tested()})
        at.epoch, at.step, at.sums = at.epoch + 1, 0, [0.0, 0.0, 0.0]

    def _step(self, inputs: Tensor, labels: Tensor) -> None:
        at = self.progress
        number = at.epoch * self.steps + at.step
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate_at(self.lr, number, self.settings.epochs * self.steps)
        with self.watcher.step(number), _explained(inputs):
            self.optimizer.zero_grad(set_to_none=True)
            output = logits_of(self.model(inputs))
            loss = F.cross_entropy(output, labels)
            value = loss.item()
            if not math.isfinite(value):
                layer, what = where_it_began(self.model, inputs)
                where = {"epoch": at.epoch + 1, "step": number + 1, "layer": layer, "what": what}
                at.diverged = {**where, "loss": "NaN" if math.isnan(value) else "infinite"}
                return
            loss.backward()
        self.optimizer.step()
        at.sums[0] += value * len(labels)
        at.sums[1] += int((output.detach().argmax(1) == labels).sum())
        at.sums[2] += len(labels)

    def _tested(self) -> dict[str, Any]:
        """Loss and accuracy on the test samples in eval mode; the share of the most frequent class."""
        self.model.eval()
        bounds = batch_bounds(len(self.data.test), self.settings.batch_size)
        parts = [self.world.share(torch.arange(a, b)) for a, b in bounds]
        sums = torch.zeros(3 + self.data.classes, dtype=torch.float64)
        with torch.no_grad():
            for inputs, labels in self._moved(self.data.test, parts):
                with _explained(inputs):
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


def batch_bounds(length: int, batch_size: int) -> list[tuple[int, int]]:
    """Where each batch begins and ends; a last sample by itself joins those before: it has no variance."""
    starts = list(range(0, length, batch_size))
    if len(starts) > 1 and length - starts[-1] == 1:
        starts.pop()
    return list(zip(starts, [*starts[1:], length], strict=True))


def logits_of(output: Any) -> Tensor:
    """What the loss is taken of: the output, or the first tensor of several (auxiliary ones follow it)."""
    if isinstance(output, Tensor):
        return output
    return next((tensor for _, tensor in named_tensors(output)), torch.empty(0))


def where_it_began(model: nn.Module, inputs: Tensor) -> tuple[str, str]:
    """The first layer to run that puts out NaN or infinity, and whether its own weights are at fault.

    Runs the model once more, as it is.
    """
    found: list[tuple[str, str]] = []

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, _args: Any, output: Any) -> None:
            tensors = [tensor for _, tensor in named_tensors(output)]
            if found or all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
                return
            bad = [n for n, p in module.named_parameters() if not bool(torch.isfinite(p).all())]
            found.append((name, f"its {bad[0]} is not finite" if bad else "its output is not finite"))

        return hook

    layers = [(n, m) for n, m in model.named_modules() if not any(m.children()) or m._parameters]
    handles = [module.register_forward_hook(look(name)) for name, module in layers]
    try:
        with torch.no_grad(), random_state_kept():
            model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else ("", "the loss itself: every layer's output is finite")


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


_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


@contextlib.contextmanager
def _explained(inputs: Tensor) -> Iterator[None]:
    """What a model raises on a batch, in words: too little memory, or a batch that it does not take."""
    try:
        yield
    except BntoolError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        shape = "x".join(map(str, inputs.shape))
        if isinstance(error, MemoryError) or any(words in str(error) for words in _NO_MEMORY):
            raise UsageError(
                f"there is too little memory to train on a batch of {shape}",
                where=lines[0],
                next_step="give a smaller --batch-size; what was trained before is kept",
            ) from error
        raise UsageError(
            f"the model fails on a batch of {shape}: {lines[0]}",
            next_step="give data of the shape and type that the model takes in training",
        ) from error
