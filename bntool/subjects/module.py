"""An `nn.Module`: observed by running it, folded and inserted into as a copy that shares what stays."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from bntool.core.documents import Kind
from bntool.core.errors import CheckFailed
from bntool.core.options import ExportOptions, FoldOptions, InsertOptions
from bntool.core.plan import Plan
from bntool.core.reasons import Reason
from bntool.core.refusals import unknown
from bntool.core.verdicts import Check
from bntool.graph.dataflow import Graph
from bntool.graph.inputs import Inputs
from bntool.inserting import plan_insert, require_same_places
from bntool.observe.copying import structural_copy
from bntool.observe.eager import Observation, observe
from bntool.observe.inference import observe_inferred
from bntool.observe.modules import class_name, signature_of
from bntool.observe.stand_in import set_modes
from bntool.observe.wrappers import REWRAP, gathers_gradients
from bntool.subjects.base import Checking, Subject
from bntool.subjects.elsewhere import Elsewhere
from bntool.subjects.insertion import check_unchanged, insert_observed
from bntool.subjects.module_folding import PlannedFold, plan_module_fold
from bntool.subjects.proving import ModuleProof
from bntool.surgery.baking import note_on, with_plain_weights
from bntool.surgery.fold_modules import Numbers, apply_exactly, with_own_tensors
from bntool.surgery.replaying import replay_fold, replay_insert
from bntool.verifying.checking import check_surgery
from bntool.verifying.reference import Reference

if TYPE_CHECKING:
    from bntool.export.exporting import ExportResult


class ModuleSubject(Subject):
    """A module, and what was seen when it ran.

    Args:
        model: the module.
        example_inputs: what it is run on; without, inputs are inferred from its first layer.
        name: how the user calls it.
        observed: gives an observation that somebody else made, or makes.
        small: whether an inferred image is a small one, where the model takes it.
    """

    kind: Kind = "module"

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any = None,
        *,
        name: str = "",
        observed: Callable[[], Observation] | None = None,
        small: bool = True,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise unknown(model)
        self.model = model
        self.name = name or type(model).__name__
        self._given = example_inputs
        self._observed = observed
        self._small = small
        self._baked_from: nn.Module | None = None
        self._baked: tuple[str, ...] = ()
        self._planned: PlannedFold | None = None
        self.numbers: Numbers = {}
        self._unchanged: Check | None = None

    @functools.cached_property
    def observation(self) -> Observation:
        if self._observed is not None:
            return self._observed()
        if self._given is None:
            return observe_inferred(self.model, small=self._small)
        return observe(self.model, Inputs.of(self._given))

    @functools.cached_property
    def elsewhere(self) -> Elsewhere:
        """The module on other inputs than its example."""
        return Elsewhere(self.model, self.observation)

    def graph(self) -> Graph:
        return self.observation.graph

    def example(self) -> Inputs:
        return self.observation.inputs if self._given is None else Inputs.of(self._given)

    def plan_fold(self, options: FoldOptions, *, thorough: bool) -> Plan:
        self._planned = plan_module_fold(
            self.model,
            self.observation,
            include=options.include,
            exclude=options.exclude,
            merge=options.merge,
            unshare=bool(options.unshare),
            thorough=thorough,
            elsewhere=self.elsewhere,
        )
        if self._planned.plan and gathers_gradients(self.model):
            told = dataclasses.replace(self._planned.plan, notes=(*self._planned.plan.notes, REWRAP))
            self._planned = dataclasses.replace(self._planned, plan=told)
        if self._baked_from is not None:
            told = self._with_baked(self._planned.plan, self._baked_from)
            self._planned = dataclasses.replace(self._planned, plan=told)
        return self._planned.plan

    def _with_baked(self, plan: Plan, original: nn.Module) -> Plan:
        """The plan as one for the model as it was, which tells the layers to store their weights first."""
        return dataclasses.replace(
            plan,
            notes=(note_on(self._baked), *plan.notes),
            options={**plan.options, "bake": list(self._baked)},
            signature=signature_of(original),
        )

    def prepared(self, options: FoldOptions) -> ModuleSubject:
        if not options.bake:
            return self
        model, names = with_plain_weights(self.model, self.graph())
        if not names:
            return self
        plain = self.like(model)
        plain._baked_from, plain._baked = self.model, names
        rows = check_surgery(Reference(self.model, [self.example()]), model, stage="fold")
        if not all(row.agrees for row in rows):
            raise CheckFailed(
                "with plain weights the output is not the same", next_step="fold without --bake"
            )
        return plain

    def only_in_a_graph(self, options: FoldOptions) -> frozenset[Reason]:
        """What a module tree cannot express the exported graph may.

        A functional BatchNorm is no part of the tree, the one of an identity branch reads what others read,
        and a layer that is called twice from one place cannot be two.
        """
        found = {Reason.FUNCTIONAL}
        if options.merge:
            found |= {Reason.OUTPUT_USED_ELSEWHERE, Reason.REACHES_INPUT}
        if options.unshare:
            found |= {Reason.CALLED_MORE_THAN_ONCE, Reason.WEIGHT_SHARED}
        return frozenset(found)

    def folded(self, plan: Plan) -> ModuleSubject:
        if self._planned is not None and self._planned.plan is plan:
            folded, numbers = self._planned.carry_out()
        else:
            folded, numbers = apply_exactly(self.model, plan)
        after = self.like(set_modes(folded, training=False))
        after.numbers = numbers
        return after

    def proof(self, checking: Checking) -> ModuleProof:
        return ModuleProof(self.model, self.observation, checking, self.elsewhere)

    def plan_insert(self, options: InsertOptions) -> Plan:
        return plan_insert(self.graph(), options)

    def inserted(self, options: InsertOptions) -> tuple[Plan, ModuleSubject]:
        plan, model, self._unchanged = insert_observed(self.model, self.observation, options)
        return plan, self.like(model)

    def insert_rows(self, plan: Plan, after: ModuleSubject, checking: Checking) -> list[Check]:
        inputs = self.observation.inputs
        if plan.options.get("init") == "identity" and not plan.dropped:
            seen = None if checking.full or checking.inputs else self._unchanged
            rows = [seen or check_unchanged(self.model, after.model, checking.batches_of(inputs))]
        else:
            # a layer whose bias has moved returns something else, as it should
            moved = {dropped.conv.partition(".")[0] for dropped in plan.dropped}
            rows = check_surgery(
                Reference(self.model, checking.batches_of(inputs)),
                after.model,
                stage="insert",
                changed_parts=moved,
            )
        if not all(row.agrees for row in rows):
            raise CheckFailed("the insertion changes the output", next_step="please report this model")
        return rows

    def replayed(self, plan: Plan, *, checked: bool) -> tuple[Plan, ModuleSubject]:
        model = self.model
        plan.require_signature(signature_of(model), class_name(type(model)))
        if plan.action == "insert" and checked and plan:
            require_same_places(self.graph(), plan)
        replay = replay_insert if plan.action == "insert" else replay_fold
        return plan, ModuleSubject(replay(model, plan), name=self.name)

    def export(self, path: Path, how: ExportOptions, metadata: Mapping[str, str]) -> ExportResult:
        from bntool.export.exporting import export_onnx

        return export_onnx(
            self.model,
            self.example(),
            path,
            how,
            metadata=metadata,
            force=True,  # a draft, which a first try may have left
        )

    def owned(self, model: nn.Module, *, share: bool) -> nn.Module:
        if model is self.model:
            model = set_modes(structural_copy(model), training=False)
        return model if share else with_own_tensors(model, self.model)

    def like(self, model: nn.Module) -> ModuleSubject:
        """Another model on the same inputs."""
        return ModuleSubject(model, self.example(), name=self.name)
