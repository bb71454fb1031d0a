"""A file of weights without its model: a plan made with the model folds it, one tensor at a time."""

from __future__ import annotations

import math
from pathlib import Path

from bntool.core.documents import Kind
from bntool.core.plan import Plan
from bntool.files.drafting import Drafts
from bntool.files.stored import Stored
from bntool.results.counting import Counts, delta_of
from bntool.results.summary import Summary, summarize_found
from bntool.results.tensor_layers import of_weights
from bntool.subjects.base import Parameters, Subject
from bntool.surgery.fold_stored import fold_stored


class WeightsSubject(Subject):
    """The weights of a file by name.

    Nothing can be run beside the original. So only what holds for any weights is carried out, and each map of
    a plan must be what its BatchNorm computes.

    Args:
        model: the weights; each is read when it is asked for.
        why: there is no model.
    """

    kind: Kind = "weights"
    on_torch = runs = False

    def __init__(self, model: Stored, *, why: str = "") -> None:
        self.model: Stored = model
        self.why = why
        self.name, self.files, self.suffix = str(model.path), model.files, model.suffix

    def counted(self) -> Summary:
        return summarize_found(of_weights(self.model.tensors), "weights", "weights")

    def parameters(self, after: WeightsSubject) -> Parameters:
        return delta_of(self._counts(), after._counts())

    def _counts(self) -> tuple[Counts, int]:
        """As far as names and shapes tell, and the biases of what is no normalisation."""
        held = self.model.tensors
        of_layers = (name for name in held if name.endswith(".weight") and held[name].shape[1:])
        biases = (held.get(f"{name.removesuffix('.weight')}.bias") for name in of_layers)
        return self.counted().totals, sum(math.prod(bias.shape) for bias in biases if bias is not None)

    def folded(self, plan: Plan) -> WeightsSubject:
        return WeightsSubject(fold_stored(self.model, plan))

    def replayed(self, plan: Plan, *, checked: bool) -> tuple[Plan, WeightsSubject]:
        return plan, self.folded(plan)

    def draft(self, path: Path, drafts: Drafts) -> str:
        return self.model.draft(path, drafts)
