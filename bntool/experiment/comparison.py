"""The comparison: the model as it is and with BatchNorm, over learning rates and repeats."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from bntool.api import apply, insert
from bntool.core.errors import CheckFailed, NothingToDo, UsageError
from bntool.core.plan import Plan
from bntool.experiment.checkpoints import Progress
from bntool.experiment.evenness import parts_apart
from bntool.experiment.fitting import fitting, require_shares
from bntool.experiment.folder import RUNS, identity_of, open_folder, require_alike
from bntool.experiment.outcome import ARMS, TITLES, Run, TrainingComparison, told_divergence
from bntool.experiment.randomness import random_state_kept, seed_everything
from bntool.experiment.samples import Data
from bntool.experiment.settings import Settings
from bntool.experiment.training import Trial, train, train_bounds
from bntool.experiment.watching import Watcher, places_in_both
from bntool.observe.copying import structural_copy
from bntool.observe.isolation import surroundings_kept
from bntool.observe.stand_in import cast, set_modes
from bntool.results.results import SurgeryResult
from bntool.runtime.process_group import World
from bntool.surgery.fold_modules import with_own_tensors

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
    data = fitting(model, data)
    require_shares(data, settings, world)
    inserted = _inserted(model, data, settings)
    identity = identity_of(model, data, settings, world)
    require_alike(world.gather(identity))
    if world.is_main:
        open_folder(folder, identity, force=force)
    job = _Job(model, inserted.plan, data, settings, folder, world, tell)
    runs = [
        Run(arm, lr, repeat, settings.seed + repeat, job.trained(arm, lr, repeat)[1])
        for repeat in range(settings.repeats)
        for lr in settings.lrs
        for arm in ARMS
    ]
    steps = len(train_bounds(data, settings, world))
    ordered = next((run.progress.warning for run in runs if run.progress.warning), "")
    warnings = tuple(warning for warning in (parts_apart(data), ordered) if warning)
    found = TrainingComparison(
        settings, tuple(runs), inserted, {}, data.origin, steps, world.size, data.notes, warnings
    )
    if all(run.diverged for run in runs):
        raise CheckFailed(
            f"nothing trained: {told_divergence(runs[0].diverged or {})}",
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
        placed = self.data.train.placed(torch.device(self.settings.device))
        trial = Trial(
            lr,
            seed,
            Watcher(model, places, self.settings.watched_steps(steps)),
            self.folder / RUNS / f"{arm}-{lr:g}-{seed}.pt",
        )
        with surroundings_kept(self.model):  # which every run finds as the first did
            progress = train(
                model,
                dataclasses.replace(self.data, train=placed),
                self.settings,
                trial,
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
        with_norms: nn.Module = apply(model, self.plan, check="none", share=True).model
        return with_norms

    def final(self, arm: str, found: TrainingComparison) -> nn.Module:
        """The model of the first repeat that came to its end at the arm's best rate."""
        lr = found.best_rate(arm)
        repeat = next(run.repeat for run in found.of(arm, lr) if run.diverged is None)
        model, _ = self.trained(arm, lr, repeat)
        model.zero_grad(set_to_none=True)
        return set_modes(cast(model, device=torch.device("cpu")), training=False)


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


def _inserted(model: nn.Module, data: Data, settings: Settings) -> SurgeryResult:
    result = insert(
        model,
        data.inputs_for(model),
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
