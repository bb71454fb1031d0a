"""Fold an `nn.Module`: what its own blocks can merge first, then every BatchNorm by the laws."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from bntool.errors import ObserveError
from bntool.folding import plan_fold, plan_on_all
from bntool.inputs import Inputs
from bntool.observe.eager import Observation, observe
from bntool.observe.modules import signature_of
from bntool.plan import Edit, FoldSite, Plan
from bntool.reasons import Reason
from bntool.surgery.fold_modules import apply_fold
from bntool.surgery.reparameterising import Block, find_blocks

_UNFIT = frozenset(
    {
        Reason.EXCLUDED,
        Reason.BATCH_STATISTICS,
        Reason.BAD_STATISTICS,
        Reason.HOOKED,
        Reason.CUSTOM_FORWARD,
        Reason.WEIGHT_COMPUTED,
    }
)
"""A BatchNorm with one of these must not go, whoever offers to take it."""


def plan_module_fold(
    model: nn.Module,
    observation: Observation,
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    merge: bool = True,
) -> Plan:
    """The fold plan of a module already observed.

    With `merge`, blocks that bring their own re-parameterisation are merged first, on a copy, and the rest
    is planned on what they leave.
    """
    plan = _settled(model, observation, include, exclude)
    sites: list[FoldSite] = []
    merged = model
    # a block that has merged its branches may hold blocks that still can
    while merge and (blocks := _fit(find_blocks(merged), plan)):
        sites += [site for block in blocks for site in _sites(block)]
        merged = apply_fold(model, dataclasses.replace(plan, sites=tuple(sites), skips=()))
    if not sites:
        return plan
    again = _settled(merged, observe(merged, observation.inputs), include, exclude)
    return dataclasses.replace(
        again, sites=(*sites, *again.sites), signature=signature_of(model), model_class=plan.model_class
    )


def _settled(
    model: nn.Module, observation: Observation, include: Sequence[str], exclude: Sequence[str]
) -> Plan:
    """The plan of an observation; where a fold leads through a reshape, of a second observation too."""
    plan = plan_fold(observation.graph, include=include, exclude=exclude)
    if not any("reshape" in site.laws for site in plan.fold_sites):
        return plan
    for inputs in _other_sizes(observation.inputs):
        try:
            second = observe(model, inputs).graph
        except ObserveError:
            continue  # the model takes no such input, so its axes have no such size
        return plan_on_all([observation.graph, second], include=include, exclude=exclude)
    return plan


def _other_sizes(inputs: Inputs) -> Iterator[Inputs]:
    """The inputs with other sizes: a larger batch and larger images; else a larger batch alone."""

    def larger(tensor: Tensor, spatial: int) -> Tensor:
        if tensor.dim() < 2:
            return tensor
        image = (n + spatial if i > 1 else n for i, n in enumerate(tensor.shape) if i)
        shape = (tensor.shape[0] + 1, *image)
        if tensor.is_floating_point():
            return torch.linspace(-1, 1, math.prod(shape), dtype=tensor.dtype, device=tensor.device).reshape(
                shape
            )
        return tensor.reshape(-1)[
            torch.arange(math.prod(shape), device=tensor.device) % tensor.numel()
        ].reshape(shape)

    for spatial in (32, 0):
        yield inputs.map(lambda tensor, spatial=spatial: larger(tensor, spatial))


def _fit(blocks: list[Block], plan: Plan) -> list[Block]:
    unfit = {skip.name for skip in plan.skips if skip.reason in _UNFIT}
    return [block for block in blocks if unfit.isdisjoint(block.norms)]


def _sites(block: Block) -> list[FoldSite]:
    """One site for each BatchNorm of the block; the first carries the edit."""
    edit = Edit("reparameterize", block.name, method=block.method)
    return [
        FoldSite(norm, (block.name,), (block.method,), (edit,) if i == 0 else ())
        for i, norm in enumerate(block.norms)
    ]
