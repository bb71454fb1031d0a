"""The first layer of a model, and the shapes of inputs that it takes."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

_SIDES = {1: (28, 32, 64, 224), 3: (224, 299, 256, 384, 64, 32)}
"""Image sides to try by the number of input channels: MNIST's for one, ImageNet's for three."""
SMALL_SIDE = 64


TELLING = (
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.Bilinear,
    nn.Embedding,
    nn.modules.batchnorm._BatchNorm,
    nn.RNNBase,
)


def first_layer(model: nn.Module) -> tuple[str, nn.Module] | None:
    for name, module in model.named_modules():
        if isinstance(module, TELLING):
            return name, module
    return None


def shapes_for(layer: nn.Module, small: bool) -> Iterator[tuple[int, ...]]:
    if isinstance(layer, nn.Embedding):
        yield from ((1, 16), (1, 64))
    elif isinstance(layer, nn.Linear):
        yield from ((1, layer.in_features), (1, 16, layer.in_features))
    elif isinstance(layer, nn.RNNBase):
        yield (1, 16, layer.input_size)
    elif isinstance(layer, nn.BatchNorm1d):
        yield from ((2, layer.num_features), (2, layer.num_features, 16))
    elif isinstance(layer, nn.BatchNorm3d):
        yield (1, layer.num_features, 8, 8, 8)
    elif isinstance(layer, nn.modules.batchnorm._BatchNorm):
        yield (1, layer.num_features, 32, 32)
    elif isinstance(layer, nn.modules.conv._ConvNd):
        yield from _image_shapes(layer, small)


def _image_shapes(layer: nn.modules.conv._ConvNd, small: bool) -> Iterator[tuple[int, ...]]:
    channels, dims = layer.in_channels, len(layer.kernel_size)
    if dims == 1:
        yield from ((1, channels, n) for n in ((256, 1024, 16000) if small else (1024, 256, 16000)))
    elif dims == 3:
        sizes = ((8, 64, 64), (16, 112, 112), (16, 224, 224))
        yield from ((1, channels, *s) for s in (sizes if small else (sizes[1], sizes[2], sizes[0])))
    else:
        sides = _SIDES.get(channels, (64, 32, 16, 224))
        if layer.transposed:
            sides = (8, 1, 16, 32)
        elif small and channels != 1:
            sides = (SMALL_SIDE, 128, *sides)
        yield from ((1, channels, n, n) for n in dict.fromkeys(sides))
