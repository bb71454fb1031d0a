"""Small models for the command line, saved in every way, and counts made without bntool."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

INPUT = ("--input", "1x3x12x12")

USER_CODE = """
import torch.nn.functional as F
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.second = nn.Conv2d(4, 5, 3)
        self.head = nn.Linear(5, 2)

    def forward(self, images):
        x = F.relu(self.first(images))
        x = F.relu(self.second(x))
        return self.head(x.mean((2, 3)))
"""


def plain() -> nn.Sequential:
    """One site, `0`; the last convolution is none."""
    return _seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)))


def normalised() -> nn.Sequential:
    """Two BatchNorms, `1` and `4`, that fold; their statistics are those of a trained model."""

    def make() -> nn.Sequential:
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 2, 3),
            nn.BatchNorm2d(2),
        )
        for layer in (model[1], model[4]):
            nn.init.uniform_(layer.running_mean, -0.5, 0.5)
            nn.init.uniform_(layer.running_var, 0.5, 2.0)
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.uniform_(layer.bias, -0.5, 0.5)
        return model.eval()

    return _seeded(make)


def partly_foldable() -> nn.Sequential:
    """BatchNorm `1` folds; `3` stays, whose shift passes neither the ReLU before it nor the output."""

    def make() -> nn.Sequential:
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))
        nn.init.ones_(model[3].bias)
        return model.eval()

    return _seeded(make)


def save(model: Any, name: str) -> Path:
    torch.save(model, name)
    return Path(name)


def user_model(script: str = "user_net.py", code: str = USER_CODE) -> nn.Module:
    """Write the user's script and make a `Net` of it, as the user's own program would."""
    Path(script).write_text(code)
    sys.path.insert(0, str(Path.cwd()))
    try:
        importlib.invalidate_caches()
        module = importlib.import_module(Path(script).stem)
        return _seeded(module.Net)
    finally:
        sys.path.pop(0)


def forget(module: str) -> None:
    """Have the next import find the script anew, as a new process would."""
    sys.modules.pop(module, None)


def state_of(name: str | Path) -> Mapping[str, Tensor]:
    """The tensors in a file that bntool wrote, whatever kind of file it is."""
    path = Path(name)
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    held = torch.load(path, weights_only=False)
    held = held.get("model", held) if isinstance(held, dict) else held
    return held.state_dict() if isinstance(held, nn.Module) else held


def counted(name: str | Path) -> tuple[int, int]:
    """Values of parameters and of BatchNorm's own buffers in a file, counted from its tensors."""
    of_buffers = ("running_mean", "running_var", "num_batches_tracked")
    sizes = {key: value.numel() for key, value in state_of(name).items()}
    buffers = sum(size for key, size in sizes.items() if key.endswith(of_buffers))
    return sum(sizes.values()) - buffers, buffers


def _seeded(make: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()
