"""Fold an `nn.Module`: what its own blocks can merge first, then every BatchNorm by the laws."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bntool.core.errors import ObserveError
from bntool.core.plan import Plan
from bntool.core.reasons import Reason
from bntool.core.sites import Edit, FoldSite
from bntool.folding import plan_fold, plan_on_all
from bntool.graph.dataflow import Graph
from bntool.graph.inputs import Inputs
from bntool.observe.biases import would_use_a_bias
from bntool.observe.copying import is_separable
from bntool.observe.eager import Observation, observe
from bntool.observe.inference import has_fixed_size
from bntool.observe.modules import signature_of
from bntool.observe.standing_in import set_modes
from bntool.surgery.fold_modules import apply_fold
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

    def carry_out(self) -> nn.Module:
        """The folded module, in eval mode; what a surgery does not touch it shares with the original."""
        return set_modes(apply_fold(self._merged, self._rest), training=False)


def plan_module_fold(
    model: nn.Module,
    observation: Observation,
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    merge: bool = True,
    thorough: bool = True,
    unshare: bool = False,
) -> PlannedFold:
    """Plan the fold of a module already observed.

    With `merge`, blocks that bring their own re-parameterisation are merged first, on a copy, and the rest
    is planned on what they leave; there the law merges branches. With `thorough` the model is observed a
    second time, on inputs of other sizes, and a fold counts only if it comes out the same; else only where
    it leads through a reshape or rests on a number of the forward's own. With `unshare` a layer is cloned
    for each call site that needs it changed.
    """
    choice = _Choice(tuple(include), tuple(exclude), unshare, merge)
    if unshare and _has_layers_of_several_names(model):
        observation = observe(model, observation.inputs, apart=True)
    plan = _settled(model, observation, choice, thorough)
    sites: list[FoldSite] = []
    merged = model
    # a block that has merged its branches may hold blocks that still can
    shapes = _shapes_read(observation.graph)
    while merge and (blocks := _fit(find_blocks(merged, shapes), plan)):
        sites += [site for block in blocks for site in _sites(block)]
        merged = with_blocks_merged(merged, blocks)
    if not sites:
        return PlannedFold(plan, model, plan)
    try:
        observed = observe(merged, observation.inputs, apart=unshare)
    except ObserveError:
        return PlannedFold(dataclasses.replace(plan, notes=(*plan.notes, _UNMERGED)), model, plan)
    rest = _settled(merged, observed, choice, thorough)
    whole = dataclasses.replace(
        rest, sites=(*sites, *rest.sites), signature=signature_of(model), model_class=plan.model_class
    )
    return PlannedFold(whole, merged, rest)


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


def _settled(model: nn.Module, observation: Observation, choice: _Choice, thorough: bool) -> Plan:
    """The plan of an observation, and of a second one too where that is asked for or needed."""
    options: dict[str, Any] = dataclasses.asdict(choice)
    biased = would_use_a_bias(model, observation)
    _note_biases(observation.graph, biased)
    plan = plan_fold(observation.graph, **options)
    if not plan or not (thorough or any(map(_rests_on_one_run, plan.fold_sites))):
        return plan
    for inputs in other_sizes(observation.inputs, fixed=has_fixed_size(model)):
        try:
            second = observe(model, inputs, apart=choice.unshare).graph
        except ObserveError:
            continue  # the model takes no such input, so its axes have no such size
        _note_biases(second, biased)
        return plan_on_all([observation.graph, second], first=plan, **options)
    return plan


def _note_biases(graph: Graph, layers: set[str]) -> None:
    for name in layers & graph.modules.keys():
        graph.modules[name].plain_bias = True


def _rests_on_one_run(site: FoldSite) -> bool:
    """Whether a fold leads through what may depend on a size, or uses a number that the forward made."""
    return not _BY_SIZE.isdisjoint(site.laws) or any(_has_number(edit.map) for edit in site.edits)


def _has_number(expr: Any) -> bool:
    return isinstance(expr, tuple) and (expr[:1] == ("number",) or any(map(_has_number, expr)))


def other_sizes(inputs: Inputs, *, fixed: bool = False) -> Iterator[Inputs]:
    """Inputs like these of other sizes, the most telling first: seeded values, one sample more.

    Longer by 33, so that even sides become odd (the depth of a volume or clip by one, for 3-d convolutions
    are dear); by 32, since many models take only such; a sequence (N, L, F) longer along L; other sides of
    the same area, for what a linear layer of a fixed width reads; then the old sides. The values spread more
    widely, so that a number read from them is another one. Only the number of samples changes for a model of
    `fixed` sides.
    """
    shapes: list[Callable[[Tensor], list[int]]] = []
    if not fixed:
        shapes += [functools.partial(_longer, more=33), functools.partial(_longer, more=32)]
        if any(tensor.dim() == 3 for tensor in inputs.tensors().values()):
            shapes.append(_longer_sequence)
        if any(_of_same_area(tensor) != list(tensor.shape) for tensor in inputs.tensors().values()):
            shapes.append(_of_same_area)
    for seed, shape_of in enumerate((*shapes, lambda tensor: list(tensor.shape))):
        generator = torch.Generator().manual_seed(seed)
        yield inputs.map(functools.partial(_drawn, shape_of=shape_of, generator=generator))


def _longer(tensor: Tensor, more: int) -> list[int]:
    samples, *rest = tensor.shape
    if not rest:
        return [samples]
    channels, *sides = rest
    grown = [side + more for side in sides]
    if len(sides) == 3 and more == 33:
        grown[0] = sides[0] + 1
    return [samples, channels, *grown]


def _longer_sequence(tensor: Tensor) -> list[int]:
    return [size + 33 if axis == 1 and tensor.dim() > 2 else size for axis, size in enumerate(tensor.shape)]


def _of_same_area(tensor: Tensor) -> list[int]:
    if tensor.dim() < 4:
        return list(tensor.shape)
    *rest, height, width = tensor.shape
    if height == width and height % 2 == 0:
        return [*rest, height // 2, 2 * width]
    return [*rest, width, height]


def _drawn(tensor: Tensor, shape_of: Callable[[Tensor], list[int]], generator: torch.Generator) -> Tensor:
    """Seeded numbers of the shape that is asked for, and one sample more."""
    if tensor.dim() < 2:
        return tensor
    samples, *rest = shape_of(tensor)
    shape = [samples + 1, *rest]
    if not tensor.is_floating_point():
        index = torch.randint(tensor.numel(), shape, generator=generator)
        return tensor.cpu().reshape(-1)[index].to(tensor.device)
    return (2.5 * torch.randn(shape, generator=generator) + 0.5).to(tensor)


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
