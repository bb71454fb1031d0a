"""What the processes of a job run: each writes what it found into a folder, for the test to read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from bntool.calibrating.calibrating import calibrate
from bntool.core.errors import NothingToDo, UsageError
from bntool.experiment import training
from bntool.experiment.checkpoints import Progress
from bntool.experiment.samples import Data
from bntool.experiment.settings import Settings
from bntool.experiment.training import Trial, train
from bntool.experiment.watching import Places, Watcher
from bntool.runtime.process_group import World
from tests.experiment.nets import classifier, thirds


def start(job: Callable[[Path], Any], size: int, folder: Path) -> list[Any]:
    """Run `job` in as many processes as there are ranks; what each returns."""
    folder.mkdir()
    # The server imports torch once for all processes; forking this one would copy its threads' locks.
    torch.multiprocessing.get_context("forkserver").set_forkserver_preload(["bntool.experiment.comparison"])
    torch.multiprocessing.start_processes(
        _process, (job, size, folder), nprocs=size, start_method="forkserver"
    )
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def _process(rank: int, job: Callable[[Path], Any], size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    file = distributed.FileStore(str(folder / "store"), size)
    distributed.init_process_group("gloo", store=file, rank=rank, world_size=size)
    torch.save(job(folder), folder / f"{rank}.pt")
    distributed.destroy_process_group()


# -- calibration ---------------------------------------------------------------------------------------------


class TwoWays(nn.Module):
    """Batches of positive sum go through a BatchNorm that the others never reach."""

    def __init__(self, norm: type[nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.common = norm(4)
        self.rare = norm(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.common(self.conv(x)).relu()
        return self.rare(x) if float(x.flatten()[0]) > 0.5 else x


def two_ways(norm: type[nn.Module] = nn.BatchNorm2d) -> TwoWays:
    torch.manual_seed(0)
    return TwoWays(norm).double()


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = (5, 2, 7, 3, 4, 2)
    return [torch.randn(n, 3, 6, 6, generator=generator, dtype=torch.float64) * 3 + n for n in sizes]


DEALT: dict[str, Callable[[int, int, int], bool]] = {
    "in turn": lambda i, rank, size: i % size == rank,
    "uneven": lambda i, rank, size: min(i, size - 1) == rank,
    "one process has none": lambda i, rank, size: i % (size - 1) == rank,
}
"""Whether batch `i` is one of `rank`."""


def calibrations() -> dict[str, Any]:
    world = World.current()
    found: dict[str, Any] = {}
    for norm in (nn.BatchNorm2d, nn.SyncBatchNorm):
        for name, deal in DEALT.items():
            own = [batch for i, batch in enumerate(batches()) if deal(i, world.rank, world.size)]
            result = calibrate(two_ways(norm), own)
            found[f"{norm.__name__}, {name}"] = (result.model.state_dict(), result.to_dict())
    for name, error, model in (
        ("no data", UsageError, two_ways()),
        ("no BatchNorm", NothingToDo, nn.Conv2d(3, 4, 3)),
    ):
        try:
            calibrate(model, [])
        except error as told:
            found[name] = told.what
    return found


# -- training ------------------------------------------------------------------------------------------------

SETTINGS = Settings(epochs=2, batch_size=20, watch_every=3)


class WithUnused(nn.Module):
    """A head whose output the loss does not take."""

    def __init__(self) -> None:
        super().__init__()
        self.net = classifier()
        torch.manual_seed(1)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.net(x)
        return y, self.head(y)


def normed(*, dropout: float = 0.0) -> nn.Module:
    """A SyncBatchNorm before an activation, and a bias before it that it takes away."""
    net = classifier(dropout=dropout)
    net.insert(3, nn.SyncBatchNorm(6))
    net.insert(1, nn.SyncBatchNorm(4, momentum=None))
    return net


def trained(
    folder: Path,
    model: nn.Module,
    data: Data | None = None,
    tell: Any = None,
    settings: Settings = SETTINGS,
    dtype: torch.dtype = torch.float64,
) -> tuple[dict[str, Tensor], Progress]:
    model = model.to(dtype)
    progress = train(
        model,
        data or thirds(95),
        settings,
        Trial(0.05, 7, Watcher(model, Places((), {}), 3), folder / "run.pt"),
        world=World.current(),
        tell=tell,
    )
    return model.state_dict(), progress


NETS: dict[str, Callable[[], nn.Module]] = {"plain": classifier, "sync": normed, "unused": WithUnused}


def poisoned() -> Data:
    """One sample is so large that the loss is infinite."""
    data = thirds()
    inputs = data.train.inputs.double()  # type: ignore[attr-defined]
    inputs[40] = 1e308
    return dataclasses.replace(data, train=dataclasses.replace(data.train, inputs=inputs))  # type: ignore[type-var]


def calibrations_and_trainings(folder: Path) -> dict[str, Any]:
    return {**calibrations(), **trainings(folder)}


def trainings(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def place(name: str) -> Path:
        # Only rank 0 has files: on several machines the others have none of its disk.
        path = folder / (name if World.current().is_main else f"{name} of rank {World.current().rank}")
        path.mkdir(exist_ok=True)
        return path

    for name, make in NETS.items():
        found[name] = trained(place(name), make())

    def stop(progress: Progress, steps: int) -> None:
        if progress.epoch * steps + progress.step == 7:
            raise KeyboardInterrupt

    found["dropout"] = trained(place("whole"), normed(dropout=0.3))
    training.CHECKPOINT_SECONDS = -1.0
    try:
        trained(place("cut"), normed(dropout=0.3), tell=stop)
    except KeyboardInterrupt:
        found["resumed"] = trained(place("cut"), normed(dropout=0.3))
    found["infinite"] = trained(place("infinite"), classifier(), data=poisoned())
    model = normed()
    trained(place("classes"), model)
    found["classes"] = [type(module) for module in model.modules()]
    return found
