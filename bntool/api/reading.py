"""What is read: a model of any kind, and batches of real data."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from bntool.core.command_options import LoadOptions
from bntool.core.limits import DEFAULT_MAX_SIZE
from bntool.data.batches import Batches, batches_from
from bntool.data.choosing import Choice
from bntool.data.images import Normalisation, Preparation, normalisation
from bntool.files import loading
from bntool.files.loaded import Loaded
from bntool.graph.inputs import Inputs


def load(
    ref: str | os.PathLike[str],
    *,
    arch: str | None = None,
    weights: str | os.PathLike[str] | None = None,
    key: str | None = None,
    allow: Iterable[str] = (),
    trust_pickle: bool = False,
    pretrained: bool = False,
    prepare: Callable[[nn.Module], nn.Module] | None = None,
    max_size: int = DEFAULT_MAX_SIZE,
    stand_ins: bool = False,
    tell: Callable[[str], object] | None = None,
) -> Loaded:
    """Load a model from a file or a reference, on the CPU, in the mode it was saved in.

    Args:
        ref: a file of `torch.save`, `torch.export.save` or safetensors, a folder that transformers saved a
            model into, `torchvision:NAME`, `timm:NAME`, `pkg.mod:factory` or `path/file.py:Class`.
        arch: such a reference for a file that holds only weights, or `auto` for the one of torchvision or
            timm that fits exactly.
        weights: a file, for a reference.
        key: the entry of a checkpoint that holds the weights.
        allow: classes of whole pickled models that may be made.
        trust_pickle: whether code in the file is run; without, none is.
        pretrained: whether torchvision or timm load their weights down.
        prepare: applied to the model of `arch`, or of a reference, before its weights go in.
        max_size: bounds, in bytes, what a file may ask for.
        stand_ins: classes that are not known become ones that hold state and run nothing: enough to look at
            a model, not to run it.
        tell: takes a line on what takes long.

    Raises:
        LoadError: it cannot be loaded.
        UsageError: options that do not fit together.
    """
    asked = LoadOptions(
        arch=arch,
        weights=None if weights is None else os.fspath(weights),
        key=key,
        allow=(allow,) if isinstance(allow, str) else tuple(allow),
        trust_pickle=trust_pickle,
        max_size=max_size,
        pretrained=pretrained,
    )
    return loading.load(ref, asked, prepare=prepare, stand_ins=stand_ins, tell=tell)


def open_batches(
    source: Any,
    *,
    batch_size: int = 32,
    limit: int | None = None,
    samples: int | None = None,
    shuffle: bool = True,
    seed: int = 0,
    split: str | None = None,
    include: Sequence[str] = (),
    columns: Sequence[str] = (),
    like: Inputs | None = None,
    mean: Normalisation = None,
    std: Normalisation = None,
    resize: int | None = None,
    share: tuple[int, int] = (0, 1),
) -> Batches:
    """Batches from a file of arrays, images, records, `pkg.mod:loader`, or an iterable of batches.

    Args:
        source: arrays and tensors have the samples on axis 0: (samples, *the model's input without its batch
            axis). Images lie anywhere below a folder. Records are `.parquet`, `.tar` (webdataset shards),
            folders of those, and what `Dataset.save_to_disk` wrote, with the library of each. A loader is an
            iterable of batches, or a function that returns one: tensors, `(input, target)`, or mappings of
            keyword inputs.
        batch_size: how many samples of a file or folder make a batch. A last batch of one sample joins the
            one before, of a loader too, since by itself it has no variance.
        limit: at most so many batches.
        samples: at most so many samples.
        shuffle: draw the samples of files, folders and plain `DataLoader`s in an order by `seed`.
        seed: of that order.
        split: the part of a folder (`train`, `val`, …) or of an `.npz` (`x_train`, …), or of records (by
            the names of their files); None for the training where there are parts; `"all"`.
        include: patterns for the paths of images below the folder, or for their names.
        columns: of records: the name of the input's column; none for the one that can be it.
        like: example inputs; data whose axes or type do not fit them is refused.
        mean: of images in 0..1, one number for each channel or one for all: (x − mean)/std. A name such as
            `"imagenet"` stands for both, unless `std` is given.
        std: the same for the standard deviation.
        resize: the shorter side of an image before the middle is cut to the size of `like`; None for just
            covering it.
        share: (rank, size) takes every size-th batch from number `rank` on.

    Raises:
        UsageError: no data, or data that does not fit `like`; both shapes are named.
        LoadError: a source that cannot be read.
    """
    choice = Choice(batch_size, limit, samples, shuffle, seed, split, tuple(include), tuple(columns), share)
    return batches_from(source, choice, Preparation(like, *normalisation(mean, std), resize))
