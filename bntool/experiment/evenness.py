"""Whether the batches of a training, and its two parts, are as samples drawn at random are."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from bntool.calibrating.drift import Grouping
from bntool.core.showing import WARNING
from bntool.experiment.samples import Data

ORDERED = (
    "in training BatchNorm takes each for the whole. They were asked for by numbers drawn at random: let "
    "__getitem__ heed its number"
)
"""What comes of batches that come in an order although they were drawn."""
_LOOKED_AT = 1000
"""Labels of each part that are compared: of all of a large data set, chance allows less than matters."""


def parts_apart(data: Data) -> str:
    """A warning where the classes of the test part have other shares than in the training part.

    By the analysis of variance of `Grouping`, of the classes in two groups. A file that lies in order and is
    cut in two is such data: the running statistics of BatchNorm are those of other classes than are tested.
    """
    if data.labels is None:
        return ""
    grouping, shares = Grouping(), []
    for labels in data.labels:
        classes = F.one_hot(_some(labels).cpu(), data.classes).double()
        grouping.add(classes)
        shares.append(classes.mean(0))
    found = grouping.ratio()
    if found is None or found[0] <= found[1]:
        return ""
    most = int((shares[0] - shares[1]).abs().argmax())
    return (
        f"{WARNING}the test part is not drawn from what is trained on: its classes have other shares than "
        f"chance allows (class {most}: {shares[0][most]:.0%} of the training, {shares[1][most]:.0%} of the "
        "test). "
        "BatchNorm's running statistics are those of the training. Where data that lies in an order was cut "
        "in two, shuffle it first"
    )


def _some(labels: Tensor) -> Tensor:
    step = max(1, len(labels) // _LOOKED_AT)
    return labels[torch.arange(0, len(labels), step)]
