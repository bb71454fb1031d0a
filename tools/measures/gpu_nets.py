"""The networks of the GPU record: what each is, how it is built, and what it is fed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import bntool

SAMPLE = Path(__file__).resolve().parents[2] / "samples" / "model.pt"


@dataclasses.dataclass(frozen=True)
class Net:
    """`shape` is one sample's; `tiny` one that a rehearsal on a CPU gets through in seconds."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    tiny: tuple[int, ...]

    def model(self) -> nn.Module:
        """Seeded weights, and BatchNorms that do something."""
        torch.manual_seed(0)
        model = self.build().eval()
        enliven(model)
        return model


def enliven(model: nn.Module) -> None:
    """Give every BatchNorm statistics and an affine that do something and amplify little."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.8, 1.25)
            nn.init.uniform_(module.weight, 0.8, 1.25)
            nn.init.normal_(module.bias, 0, 0.1)


def _sample() -> nn.Module:
    """The network of the samples, with the BatchNorms that bntool inserts."""
    loaded = bntool.load(SAMPLE)
    return bntool.insert(loaded.model, loaded.example_inputs).model


def _torchvision(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from torchvision import models

        model: nn.Module = models.get_model(name, weights=None)
        return model

    return build


def _upwards() -> nn.Module:
    """A decoder: transposed convolutions, one of them in groups."""
    return nn.Sequential(
        nn.ConvTranspose2d(64, 128, 4, stride=2, padding=1, bias=False), nn.BatchNorm2d(128), nn.ReLU(),
        nn.ConvTranspose2d(128, 64, 4, stride=2, padding=1, groups=4), nn.BatchNorm2d(64), nn.ReLU(),
        nn.ConvTranspose2d(64, 32, 2, stride=2), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 3, 3, padding=1),
    )  # fmt: skip


def _volumes() -> nn.Module:
    """A classifier of clips: 3-d convolutions without a bias."""
    return nn.Sequential(
        nn.Conv3d(3, 32, 3, padding=1, bias=False), nn.BatchNorm3d(32), nn.ReLU(), nn.MaxPool3d(2),
        nn.Conv3d(32, 64, 3, padding=1, bias=False), nn.BatchNorm3d(64), nn.ReLU(),
        nn.Conv3d(64, 128, 3, stride=2, bias=False), nn.BatchNorm3d(128), nn.ReLU(),
        nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


IMAGE, SMALL = (3, 224, 224), (3, 64, 64)
NETS = {
    "sample": Net(_sample, (1, 28, 28), (1, 28, 28)),
    "resnet50": Net(_torchvision("resnet50"), IMAGE, SMALL),
    "mobilenet_v3": Net(_torchvision("mobilenet_v3_large"), IMAGE, SMALL),
    "densenet121": Net(_torchvision("densenet121"), IMAGE, SMALL),
    "transposed": Net(_upwards, (64, 32, 32), (64, 4, 4)),
    "3d": Net(_volumes, (3, 16, 64, 64), (3, 8, 8, 8)),
}
