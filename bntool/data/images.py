"""Folders of images as batches of tensors, decoded by Pillow where it is installed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bntool.core.errors import LoadError, UsageError
from bntool.graph.inputs import Inputs

_ENDINGS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


@dataclasses.dataclass(frozen=True)
class Preparation:
    """What images are made into: the size and channels of `like` (N, C, H, W), and (x − mean)/std."""

    like: Inputs | None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None

    def checked(self, where: str) -> Preparation:
        """Itself. Raises `UsageError` when images cannot be made into what the model takes."""
        shapes = [t.shape for t in self.like.tensors().values()] if self.like is not None else []
        if len(shapes) != 1 or len(shapes[0]) != 4 or shapes[0][1] not in _MODES:
            takes = self.like.shapes() if self.like is not None else "an input of unknown size"
            raise UsageError(
                f"the data is a folder of images, and the model takes {takes}",
                where=where,
                next_step="name the size with --input 1x3x224x224, or give an .npy file",
            )
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) not in (1, shapes[0][1]):
                raise UsageError(f"{name} has {len(values)} values for {shapes[0][1]} channels", where=where)
        if self.std is not None and not all(value > 0 for value in self.std):
            raise UsageError("std holds a value that is not positive", where=where)
        return self

    def require_unused(self, where: str) -> None:
        if self.mean is not None or self.std is not None:
            raise UsageError(
                "mean and std are for a folder of images",
                where=where,
                next_step="give arrays already normalised, and leave --mean and --std out",
            )

    @property
    def size(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        assert self.like is not None
        (tensor,) = self.like.tensors().values()
        return tensor.shape[1], tensor.shape[2], tensor.shape[3]


def find_images(folder: Path) -> list[Path]:
    """Every image below `folder`, in order of name. Raises `UsageError` when there is none."""
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _ENDINGS and path.is_file())
    if not found:
        raise UsageError(
            f"no image in {folder}", next_step=f"it needs files that end in {', '.join(sorted(_ENDINGS))}"
        )
    return found


def image_batch(files: Sequence[Path], preparation: Preparation) -> Tensor:
    """Images as (N, C, H, W) float32 in 0..1, then (x − mean)/std.

    The shorter side is resized (bilinear, antialiased) so that the image covers H × W; the middle is cut.
    """
    channels, height, width = preparation.size
    batch = torch.stack([_covering(_decoded(file, channels), height, width) for file in files])
    for values, apply in ((preparation.mean, torch.sub), (preparation.std, torch.div)):
        if values is not None:
            batch = apply(batch, torch.tensor(values, dtype=batch.dtype).reshape(1, -1, 1, 1))
    return batch


def _covering(image: Tensor, height: int, width: int) -> Tensor:
    wide = image.to(torch.float32).div(255)
    scale = max(height / wide.shape[1], width / wide.shape[2])
    size = [max(height, round(wide.shape[1] * scale)), max(width, round(wide.shape[2] * scale))]
    if size != list(wide.shape[1:]):
        wide = torch.nn.functional.interpolate(wide[None], size, mode="bilinear", antialias=True)[0]
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return wide[:, top : top + height, left : left + width]


def _decoded(file: Path, channels: int) -> Tensor:
    """An image as (C, H, W) uint8."""
    try:
        from PIL import Image
    except ImportError as error:
        raise LoadError(
            "reading images needs Pillow, which is not installed",
            where=str(file),
            next_step="pip install pillow, or give an .npy file",
        ) from error
    try:
        with Image.open(file) as opened:
            pixels = np.array(opened.convert(_MODES[channels]))
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise LoadError(
            f"{file.name} is no image that can be read: {lines[0]}",
            where=str(file),
            next_step="remove it from the folder",
        ) from error
    return torch.from_numpy(pixels).reshape(*pixels.shape[:2], channels).permute(2, 0, 1)
