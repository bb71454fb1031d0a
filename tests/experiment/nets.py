"""A small classifier and data that it can learn: which third of the image is bright."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from bntool.experiment.samples import Data, Held

SIDE = 9


def arrays(count: int = 96, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 1, 9, 9) float32 and the number of the bright third, 0 to 2."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 3, count)
    images = generator.normal(size=(count, 1, SIDE, SIDE)).astype("float32") * 0.5
    for i, label in enumerate(labels):
        images[i, 0, 3 * label : 3 * label + 3] += 2
    return images, labels


def thirds(count: int = 96, test: int = 48) -> Data:
    parts = [arrays(count), arrays(test, seed=1)]
    held = [Held(torch.from_numpy(x), torch.from_numpy(y)) for x, y in parts]
    return Data(held[0], held[1], 3, "thirds", (held[0].labels, held[1].labels))


def classifier(seed: int = 0, *, dropout: float = 0.0) -> nn.Sequential:
    """Two sites: 0 and 2."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.ReLU(),
            nn.Conv2d(4, 6, 3),
            nn.ReLU(),
            nn.AvgPool2d(5, 1),
            nn.Dropout(dropout),
            nn.Flatten(),
            nn.Linear(6, 3),
        )


NET_CODE = f"""
from torch import nn


def net():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear({6 * 25}, 3)
    )
"""


def write_npz(folder: Path) -> Path:
    x, y = arrays()
    xt, yt = arrays(48, seed=1)
    path = folder / "data.npz"
    np.savez(path, x_train=x, y_train=y, x_test=xt, y_test=yt)
    return path
