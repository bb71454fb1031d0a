"""Fold an `nn.Module`: what its own blocks can merge first, then every BatchNorm by the laws."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import nn

from bntool.folding import plan_fold
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
    plan = plan_fold(observation.graph, include=include, exclude=exclude)
    sites: list[FoldSite] = []
    merged = model
    # a block that has merged its branches may hold blocks that still can
    while merge and (blocks := _fit(find_blocks(merged), plan)):
        sites += [site for block in blocks for site in _sites(block)]
        merged = apply_fold(model, dataclasses.replace(plan, sites=tuple(sites), skips=()))
    if not sites:
        return plan
    again = plan_fold(observe(merged, observation.inputs).graph, include=include, exclude=exclude)
    return dataclasses.replace(
        again, sites=(*sites, *again.sites), signature=signature_of(model), model_class=plan.model_class
    )


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
