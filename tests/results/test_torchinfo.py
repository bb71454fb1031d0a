"""Figure by figure beside torchinfo: equal where it is right; where it is not, both figures stand here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchinfo
from torch import Tensor, nn
from torch.nn.utils import prune

import bntool
from bntool.graph.inputs import Inputs
from bntool.results.summary import Summary


def both(model: nn.Module, *inputs: Tensor) -> tuple[Summary, Any]:
    theirs = torchinfo.summary(model, input_data=list(inputs), verbose=0, mode="eval")
    return bntool.summary(model, tuple(inputs)), theirs


def totals(ours: Summary, theirs: Any) -> list[tuple[int | None, int]]:
    activations = ours.memory["activations"]
    return [
        (ours.totals.parameters, theirs.total_params),
        (ours.totals.trainable, theirs.trainable_params),
        (ours.mult_adds, theirs.total_mult_adds),
        (None if activations is None else 2 * activations, theirs.total_output_bytes),  # backward too
        (ours.memory["parameters"], theirs.total_param_bytes),
    ]


def test_convolutional_networks_agree_in_every_figure() -> None:
    models = pytest.importorskip("torchvision").models
    ours, theirs = both(models.squeezenet1_1(weights=None), torch.zeros(2, 3, 64, 64))
    assert all(mine == others for mine, others in totals(ours, theirs))
    listed = [tuple(row.kernel_size) for row in theirs.summary_list if row.class_name == "Conv2d"]
    assert [row.kernel for row in ours.layers if row.type == "Conv2d"] == listed


@pytest.mark.parametrize(
    ("layer", "shape", "right", "theirs"),
    [
        (nn.Linear(4, 5), (2, 7, 4), 2 * 7 * 25, 2 * 25),  # it counts one position of seven
        (nn.ConvTranspose2d(3, 2, 2, 2), (1, 3, 4, 4), 16 * 24 + 64 * 2, 64 * 26),  # one weight an output
        (nn.Conv2d(3, 2, 1), (3, 4, 4), 16 * 8, 2 * 4 * 8),  # without a batch
        (nn.BatchNorm2d(4), (2, 4, 3, 3), 2 * 8, 2 * 8),  # as it counts: its parameters once a sample
    ],
)
def test_mult_adds(layer: nn.Module, shape: tuple[int, ...], right: int, theirs: int) -> None:
    ours, other = both(nn.Sequential(layer), torch.zeros(shape))
    assert (ours.mult_adds, other.total_mult_adds) == (right, theirs)


def test_an_embedding_multiplies_nothing() -> None:
    ours, theirs = both(nn.Sequential(nn.Embedding(10, 4)), torch.zeros(1, 3, dtype=torch.long))
    assert (ours.mult_adds, theirs.total_mult_adds) == (0, 40)


class OwnAndChild(nn.Module):
    """A parameter of the root, a child that takes its input by keyword, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))
        self.inner = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.inner(input=x)) * self.scale


def test_bytes_of_root_parameters_buffers_and_inputs_by_keyword() -> None:
    ours, theirs = both(OwnAndChild(), torch.zeros(5, 3))
    assert ours.totals.parameters == theirs.total_params == 2 + 8 + 4
    assert (ours.memory["parameters"], theirs.total_param_bytes) == (4 * 14, 4 * 12)
    assert (ours.totals.buffers, ours.memory["buffers"]) == (5, 4 * 4 + 8)  # it knows no buffers
    inner = next(row for row in theirs.summary_list if row.var_name == "inner")
    assert ([row.input_shape for row in ours.layers if row.name == "inner"], inner.input_size) == (
        [(5, 3)],
        [],
    )


def test_shared_and_tied() -> None:
    conv = nn.Conv2d(4, 4, 1)
    ours, theirs = both(nn.Sequential(conv, nn.ReLU(), conv), torch.zeros(1, 4, 2, 2))
    assert ours.mult_adds == theirs.total_mult_adds == 2 * 80  # it runs twice
    assert ours.totals.parameters == theirs.total_params == 20
    tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    tied[1].weight = tied[0].weight
    ours, theirs = both(tied, torch.zeros(1, 4))
    assert (ours.totals.parameters, theirs.total_params) == (16, 32)


def test_pruned_weights_are_stored_all_the_same() -> None:
    layer = nn.Linear(4, 4, bias=False)
    prune.l1_unstructured(layer, "weight", amount=8)
    ours, theirs = both(nn.Sequential(layer), torch.zeros(1, 4))
    assert (ours.totals.parameters, theirs.total_params) == (16, 8)


class Odd(nn.Module):
    """What torchinfo gives up on: outputs that are no tensors, and a kernel size that is no number."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.output = output

    def forward(self, x: Tensor) -> Any:
        return {"number": 3, "none": None, "empty": {}, "scalar": x.sum(), "late": (None, [x])}[self.output]


class Around(nn.Module):
    def __init__(self, output: Any) -> None:
        super().__init__()
        self.odd, self.last = Odd(output), nn.Linear(2, 3)
        self.given: Any = None

    def forward(self, x: Tensor) -> Tensor:
        given = self.odd(x)
        kind = {"number": int, "none": type(None), "empty": dict, "scalar": Tensor, "late": tuple}
        assert isinstance(given, kind[self.odd.output])
        return self.last(x)


@pytest.mark.parametrize("output", ["number", "empty", "scalar", "late"])
def test_outputs_that_torchinfo_cannot_take(output: str) -> None:
    summary = bntool.summary(Around(output), torch.zeros(4, 2))
    assert summary.failure == ""
    assert summary.layers[-1].output_shape == (4, 3)
    assert summary.layers[-1].mult_adds == 4 * 9


def test_what_torchinfo_gives_up_on_is_walked_without_it() -> None:
    odd_kernel = nn.Sequential(nn.Linear(2, 3))
    odd_kernel[0].kernel_size = 1.5
    for model in (Around("none"), odd_kernel):
        with pytest.raises((RuntimeError, TypeError)):
            torchinfo.summary(model, (4, 2), verbose=0)
        summary = bntool.summary(model, (4, 2))
        assert (summary.failure, summary.mult_adds) == ("", None)
        assert summary.layers[-1].output_shape == (4, 3)
        assert "torchinfo gave up" in str(summary.notes[0])


def test_a_forward_that_fails_keeps_what_it_cost_up_to_there() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(7, 2, 1))
    with pytest.raises(RuntimeError, match="Failed to run torchinfo"):
        torchinfo.summary(model, (1, 3, 8, 8), verbose=0)
    summary = bntool.summary(model, (1, 3, 8, 8))
    assert [row.mult_adds for row in summary.layers] == [36 * 224, None]
    assert "failed in 1, shapes end there" in str(summary.notes[0])


def test_nothing_of_a_run_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchinfo import torchinfo as home

    model = OwnAndChild()
    monkeypatch.setattr(
        OwnAndChild, "train", lambda self, mode=True: pytest.fail("the user's own code was run")
    )
    bntool.summary(model, Inputs((torch.zeros(2, 3),)))
    assert "_Walk" not in home._cached_forward_pass  # it keeps every model that it has seen
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert model.norm.num_batches_tracked == 0
