"""The sample network: a small MNIST classifier that has no BatchNorm yet."""

from __future__ import annotations

from torch import nn


def seed_network() -> nn.Sequential:
    """Images (N, 1, 28, 28) to log-probabilities (N, 10): 8 convolutions, 48,884 parameters.

    A plain `nn.Sequential` of stock layers, so that the saved module loads without any class of
    its own. Height and width: 28, 26, 24, 22, pooled to 11, 11, 9, 7, 7, 1.
    """
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, bias=False),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, bias=False),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, bias=False),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 32, 1, bias=False),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, bias=False),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, bias=False),
        nn.ReLU(),
        nn.Conv2d(32, 10, 1, bias=False),
        nn.ReLU(),
        nn.Conv2d(10, 10, 7, bias=False),
        nn.Flatten(),
        nn.LogSoftmax(1),
    )
