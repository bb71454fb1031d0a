"""Fold an `nn.Module`: what its own blocks can merge first, then every BatchNorm by the laws."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import nn

from bntool.core.errors import ObserveError
from bntool.core.plan import Plan
from bntool.core.reasons import Reason
from bntool.core.sites import Edit, FoldSite
from bntool.folding import plan_fold, plan_on_all
from bntool.graph.dataflow import Graph
from bntool.observe.biases import would_use_a_bias
from bntool.observe.copying import is_separable
from bntool.observe.eager import Observation, observe
from bntool.observe.modules import signature_of
from bntool.observe.stand_in import set_modes
from bntool.subjects.elsewhere import Elsewhere
from bntool.surgery.fold_modules import Numbers, apply_exactly
from bntool.surgery.reparameterising import Block, find_blocks, with_blocks_merged

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

_BY_SIZE = frozenset({"reshape", "squeeze", "roll", "index_select"})
"""Ops that take numbers that models compute from sizes, and `squeeze`, which asks whether a size is one;
`flatten` and `unsqueeze` are told axes.
"""

_UNMERGED = "blocks keep their branches: the model does not run with its blocks merged"


@dataclasses.dataclass(frozen=True)
class PlannedFold:
    """The fold plan of a module, and how far it is carried out: blocks are merged while planning."""

    plan: Plan
    _merged: nn.Module
    _rest: Plan
    _blocks: tuple[Block, ...] = ()

    def carry_out(self) -> tuple[nn.Module, Numbers]:
        """The folded module, in eval mode, and its new numbers before they were rounded, where all are known.

        What a surgery does not touch it shares with the original.
        """
        folded, numbers = apply_exactly(self._merged, self._rest)
        of_blocks = dict(pair for block in self._blocks for pair in block.numbers())
        return set_modes(folded, training=False), {**of_blocks, **numbers}


def plan_module_fold(
    model: nn.Module,
    observation: Observation,
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    merge: bool = True,
    thorough: bool = True,
    unshare: bool = False,
    elsewhere: Elsewhere | None = None,
) -> PlannedFold:
    """Plan the fold of a module already observed.

    With `merge`, blocks that bring their own re-parameterisation are merged first, on a copy, and the rest
    is planned on what they leave; there the law merges branches. With `thorough` the model is observed a
    second time, on inputs of other sizes, and a fold counts only if it comes out the same; else only where
    it leads through a reshape or rests on a number of the forward's own. With `unshare` a layer is cloned
    for each call site that needs it changed. `elsewhere` looks at the model on other inputs.
    """
    choice = _Choice(tuple(include), tuple(exclude), unshare, merge)
    if unshare and _has_layers_of_several_names(model):
        observation, elsewhere = observe(model, observation.inputs, apart=True), None
    elsewhere = elsewhere or Elsewhere(model, observation, apart=unshare)
    plan = _settled(model, observation, choice, thorough, elsewhere)
    sites: list[FoldSite] = []
    done: list[Block] = []
    merged = model
    # a block that has merged its branches may hold blocks that still can
    shapes = _shapes_read(observation.graph)
    while merge and (blocks := _fit(find_blocks(merged, shapes), plan)):
        sites += [site for block in blocks for site in _sites(block)]
        merged = with_blocks_merged(merged, blocks)
        done += blocks
    if not sites:
        return PlannedFold(plan, model, plan)
    try:
        observed = observe(merged, observation.inputs, apart=unshare)
    except ObserveError:
        return PlannedFold(dataclasses.replace(plan, notes=(*plan.notes, _UNMERGED)), model, plan)
    rest = _settled(merged, observed, choice, thorough, Elsewhere(merged, observed, apart=unshare))
    whole = dataclasses.replace(
        rest, sites=(*sites, *rest.sites), signature=signature_of(model), model_class=plan.model_class
    )
    return PlannedFold(whole, merged, rest, tuple(done))


def _shapes_read(graph: Graph) -> dict[str, tuple[int, ...]]:
    """The shape of the one input of each module, where a tensor is its first."""
    first = {name: module.inputs[0] for name, module in graph.modules.items() if module.inputs}
    return {name: graph.values[value].shape for name, value in first.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class _Choice:
    """Which BatchNorms may go, and at what price."""

    include: tuple[str, ...]
    exclude: tuple[str, ...]
    unshare: bool
    merge: bool


def _has_layers_of_several_names(model: nn.Module) -> bool:
    names = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    return any(names[id(module)] > 1 and is_separable(module) for module in model.modules())


def _settled(
    model: nn.Module, observation: Observation, choice: _Choice, thorough: bool, elsewhere: Elsewhere
) -> Plan:
    """The plan of an observation, and of others too where that is asked for or needed."""
    options: dict[str, Any] = dataclasses.asdict(choice)
    biased = would_use_a_bias(model, observation)
    _note_biases(observation.graph, biased)
    plan = plan_fold(observation.graph, **options)
    if not plan:
        return plan
    others = elsewhere.other_paths()
    if thorough or any(map(_rests_on_one_run, plan.fold_sites)):
        others += elsewhere.graphs()
    for other in others:
        _note_biases(other, biased)
    return plan_on_all([observation.graph, *others], first=plan, **options) if others else plan


def _note_biases(graph: Graph, layers: set[str]) -> None:
    for name in layers & graph.modules.keys():
        graph.modules[name].plain_bias = True


def _rests_on_one_run(site: FoldSite) -> bool:
    """Whether a fold leads through what may depend on a size, or uses a number that the forward made."""
    return not _BY_SIZE.isdisjoint(site.laws) or any(_has_number(edit.map) for edit in site.edits)


def _has_number(expr: Any) -> bool:
    return isinstance(expr, tuple) and (expr[:1] == ("number",) or any(map(_has_number, expr)))


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
