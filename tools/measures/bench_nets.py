"""The nets of `make bench`, with statistics as training leaves them, and what they are run on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bntool.files.references import build

VOLUME = (1, 3, 16, 112, 112)


class Conv(nn.Module):
    """Convolution, BatchNorm, SiLU: the small module that detectors are made of."""

    def __init__(self, inputs: int, outputs: int, side: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, side, stride, side // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Stage(nn.Module):
    """A part of the channels through many bottlenecks, each of which stays beside what comes after."""

    def __init__(self, channels: int, depth: int) -> None:
        super().__init__()
        self.into, half = Conv(channels, channels), channels // 2
        self.blocks = nn.ModuleList(
            nn.Sequential(Conv(half, half, 3), Conv(half, half, 3)) for _ in range(depth)
        )
        self.out = Conv(half * (depth + 2), channels)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.into(x).chunk(2, 1))
        for block in self.blocks:
            parts.append(parts[-1] + block(parts[-1]))
        return self.out(torch.cat(parts, 1))


class ManyModules(nn.Module):
    """A net of the size and shape of a large YOLO's backbone and neck: some 2,000 small modules."""

    def __init__(self, width: int = 16, depth: int = 36) -> None:
        super().__init__()
        layers: list[nn.Module] = [Conv(3, width, 3, 2)]
        for stage in range(4):
            channels = width * 2**stage
            layers += [Conv(channels, 2 * channels, 3, 2), Stage(2 * channels, depth)]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Conv2d(width * 16, 84, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x))


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every BatchNorm statistics and an affine that are not the initial ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                n = module.num_features
                module.running_mean.copy_(torch.randn(n, generator=generator) * 0.1)
                module.running_var.copy_(torch.rand(n, generator=generator) + 0.5)
                module.weight.copy_(torch.rand(n, generator=generator) + 0.5)
                module.bias.copy_(torch.randn(n, generator=generator) * 0.1)
                if module.num_batches_tracked is not None:
                    module.num_batches_tracked.fill_(1)
    return model.eval()


def _named(name: str) -> nn.Module:
    return build(name).model


NETS: dict[str, Callable[[], nn.Module]] = {
    name: functools.partial(_named, name)
    for name in """torchvision:vgg16_bn torchvision:resnet50 timm:repvgg_a2 timm:cspdarknet53
    torchvision:r3d_18 torchvision:resnet18 torchvision:densenet121 timm:levit_128s
    torchvision:efficientnet_b0 timm:ghostnet_100 torchvision:mobilenet_v2
    torchvision:ssdlite320_mobilenet_v3_large timm:regnetx_002 torchvision:mobilenet_v3_small
    torchvision:shufflenet_v2_x1_0 timm:hrnet_w18_small""".split()
} | {"2,000 small modules": ManyModules}
"""By name: one over volumes, a transformer (levit), one of detection, one of as many modules as a YOLO."""


def net(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomise(NETS[name]() if name in NETS else _named(name))


def usual_input(model: nn.Module) -> Any:
    """One image of the size the model is made for: what its configuration records, else 3x224x224; a clip for
    one over volumes, a list of one image for one of detection.
    """
    if any(isinstance(module, nn.Conv3d) for module in model.modules()):
        return torch.randn(VOLUME)
    if hasattr(model, "roi_heads") or hasattr(model, "anchor_generator"):
        return [torch.randn(3, 320, 320)]
    recorded = getattr(model, "pretrained_cfg", None) or {}
    return torch.randn(1, *recorded.get("input_size", (3, 224, 224)))
