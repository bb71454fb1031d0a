"""A TorchScript module: folded by torch's own pass in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from bntool.core.documents import Kind
from bntool.core.errors import UsageError
from bntool.core.options import ExportOptions, FoldOptions
from bntool.core.plan import Plan
from bntool.core.refusals import refused
from bntool.core.sites import FoldSite
from bntool.core.verdicts import Check
from bntool.folding.untrained import note_on_untrained
from bntool.graph.inputs import Inputs
from bntool.subjects.base import Checking, Subject
from bntool.subjects.module import ModuleSubject
from bntool.subjects.script_folding import FoldedScript, check_script, converted, fold_script
from bntool.verifying.blaming import Found


class ScriptSubject(Subject):
    """A TorchScript module, and an input that it takes, or what finds one."""

    kind: Kind = "script"

    def __init__(
        self,
        model: torch.jit.ScriptModule,
        inputs: Inputs | Callable[[], Inputs] | None = None,
        *,
        name: str = "",
    ) -> None:
        self.model = model
        self.name = name or str(model.original_name)
        self._inputs = inputs

    @functools.cached_property
    def pass_result(self) -> FoldedScript:
        """What torch's pass makes of it."""
        return fold_script(self.model)

    def example(self) -> Inputs | None:
        return self._inputs() if callable(self._inputs) else self._inputs

    def plan_fold(self, options: FoldOptions, *, thorough: bool = True) -> Plan:
        """What the pass folds, without a map: it knows a BatchNorm right behind its convolution alone."""
        sites = tuple(FoldSite(name, (), ("conv",), ()) for name in self.pass_result.folded)
        found = self.pass_result
        notes = (note_on_untrained(found.untrained),) if found.untrained else ()
        return Plan("fold", sites, found.skips, options=options.to_dict(), notes=notes)

    def folded(self, plan: Plan) -> ScriptSubject:
        return ScriptSubject(self.pass_result.model, self._inputs, name=self.name) if plan else self

    def proof(self, checking: Checking) -> ScriptProof:
        return ScriptProof(self, checking)

    def told(self, plan: Plan) -> Plan:
        return plan

    def replayed(self, plan: Plan, *, checked: bool) -> tuple[Plan, ScriptSubject]:
        raise refused(self.kind, "apply a plan to", self.name)

    def apart(self, after: Subject, proof: Any) -> Found | None:
        raise refused(self.kind, "look into", self.name)

    def exportable(self, how: ExportOptions) -> ModuleSubject:
        """A module that computes the same."""
        example = self.example()
        if example is None:
            raise UsageError(
                f"{self.name} says nothing of its input's shape", next_step="give --input N,C,H,W"
            )
        found = ModuleSubject(converted(self.model, example), example, name=self.name)
        found.files = self.files
        return found


class ScriptProof:
    """Both modules in float64."""

    looks_elsewhere = True

    def __init__(self, subject: ScriptSubject, checking: Checking) -> None:
        self._subject, self._checking = subject, checking

    def rows(self, plan: Plan, after: ScriptSubject) -> list[Check]:
        inputs = self._subject.example()
        if inputs is None:
            raise UsageError(
                "a TorchScript module needs an input to be checked on", next_step="pass example_inputs"
            )
        return [check_script(self._subject.pass_result, inputs, self._checking.inputs)]

    def agrees(self, plan: Plan) -> bool:
        """The pass folds all or nothing."""
        return not plan
