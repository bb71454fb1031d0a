"""Prove the fold of a module by running it: in float64, on inputs of sizes that the plan has not seen."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

from torch import nn

from bntool.core.errors import BntoolError
from bntool.core.plan import Plan
from bntool.core.verdicts import Check
from bntool.export.dynamic_axes import resized
from bntool.observe.inference import has_fixed_size
from bntool.observe.standing_in import own_copy, set_modes
from bntool.subjects.base import Checking
from bntool.subjects.module_folding import other_sizes
from bntool.surgery.fold_modules import apply_fold
from bntool.verifying.checking import check_surgery, seeded_batches
from bntool.verifying.reference import Reference

if TYPE_CHECKING:
    from bntool.graph.inputs import Inputs
    from bntool.subjects.module import ModuleSubject


class ModuleProof:
    """A module's own runs: on its example or batches of it, and in float64 on inputs of other sizes."""

    def __init__(self, model: nn.Module, example: Inputs, checking: Checking) -> None:
        self._model, self._example, self._checking = model, example, checking
        self._refused: list[str] = []

    @functools.cached_property
    def reference(self) -> Reference:
        """The original on the inputs that a candidate is compared on."""
        checking = self._checking
        inputs = seeded_batches(self._example, seed=checking.seed) if checking.full else [self._example]
        longer = {name: [axis for axis in axes if axis] for name, axes in checking.axes.items()}
        if any(longer.values()):  # by 32, which most strides divide
            inputs = [*inputs, resized(self._example, longer, by=32, seed=checking.seed)]
        return Reference(self._model, inputs)

    @functools.cached_property
    def elsewhere(self) -> Reference | None:
        """The original on an input of other sizes and one sample more, the first that it takes.

        None where it takes none, and where it does not run in float64: what is proved there is algebra.
        """
        for other in other_sizes(self._example, fixed=has_fixed_size(self._model)):
            found = Reference(self._model, [other])
            try:
                _ = found.own
            except BntoolError:
                self._refused.append(other.shapes())
                continue
            return found if found.exact is not None else None
        return None

    @property
    def _not_elsewhere(self) -> str:
        """Why there is no proof on other sizes; empty where there is one."""
        if self.elsewhere is not None:
            return ""
        if self.reference.exact is None:
            return "not proved on other sizes, since the model does not run in float64"
        return f"not proved on other sizes, since the model takes none of {'; '.join(self._refused)}"

    @property
    def looks_elsewhere(self) -> bool:
        return self.elsewhere is not None

    def rows(self, plan: Plan, after: ModuleSubject) -> list[Check]:
        checking = self._checking
        first, *more = self._compared(
            plan,
            after.model,
            self.reference,
            elsewhere=self.elsewhere,
            device=checking.torch_device,
            progress=checking.step,
            atol=checking.atol,
            rtol=checking.rtol,
        )
        detail = "; ".join(filter(None, (first.detail, self._not_elsewhere)))
        return [dataclasses.replace(first, detail=detail), *more]

    def agrees(self, plan: Plan) -> bool:
        reference = self.elsewhere or self.reference
        folded = set_modes(apply_fold(self._model, plan), training=False)
        return all(row.agrees for row in self._compared(plan, folded, reference))

    def _compared(self, plan: Plan, folded: nn.Module, reference: Reference, **how: Any) -> list[Check]:
        return check_surgery(
            self._model,
            folded,
            reference.inputs,
            stage="fold",
            candidate64=_folded_in_float64(self._model, plan),
            reference=reference,
            changed_parts=_changed_parts(self._model, plan),
            **how,
        )


def _folded_in_float64(model: nn.Module, plan: Plan) -> nn.Module | None:
    """The same fold redone on a float64 copy; None where a class refuses to be copied."""
    try:
        wide = own_copy(model).double()
    except Exception:  # noqa: BLE001 - a class may refuse in its own way
        return None
    return apply_fold(wide, plan)


def _changed_parts(model: nn.Module, plan: Plan) -> set[str]:
    """The children of the model whose output a fold may change: all that no fold is wholly inside of."""
    whole: set[str] = set()
    crossed: set[str] = set()
    for site in plan.fold_sites:
        homes = {name.partition(".")[0] for name in (site.bn, *site.into)}
        (whole if len(homes) == 1 else crossed).update(homes)
    return {name for name, _ in model.named_children()} - (whole - crossed)
