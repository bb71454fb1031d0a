"""The comparison of trainings, from Python."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from bntool.core.errors import UsageError
from bntool.data.choosing import Choice
from bntool.data.images import Normalisation, Preparation, normalisation
from bntool.experiment.comparison import compare_training
from bntool.experiment.datasets import open_dataset
from bntool.experiment.folder import write_document
from bntool.experiment.outcome import TrainingComparison
from bntool.experiment.settings import Settings
from bntool.files.loading import load
from bntool.graph.inputs import Inputs
from bntool.observe.modules import require_module
from bntool.runtime.torch_runner import require_torch_device


def compare(
    model: nn.Module | str | Path,
    data: Any,
    folder: str | Path | None = None,
    *,
    example_inputs: Any = None,
    split: str | None = None,
    include: Sequence[str] = (),
    columns: Sequence[str] = (),
    samples: int | None = None,
    mean: Normalisation = None,
    std: Normalisation = None,
    resize: int | None = None,
    force: bool = False,
    **settings: Any,
) -> TrainingComparison:
    """Train a model as it is and after `insert`, on the same batches; the argument is not changed.

    Args:
        model: a module, or a file or reference of one.
        data: what `--data` of `bntool compare` takes (`mnist`, a folder of images by class, an `.npz`,
            `pkg.mod:loader`), or a pair (train, test) of datasets, loaders, (inputs, labels), or iterables of
            batches.
        folder: where a checkpoint of each run goes and at the end `compare.json`: called again with the same
            settings it goes on where it stopped. Nothing is kept where it is not given.
        example_inputs: inputs of the model, of which images need the size.
        split: the parts of a folder, an `.npz` or records to train and to test on, as `"train,val"`.
        include: patterns for the paths of images below the folder, or for their names.
        columns: of records: the input's, and the labels'; found by themselves where it is empty.
        samples: at most so many samples of each part, drawn by the seed.
        mean: of images, as in `open_batches`; so are `std` and `resize`.
        std: the standard deviation of images.
        resize: the shorter side of an image before the middle is cut out.
        force: whether to begin anew where the folder holds another comparison.
        settings: the fields of `bntool.experiment.settings.Settings`, as the command has them: `epochs`,
            `batch_size`, `lrs`, `optimizer`, `repeats`, `seed`, `from_scratch`, `device`, …

    Returns:
        A `TrainingComparison`: `.runs`, `.models` (the trained ones, by `plain` and `batchnorm`),
        `.to_dict()`; printed, it is the table.

    Raises:
        UsageError: data or settings that do not fit, or a folder with another comparison.
        LoadError: a model or data that cannot be read.
        NothingToDo: there is no place for a BatchNorm.
        CheckFailed: the loss of every run stopped being a number.
    """
    unknown = settings.keys() - Settings.__dataclass_fields__.keys()
    if unknown or "epochs" not in settings:
        what = f"there is no setting {min(unknown)!r}" if unknown else "epochs is not given"
        raise UsageError(what, next_step=f"there are {', '.join(Settings.__dataclass_fields__)}")
    given: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in settings.items()}
    chosen = Settings(**given)
    require_torch_device(chosen.device)
    like = None if example_inputs is None else Inputs.of(example_inputs)
    if isinstance(model, str | Path):
        loaded = load(model)
        model, like = loaded.module, like or loaded.example_inputs
    require_module(model, "train")
    choice = Choice(
        samples=samples, seed=chosen.seed, split=split, include=tuple(include), columns=tuple(columns)
    )
    found = open_dataset(data, choice, Preparation(like, *normalisation(mean, std), resize))
    with _kept_in(folder) as place:
        result = compare_training(model, found, chosen, place, force=force)
        if folder is not None:
            write_document(place, result)
    return result


@contextlib.contextmanager
def _kept_in(folder: str | Path | None) -> Iterator[Path]:
    if folder is not None:
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory(prefix="bntool-") as place:
        yield Path(place) / "compare"
