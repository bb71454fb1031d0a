"""Folders of images as batches of tensors, decoded by Pillow where it is installed."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bntool.core.errors import LoadError, UsageError
from bntool.data.choosing import listed
from bntool.graph.inputs import Inputs

ENDINGS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_LOOKED_AT = 64
"""Images whose channels are looked at before any is decoded."""
NORMALISATIONS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "inception": ((0.5,), (0.5,)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "mnist": ((0.1307,), (0.3081,)),
}
"""Mean and standard deviation by name, as torchvision, timm and open_clip publish them."""


@dataclasses.dataclass(frozen=True)
class Encoded:
    """An image that has no file of its own: its name for messages, and its bytes."""

    name: str
    content: bytes


Picture = Path | Encoded


@dataclasses.dataclass(frozen=True)
class Preparation:
    """What images are made into: the size and channels of `like` (N, C, H, W), and (x − mean)/std.

    `resize` is the shorter side before the middle is cut out; None makes the image just cover it.
    """

    like: Inputs | None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    resize: int | None = None

    def checked(self, where: str) -> Preparation:
        """Itself. Raises `UsageError` when images cannot be made into what the model takes."""
        shapes = [t.shape for t in self.like.tensors().values()] if self.like is not None else []
        if len(shapes) != 1 or len(shapes[0]) != 4 or shapes[0][1] not in _MODES:
            takes = self.like.shapes() if self.like is not None else "an input of unknown size"
            raise UsageError(
                f"the data is images, and the model takes {takes}",
                where=where,
                next_step="name the size with --input 1x3x224x224, or give an .npy file",
            )
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) not in (1, shapes[0][1]):
                channels = shapes[0][1]
                raise UsageError(
                    f"{name} has {len(values)} values, and the model's input has {channels} "
                    f"{'channel' if channels == 1 else 'channels'}",
                    where=where,
                    next_step="give one value" + (f" for all, or {channels}" if channels > 1 else ""),
                )
        if self.std is not None and not all(value > 0 for value in self.std):
            raise UsageError(
                f"std is {_listed(self.std)}, which holds a value that is not positive",
                where=where,
                next_step="give the standard deviations of images in 0..1, such as --std 0.229,0.224,0.225",
            )
        if self.mean is not None and max(self.mean) > 1:
            raise UsageError(
                f"mean is {_listed(self.mean)}, and images are scaled to 0..1 before it is taken off",
                where=where,
                next_step=f"divide by 255: --mean {_listed([value / 255 for value in self.mean])}"
                + (f" --std {_listed([value / 255 for value in self.std])}" if self.std else ""),
            )
        if self.resize is not None and self.resize < max(shapes[0][2:]):
            raise UsageError(
                f"resize is {self.resize}, and the model takes {self.size[1]}x{self.size[2]} of the middle",
                where=where,
                next_step="give a shorter side at least as long, or another --input",
            )
        return self

    def require_unused(self, where: str) -> None:
        if (self.mean, self.std, self.resize) != (None, None, None):
            raise UsageError(
                "mean, std and resize are for a folder of images",
                where=where,
                next_step="give arrays already prepared, and leave --mean, --std and --resize out",
            )

    @property
    def size(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        assert self.like is not None
        (tensor,) = self.like.tensors().values()
        return tensor.shape[1], tensor.shape[2], tensor.shape[3]


Normalisation = str | Sequence[float] | None
"""Numbers, their text `a,b,c`, or a name such as `imagenet`."""


def normalisation(mean: Normalisation, std: Normalisation) -> tuple[list[float] | None, list[float] | None]:
    """The numbers that are meant; a name alone is for both. Raises `UsageError` for other text."""
    alone = mean if std is None else std if mean is None else None
    if isinstance(alone, str) and alone.lower() in NORMALISATIONS:
        mean = std = alone
    return _numbers(mean, "--mean", 0), _numbers(std, "--std", 1)


def _listed(values: Sequence[float]) -> str:
    return ",".join(f"{value:.4g}" for value in values)


def _numbers(given: Normalisation, flag: str, which: int) -> list[float] | None:
    if not isinstance(given, str):
        return None if given is None else list(given)
    if given.lower() in NORMALISATIONS:
        return list(NORMALISATIONS[given.lower()][which])
    try:
        return [float(part) for part in re.split(r"[\s,]+", given.strip(" []()"))]
    except ValueError as error:
        raise UsageError(
            f"{flag} {given} is neither a list of numbers nor one of {', '.join(NORMALISATIONS)}",
            next_step=f"write it as {flag} 0.485,0.456,0.406, or {flag} imagenet",
        ) from error


def find_images(folder: Path) -> list[Path]:
    """Every image below `folder`, in order of name, but for hidden ones. `UsageError` when there is none.

    Hidden are what systems and notebooks leave between images: `._cat.png`, `.ipynb_checkpoints`, `__MACOSX`.
    """
    files = [path for path in folder.rglob("*") if path.is_file() and not _is_hidden(path, folder)]
    found = sorted(path for path in files if path.suffix.lower() in ENDINGS)
    if not found:
        endings = listed(f"{ending or 'no ending'} ({n})" for ending, n in _endings(files).most_common())
        raise UsageError(
            f"no image in {folder}",
            where=f"it holds {len(files)} files: {endings}" if files else "it holds no file",
            next_step=f"it needs files that end in {', '.join(sorted(ENDINGS))}",
        )
    return found


def _is_hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in file.relative_to(folder).parts)


def _endings(files: Sequence[Path]) -> Counter[str]:
    return Counter(path.suffix.lower() for path in files)


def converted(files: Sequence[Picture], channels: int) -> str:
    """What the first images are made from, in words; empty where each has the model's channels already."""
    modes: Counter[str] = Counter()
    for file in files[:_LOOKED_AT]:
        with _opened(file) as image:
            modes[image.mode] += 1
    if set(modes) <= {_MODES[channels]}:
        return ""
    held = listed(f"{mode} ({number})" for mode, number in modes.most_common())
    return f"of the first {sum(modes.values())} images are {held}; all are made {_MODES[channels]}"


def image_batch(files: Sequence[Picture], preparation: Preparation) -> Tensor:
    """Images as (N, C, H, W) float32 in 0..1, then (x − mean)/std.

    As torchvision's `Resize`, `CenterCrop` and `ToTensor` do: the shorter side is resized by Pillow
    (bilinear, antialiased), the middle is cut. Without `resize` the image is made to cover H × W.
    """
    batch = torch.stack([_decoded(file, preparation) for file in files]).to(torch.float32).div(255)
    for values, apply in ((preparation.mean, torch.sub), (preparation.std, torch.div)):
        if values is not None:
            batch = apply(batch, torch.tensor(values, dtype=batch.dtype).reshape(1, -1, 1, 1))
    return batch


def _covering(image: Any, height: int, width: int, resize: int | None) -> Any:
    """A Pillow image of height × width: the middle of one with the shorter side `resize`."""
    wide, high = image.size
    if resize is None:  # the side that has the least to spare
        by_height = height * wide >= width * high
        size = (int(height * wide / high), height) if by_height else (width, int(width * high / wide))
    else:
        size = (resize, int(resize * high / wide)) if wide <= high else (int(resize * wide / high), resize)
    if size != image.size:
        image = image.resize(size, 2)  # BILINEAR
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
    return image.crop((left, top, left + width, top + height))


def _decoded(file: Picture, preparation: Preparation) -> Tensor:
    """An image as (C, H, W) uint8, in the size that the model takes."""
    channels, height, width = preparation.size
    with _opened(file) as image:
        made = _covering(_of_bytes(image).convert(_MODES[channels]), height, width, preparation.resize)
        pixels = np.array(made).reshape(height, width, channels)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _of_bytes(image: Any) -> Any:
    """The image with values of 8 bits. Pillow itself cuts off, from 16 bits, all above 255: a white image."""
    if image.mode == "F":
        raise ValueError("it holds floating-point numbers, of no known range; save it as .npy")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    if values.min() < 0 or values.max() >= 1 << 16:
        raise ValueError(f"it holds numbers from {values.min()} to {values.max()}, not of 16 bits")
    from PIL import Image

    return Image.fromarray(np.rint(values / 257).astype(np.uint8))


@contextlib.contextmanager
def _opened(file: Picture) -> Iterator[Any]:
    """An image of Pillow's while it is open; whatever goes wrong with it is told with its name."""
    where = str(file) if isinstance(file, Path) else ""
    try:
        from PIL import Image
    except ImportError as error:
        raise LoadError(
            "reading images needs Pillow, which is not installed",
            where=where,
            next_step="pip install pillow, or give an .npy file",
        ) from error
    try:
        with Image.open(file if isinstance(file, Path) else io.BytesIO(file.content)) as image:
            yield image
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise LoadError(
            f"{file.name} is no image that can be read: {lines[0]}",
            where=where,
            next_step=f"mend it, or remove it from the {'folder' if isinstance(file, Path) else 'data'}",
        ) from error
