"""Models on which the whole proof of a fold is not to be had: what is proved, what is said of the rest."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

import bntool
from bntool.core.reasons import Reason
from bntool.graph.inputs import Inputs
from bntool.observe.eager import observe
from bntool.subjects.sizes import besides, smaller


class Net(nn.Module):
    """Two convolutions with a BatchNorm each; what stands in the way is for those below to say."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        )
        for norm in (self.layers[1], self.layers[4]):
            norm.running_mean.normal_()
            norm.num_batches_tracked.fill_(1)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class OneSize(Net):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2:] != (32, 32):
            raise ValueError("images of 32 by 32 alone")
        return self.layers(x)


class OneShape(Net):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape != (1, 3, 32, 32):
            raise ValueError("one image of 32 by 32 alone")
        return self.layers(x)


class BySize(Net):
    """A large image takes a way past the BatchNorms."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) if x.shape[-1] < 64 else self.layers[3](self.layers[0](x))


class NoFloat64(Net):
    error: ClassVar[Exception] = TypeError("float32 alone")

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            raise self.error
        return self.layers(x)


class OutOfMemory(NoFloat64):
    error = MemoryError("no memory is left")


class OutOfTorchsMemory(NoFloat64):
    error = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8589934592 bytes")


@pytest.mark.parametrize("check", ["fast", "full"])
@pytest.mark.parametrize(
    ("kind", "said", "float64"),
    [
        (OneSize, "not proved on other sizes, since the model takes none of ", True),
        (OneShape, "not proved on other sizes, since the model takes none of ", True),
        (NoFloat64, "the model does not run in float64 (float32 alone)", False),
        (OutOfMemory, "the model does not run in float64 (no memory is left)", False),
        (OutOfTorchsMemory, "the model does not run in float64 (DefaultCPUAllocator: ", False),
    ],
)
def test_what_cannot_be_proved_is_said_and_the_rest_is_proved(
    kind: type[Net], said: str, float64: bool, check: str
) -> None:
    result = bntool.fold(kind(), torch.randn(1, 3, 32, 32), check=check)  # type: ignore[arg-type]
    own, *algebra = result.checks
    assert (len(list(result.sites)), own.verdict) == (2, "passed")
    assert said in own.detail
    assert [row.verdict for row in algebra] == ["passed"] * float64
    tried = own.detail.partition("takes none of ")[2].split("; ")
    assert len(set(tried)) == len(tried)


@pytest.mark.parametrize("kind", [OneSize, OneShape, NoFloat64, OutOfMemory])
def test_a_wrong_number_is_found_by_the_proof_that_is_left(kind: type[Net]) -> None:
    model, x = kind(), torch.randn(1, 3, 32, 32)
    folded = bntool.fold(model, x).model
    with torch.no_grad():
        folded.layers[3].weight[0, 0, 0, 0] += 0.01
    assert not all(row.agrees for row in bntool.verify(model, folded, x, check="fast").checks)


def test_a_model_that_takes_another_path_on_a_large_image_keeps_what_only_one_of_them_runs() -> None:
    result = bntool.fold(BySize(), torch.randn(1, 3, 32, 32))
    assert not result.modified
    assert {skip.reason for skip in result.skips} == {Reason.WEIGHT_SHARED}


def test_no_shape_is_tried_twice_and_no_image_gets_more_channels() -> None:
    model, x = Net(), Inputs((torch.randn(1, 3, 32, 32),))
    shapes = [inputs.shapes() for inputs in smaller(x, observe(model, x).graph)]
    assert len(set(shapes)) == len(shapes)
    beside = [next(iter(inputs.tensors().values())) for inputs in besides(x)]
    assert {tensor.shape[1] for tensor in beside} == {3}
