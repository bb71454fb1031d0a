"""Prove the fold of a module by running it: in float64, on inputs of sizes that the plan has not seen."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from bntool.core.plan import Plan
from bntool.core.verdicts import Check
from bntool.export.dynamic_axes import resized
from bntool.observe.eager import Observation
from bntool.observe.stand_in import set_modes
from bntool.subjects.base import Checking
from bntool.subjects.elsewhere import Elsewhere, sides_of
from bntool.surgery.fold_modules import Numbers, apply_exactly, apply_fold
from bntool.verifying.algebra import Redone
from bntool.verifying.checking import check_surgery
from bntool.verifying.conditions import DEFAULT, Conditions
from bntool.verifying.float64 import Unrounded
from bntool.verifying.reference import Reference

if TYPE_CHECKING:
    from bntool.subjects.module import ModuleSubject


class ModuleProof:
    """A module's own runs: on its example or batches of it, and in float64 on inputs of other sizes.

    Args:
        model: the original.
        observation: what its example showed.
        checking: how much is run, and where.
        elsewhere: looks at the model on other inputs.
    """

    def __init__(
        self,
        model: nn.Module,
        observation: Observation,
        checking: Checking,
        elsewhere: Elsewhere | None = None,
    ) -> None:
        self._model, self._observation, self._checking = model, observation, checking
        self._elsewhere = elsewhere or Elsewhere(model, observation)

    @functools.cached_property
    def reference(self) -> Reference:
        """The original on the inputs that a candidate is compared on."""
        checking, example = self._checking, self._observation.inputs
        inputs = checking.batches_of(example)
        longer = {name: [axis for axis in axes if axis] for name, axes in checking.axes.items()}
        if any(longer.values()):  # by 32, which most strides divide
            inputs = [*inputs, resized(example, longer, by=32, seed=checking.seed)]
        alone = len(inputs) == 1 and inputs[0] is example
        ran = _own_runs([self._observation]) if alone else None
        return Reference(self._model, inputs, ran=ran, floor=self._floor)

    @functools.cached_property
    def elsewhere(self) -> Reference | None:
        """The original on inputs of other sizes, and on one sample more.

        None where it takes none, and where it does not run in float64: what is proved there is algebra.
        """
        small = self._elsewhere.seen.small
        if small is None:
            return None
        one_tells = self._elsewhere.is_telling and not self._checking.full
        beside = () if one_tells else self._elsewhere.besides()
        found = Reference(self._model, [small.inputs], ran=_own_runs([small]), beside=beside)
        return found if found.exact is not None else None

    @property
    def _floor(self) -> Reference | None:
        return self.elsewhere if self._elsewhere.seen.covers else None

    @functools.cached_property
    def _with_long(self) -> Reference:
        """The reference, and an input longer than the example where the model does things by size."""
        long, found = self._elsewhere.seen.long, self.reference
        if long is None:
            return found
        ran = _own_runs([long])
        both = None if ran is None else [*found.own, *ran]
        return Reference(self._model, [*found.inputs, long.inputs], ran=both, floor=self._floor)

    @property
    def _remark(self) -> str:
        """What is not proved elsewhere, and why; empty where all is."""
        elsewhere = self.elsewhere
        if elsewhere is None and self.reference.exact is None:
            return "not proved on other sizes, since the model does not run in float64"
        own = sides_of(self._observation.inputs)
        if elsewhere is not None and any(sides_of(inputs) != own for inputs, _ in elsewhere.algebra):
            return ""
        untaken = self._elsewhere.untaken
        why = f"takes none of {'; '.join(untaken)}" if untaken else "says that it takes one size alone"
        return f"not proved on other sizes, since the model {why}"

    @property
    def looks_elsewhere(self) -> bool:
        return self.elsewhere is not None

    def rows(self, plan: Plan, after: ModuleSubject) -> list[Check]:
        first, *more = self._compared(
            plan, after.model, after.numbers, self._with_long, self._checking.on_torch()
        )
        detail = "; ".join(filter(None, (first.detail, self._remark)))
        return [dataclasses.replace(first, detail=detail), *more]

    def agrees(self, plan: Plan) -> bool:
        folded, numbers = apply_exactly(self._model, plan)
        set_modes(folded, training=False)
        references = [self.elsewhere or self.reference]
        if self._with_long is not self.reference:
            references.append(self._with_long)
        return all(row.agrees for one in references for row in self._compared(plan, folded, numbers, one))

    def _compared(
        self,
        plan: Plan,
        folded: nn.Module,
        numbers: Numbers,
        reference: Reference,
        how: Conditions | None = None,
    ) -> list[Check]:
        """The rows of a fold; where it is told how, the algebra is proved elsewhere, if there is any."""
        wide = Unrounded(folded, numbers, lambda: apply_fold(self._model, plan, wide=True))
        return check_surgery(
            reference,
            folded,
            stage="fold",
            redone=Redone(wide, self.elsewhere if how is not None else None),
            changed_parts=_changed_parts(self._model, plan),
            how=how or DEFAULT,
        )


def _own_runs(seen: Sequence[Observation]) -> list[dict[str, Tensor]] | None:
    """What observations returned, where they ran as a runner would; else None."""
    found = [one.returned for one in seen if one.returned is not None]
    return found if len(found) == len(seen) else None


def _changed_parts(model: nn.Module, plan: Plan) -> set[str]:
    """The children of the model whose output a fold may change: all that no fold is wholly inside of."""
    whole: set[str] = set()
    crossed: set[str] = set()
    cuts = [(site.bn, *site.into) for site in plan.fold_sites]
    for names in (*cuts, *((merge.layer, *merge.values) for merge in plan.merges)):
        homes = {name.partition(".")[0] for name in names}
        (whole if len(homes) == 1 else crossed).update(homes)
    return {name for name, _ in model.named_children()} - (whole - crossed)
