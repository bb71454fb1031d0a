"""Insert, then look again: every BatchNorm must be where the plan said, and nothing else may have moved.

Where a form broke the model (code that indexes a Sequential, say) the site takes its next form.
"""

from __future__ import annotations

import dataclasses
import functools
import glob
from collections.abc import Sequence

from torch import nn

from bntool.core.errors import CheckFailed, ObserveError, StateError
from bntool.core.plan import Plan
from bntool.core.sites import InsertSite
from bntool.core.tolerances import EXACT
from bntool.core.verdicts import Check
from bntool.graph.dataflow import Graph, Op
from bntool.graph.inputs import Inputs, outputs_of
from bntool.inserting import InsertOptions, activation_behind, ends_one, layer_before, plan_insert
from bntool.inserting.reaching import is_reached_into
from bntool.observe.eager import Observation, observe
from bntool.runtime.torch_runner import TorchRunner
from bntool.subjects.inserted_elsewhere import Elsewhere
from bntool.surgery.insert_modules import apply_insert
from bntool.verifying.checking import seeded_batches
from bntool.verifying.comparing import Outputs, compare
from bntool.verifying.reference import Reference

Outline = list[tuple[str, tuple[tuple[int, ...], ...]]]


def insert_observed(
    model: nn.Module, observation: Observation, options: InsertOptions
) -> tuple[Plan, nn.Module, Check | None]:
    """Plan, apply and observe again until every site holds.

    Returns the plan, the new model, and with `init="identity"` the check that the eval output is the
    same to the last bit (None where there is no site, or a bias moves, which rounds anew). Whatever the new
    BatchNorms start as, the forms are judged with ones that change nothing. Raises
    `StateError` for a model on the meta device.
    """
    if any(tensor.is_meta for tensor in observation.graph.tensors.values()):
        raise StateError(
            "the model is on the meta device: it has no numbers to keep",
            where=observation.graph.model_class,
            next_step="load its weights on a real device first",
        )
    notes: list[str] = []
    judge = _Judge(model, observation)
    while True:
        plan = plan_insert(observation.graph, options)
        indexed = [s for s in plan.insert_sites if s.form == "sequential" and is_reached_into(model, s.slot)]
        if indexed:
            options = _without(options, indexed)
            continue
        if not plan.sites:
            return plan, apply_insert(model, plan), None
        exact = _as_identities(plan)
        modified = apply_insert(model, exact)
        broken, check = judge.broken(exact, modified, options)
        if not broken:
            notes += [*judge.elsewhere.notes, *judge.elsewhere.mixed(plan)]
            if exact is not plan:
                modified, check = apply_insert(model, plan), None
            return dataclasses.replace(plan, notes=(*plan.notes, *notes)), modified, check
        if broken[0].form in ("pair", "subclass"):
            broken = _culprits(judge, options, broken)
        notes += [f"{s.conv}: form {s.form} changed the model; the next form was tried" for s in broken]
        options = _without(options, broken)


def _without(options: InsertOptions, sites: Sequence[InsertSite]) -> InsertOptions:
    """The options with the form of these sites banned for their layers."""
    banned = dict(options.banned)
    for site in sites:
        banned[site.conv] = banned.get(site.conv, frozenset()) | {site.form}
    return dataclasses.replace(options, banned=banned)


def _as_identities(plan: Plan) -> Plan:
    """The plan with new BatchNorms that change nothing and no bias moved: what its forms are judged by."""
    if plan.options["init"] != "default" and not plan.dropped:
        return plan
    return dataclasses.replace(plan, options={**plan.options, "init": "identity"}, dropped=())


class _Judge:
    """Which sites of an insertion broke the model: on its example, then on another size and in training."""

    def __init__(self, model: nn.Module, observation: Observation) -> None:
        self.model, self.observation = model, observation

    @functools.cached_property
    def elsewhere(self) -> Elsewhere:
        return Elsewhere(self.model, self.observation)

    def broken(
        self, plan: Plan, modified: nn.Module, options: InsertOptions
    ) -> tuple[list[InsertSite], Check | None]:
        """The sites whose form did not hold, and the check of the outputs where all did."""
        broken, check = self._on_the_example(plan, modified, options)
        if broken or not plan.sites:
            return broken, check
        moved = self.elsewhere.broken(plan, modified)
        return ([] if moved is None else moved or _suspects(list(plan.insert_sites))), check

    def _on_the_example(
        self, plan: Plan, modified: nn.Module, options: InsertOptions
    ) -> tuple[list[InsertSite], Check | None]:
        sites = list(plan.insert_sites)
        try:
            again = observe(modified, self.observation.inputs)
        except ObserveError:
            return _suspects(sites), None
        misplaced = [site for site in sites if not stands(again.graph, site, options)]
        if misplaced:
            return misplaced, None
        if outline(again.graph, without=sites) != outline(self.observation.graph):
            return _suspects(sites), None
        before = outputs_of(self.observation.output)
        try:
            after = outputs_of(again.output)
        except CheckFailed:  # code that looks for an activation by its class finds none, and returns nothing
            return _suspects(sites), None
        check = exactly([before], [after])
        return ([] if check.agrees else _suspects(sites)), check


def _culprits(judge: _Judge, options: InsertOptions, suspects: list[InsertSite]) -> list[InsertSite]:
    """Of sites that have no other form left, those that break the model without the others.

    Halved until they are alone; all of them where only together they break it.
    """
    if len(suspects) == 1:
        return suspects
    middle = len(suspects) // 2
    found: list[InsertSite] = []
    for half in (suspects[:middle], suspects[middle:]):
        names = tuple(glob.escape(site.conv) for site in half)
        alone = dataclasses.replace(options, include=names, exclude=(), every=1, skip_last=False)
        plan = _as_identities(plan_insert(judge.observation.graph, alone))
        if judge.broken(plan, apply_insert(judge.model, plan), alone)[0]:
            found += _culprits(judge, options, half)
    return found or suspects


def _suspects(sites: list[InsertSite]) -> list[InsertSite]:
    """Where the fault cannot be told: the sites of the most intrusive form in use that can be given up."""
    for form in ("sequential", "wrap", "identity", "pair", "subclass"):
        chosen = [site for site in sites if site.form == form]
        if chosen:
            return chosen
    return sites


def stands(graph: Graph, site: InsertSite, options: InsertOptions) -> bool:
    """Whether the site's BatchNorms alone read the layer, and feed the activation (or follow it)."""
    found = [[op for op in graph.of_kind("batch_norm") if op.scope == name] for name in site.norms]
    return all(len(ops) == 1 and _between(graph, ops[0], site, options) for ops in found)


def _between(graph: Graph, norm: Op, site: InsertSite, options: InsertOptions) -> bool:
    before = layer_before(graph, graph.input(norm), pooling=options.pooling)
    if before is None:
        return False
    if options.position == "after":
        return ends_one(before, site.activation_kind)
    after = activation_behind(graph, graph.output(norm), pooling=options.pooling)
    return before.kind in ("conv", "linear") and after == site.activation_kind


def outline(graph: Graph, *, without: Sequence[InsertSite] = ()) -> Outline:
    """Every op in order: its kind and the shapes it made; the BatchNorms of the given sites left out."""
    names = {name for site in without for name in site.norms}
    return [
        (op.kind, tuple(graph.values[v].shape for v in op.outputs))
        for op in graph.ops
        if op.kind != "batch_norm" or op.scope not in names
    ]


def check_unchanged(original: nn.Module, modified: nn.Module, example: Inputs, *, full: bool) -> Check:
    """Run both models in eval mode, with `full` on batches of 1, 2 and 3: equal to the last bit or failed."""
    inputs = seeded_batches(example) if full else [example]
    before = Reference(original, inputs)
    if [name for name, _ in original.named_children()] == [name for name, _ in modified.named_children()]:
        before = before.telling()
    after = TorchRunner(modified, parts=before.parts)
    return exactly(before.own, [after.run(i) for i in before.inputs])


def exactly(before: Sequence[Outputs], after: Sequence[Outputs]) -> Check:
    exact = {name: EXACT for outputs in before for name in outputs}
    device = next((t.device.type for t in before[0].values()), "cpu")
    return compare(before, after, exact, stage="insert", device=device, provider="torch")
