"""One edit on tensors: what is made, what is kept, and what is left alone."""

from __future__ import annotations

import pytest
import torch

from bntool.core.plan import Edit
from bntool.surgery.tensors import edited

SCALE = torch.tensor([1.0, 2.0], dtype=torch.float64)
NONE = torch.zeros(2, dtype=torch.float64)
WEIGHT = torch.arange(6.0).reshape(3, 2)


@pytest.mark.parametrize("side", ["scale_input", "scale_output"])
def test_a_bias_that_the_plan_names_is_made_even_without_a_shift(side: str) -> None:
    """An earlier fold has made it: another pass finds it there."""
    weight = WEIGHT if side == "scale_input" else WEIGHT.T.contiguous()
    edit = Edit(side, "a", None, "a.weight", "a.bias", "linear")
    _, bias = edited(edit, weight, None, (SCALE, NONE))
    assert bias is not None
    assert torch.equal(bias, torch.zeros(()).expand_as(bias).float())
    unnamed = Edit(side, "a", None, "a.weight", "", "linear")
    assert edited(unnamed, weight, None, (SCALE, NONE))[1] is None


def test_a_bias_is_the_same_tensor_where_only_a_scale_goes_in_at_the_input() -> None:
    bias = torch.randn(3)
    edit = Edit("scale_input", "a", None, "a.weight", "a.bias", "linear")
    weight, kept = edited(edit, WEIGHT, bias, (SCALE, NONE))
    assert kept is bias
    assert torch.equal(weight, WEIGHT * SCALE.float())


def test_a_shift_goes_through_the_weight_into_the_bias() -> None:
    edit = Edit("scale_input", "a", None, "a.weight", "a.bias", "linear")
    shift = torch.tensor([3.0, -1.0], dtype=torch.float64)
    for bias in (None, torch.ones(3)):
        _, found = edited(edit, WEIGHT, bias, (SCALE, shift))
        assert torch.equal(found, (0 if bias is None else bias) + (WEIGHT.double() @ shift).float())
