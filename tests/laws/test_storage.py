"""Every law in every storage type and memory format: the plan of float64, each number rounded once."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bntool.core.plan import Plan
from bntool.folding import plan_fold
from bntool.graph.inputs import Inputs
from bntool.observe.eager import observe
from bntool.surgery.fold_modules import apply_fold
from tests.laws.exactness import Chain, Numbers, data, numbers

UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
VIA_FLOAT32 = 1 + 2.0**-12
"""PyTorch casts float64 to a half type by way of float32, which rounds by 2⁻²⁴ first."""

STEPS: dict[str, Any] = {
    "at once": lambda x: x,
    "average pool": lambda x: F.avg_pool2d(x, 2),
    "adaptive pool": lambda x: F.adaptive_avg_pool2d(x, 3),
    "max pool": lambda x: F.max_pool2d(x, 2),
    "mean": lambda x: x.mean((2, 3), keepdim=True),
    "maximum": lambda x: x.amax((2, 3), keepdim=True),
    "upsampling": lambda x: F.interpolate(x, scale_factor=2),
    "padding": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "zeros": lambda x: F.pad(x, (1, 1, 1, 1)),
    "relu": F.relu,
    "cast": lambda x: x.double().to(x.dtype),
    "reshape": lambda x: x.flatten(2).unflatten(2, x.shape[2:]),
    "permute": lambda x: x.transpose(2, 3),
    "pixel shuffle": lambda x: F.pixel_shuffle(F.pixel_unshuffle(x, 2), 2),
    "channel shuffle": lambda x: F.channel_shuffle(x, 2),
    "slices and concat": lambda x: torch.cat([x[:, 2:], x[:, :2]], 1),
    "chunks": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "selects": lambda x: torch.cat([x.select(1, 3).unsqueeze(1), x[:, :3]], 1),
    "sum with a constant": lambda x: x + 0.5,
    "difference from a constant": lambda x: 0.5 - x,
    "factor": lambda x: x * 0.75,
    "sum": lambda x: x + x,
}


@pytest.mark.parametrize("step", STEPS)
@settings(max_examples=6)
@given(numbers, st.sampled_from([*UNIT]), st.sampled_from([torch.contiguous_format, torch.channels_last]))
def test_law_by_storage(step: str, fill: Numbers, dtype: torch.dtype, layout: torch.memory_format) -> None:
    norm = fill.fill(nn.BatchNorm2d(4))
    up = Chain(nn.Conv2d(3, 4, 1, bias=False), STEPS[step], norm)
    down = Chain(nn.Sequential(nn.Tanh(), copy.deepcopy(norm)), STEPS[step], nn.Conv2d(4, 2, 1))
    for net, channels in ((up, 3), (down, 4)):
        stored = net.to(dtype).to(memory_format=layout).eval()
        wide = copy.deepcopy(stored).double()
        image = data(2, channels, 6, 6, seed=fill.seed).to(dtype).to(memory_format=layout)
        plan = planned(stored, image)
        assert verdicts(plan) == verdicts(planned(wide, image.double()))
        folded, exact = apply_fold(stored, plan), dict(apply_fold(wide, plan).named_parameters())
        least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        strides = {name: parameter.stride() for name, parameter in stored.named_parameters()}
        for name, found in folded.named_parameters():
            assert found.dtype == dtype
            assert found.stride() == strides.get(name, found.stride())
            off = (found.double() - exact[name]).abs()
            assert bool((off <= VIA_FLOAT32 * UNIT[dtype] * exact[name].abs() + least).all())


def planned(model: nn.Module, image: torch.Tensor) -> Plan:
    return plan_fold(observe(model, Inputs((image,))).graph)


def verdicts(plan: Plan) -> list[tuple[str, str]]:
    """Where a float16 weight would overflow, float64 has nothing to refuse."""
    found = [(site.bn, "folded") for site in plan.fold_sites]
    return found + [(s.name, "folded" if s.reason == "overflow" else str(s.reason)) for s in plan.skips]
