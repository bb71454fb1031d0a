"""A TorchScript module: folded by torch's own pass in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch

from bntool.core.errors import UsageError
from bntool.core.options import FoldOptions, InsertOptions
from bntool.core.plan import Plan
from bntool.core.sites import FoldSite
from bntool.core.verdicts import Check
from bntool.folding.untrained import note_on_untrained
from bntool.graph.dataflow import Graph
from bntool.graph.inputs import Inputs
from bntool.results.counting import parameter_delta
from bntool.subjects.base import Checking, Kind, Parameters
from bntool.subjects.script_folding import FoldedScript, check_script, fold_script


class ScriptSubject:
    """A TorchScript module, and an input that it takes, or what finds one."""

    kind: Kind = "script"
    files: tuple[Path, ...] = ()

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

    @property
    def runnable(self) -> torch.jit.ScriptModule:
        return self.model

    @functools.cached_property
    def pass_result(self) -> FoldedScript:
        """What torch's pass makes of it."""
        return fold_script(self.model)

    def graph(self) -> Graph:
        raise UsageError(f"{self.name} is TorchScript, whose graph bntool does not read")

    def example(self) -> Inputs | None:
        return self._inputs() if callable(self._inputs) else self._inputs

    def parameters(self, after: ScriptSubject) -> Parameters:
        return parameter_delta(self.model, after.model)

    def plan_fold(self, options: FoldOptions, *, thorough: bool = True) -> Plan:  # noqa: ARG002 - torch's pass
        """What the pass folds, without a map: it knows a BatchNorm right behind its convolution alone."""
        sites = tuple(FoldSite(name, (), ("conv",), ()) for name in self.pass_result.folded)
        found = self.pass_result
        notes = (note_on_untrained(found.untrained),) if found.untrained else ()
        return Plan("fold", sites, found.skips, options=options.to_dict(), notes=notes)

    def folded(self, plan: Plan) -> ScriptSubject:
        return ScriptSubject(self.pass_result.model, self._inputs, name=self.name) if plan else self

    def proof(self, checking: Checking) -> ScriptProof:
        return ScriptProof(self, checking)

    def plan_insert(self, options: InsertOptions) -> Plan:  # noqa: ARG002 - whatever they are
        raise UsageError(
            f"{self.name} is TorchScript, and bntool does not insert into it",
            next_step="torch.save the nn.Module that it was made from",
        )

    def inserted(self, options: InsertOptions) -> tuple[Plan, ScriptSubject]:
        return self.plan_insert(options), self

    def insert_rows(self, plan: Plan, after: ScriptSubject, checking: Checking) -> list[Check]:
        raise NotImplementedError


class ScriptProof:
    """Both modules in float64."""

    looks_elsewhere = True

    def __init__(self, subject: ScriptSubject, checking: Checking) -> None:
        self._subject, self._checking = subject, checking

    def rows(self, plan: Plan, after: ScriptSubject) -> list[Check]:  # noqa: ARG002 - a protocol's
        inputs = self._subject.example()
        if inputs is None:
            raise UsageError(
                "a TorchScript module needs an input to be checked on", next_step="pass example_inputs"
            )
        return [check_script(self._subject.pass_result, inputs, self._checking.inputs)]

    def agrees(self, plan: Plan) -> bool:
        """The pass folds all or nothing."""
        return not plan
