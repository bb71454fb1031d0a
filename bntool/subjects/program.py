"""An exported program: its own graph is planned on and edited; it runs as a module."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.export import ExportedProgram

from bntool.core.documents import Kind
from bntool.core.errors import CheckFailed, PlanError, UsageError
from bntool.core.options import ExportOptions, FoldOptions, InsertOptions
from bntool.core.plan import Plan
from bntool.core.verdicts import Check
from bntool.folding import at_graph_level, plan_on_all
from bntool.graph.dataflow import Graph
from bntool.graph.inputs import Inputs
from bntool.inserting import plan_insert_nodes
from bntool.observe.exported_program import ProgramObservation, observe_program
from bntool.results.graph_layers import of_program
from bntool.results.summary import Summary, summarize_found
from bntool.runtime.programs import RunnableProgram, drawn_inputs, example_inputs_of
from bntool.subjects.base import Checking, Subject
from bntool.subjects.insertion import check_unchanged
from bntool.subjects.replanning import replanned_fold
from bntool.surgery.fold_program import apply_fold_program, in_float64
from bntool.surgery.insert_program import apply_insert_program
from bntool.verifying.algebra import Redone
from bntool.verifying.checking import check_surgery
from bntool.verifying.reference import Reference

if TYPE_CHECKING:
    from bntool.export.exporting import ExportResult


class ProgramSubject(Subject):
    """A program, and its graph.

    Args:
        program: the program.
        example_inputs: what it is run on; without, the inputs that it keeps, or drawn ones of its shapes.
        name: how the user calls it.
        seed: of drawn inputs.
    """

    kind: Kind = "program"

    def __init__(
        self, program: ExportedProgram, example_inputs: Any = None, *, name: str = "program", seed: int = 0
    ) -> None:
        self.model = program
        self.name = name
        self.given = None if example_inputs is None else Inputs.of(example_inputs)
        self._seed = seed

    @functools.cached_property
    def observed(self) -> ProgramObservation:
        return observe_program(self.model)

    @functools.cached_property
    def runnable(self) -> RunnableProgram:
        return RunnableProgram(self.model)

    def graph(self) -> Graph:
        return self.observed.graph

    def example(self) -> Inputs:
        return self.given or example_inputs_of(self.model, self._seed)

    def run_on(self, real: Sequence[Inputs]) -> None:
        self.given = real[0]

    def counted(self) -> Summary:
        return summarize_found(of_program(self.observed), "ExportedProgram", "program")

    def plan_fold(self, options: FoldOptions, *, thorough: bool = True) -> Plan:
        """Where an axis has no fixed size, a fold counts only if it is the same for two sets of sizes."""
        other = [observe_program(self.model, sizes=1).graph] if self.observed.open else []
        plan = plan_on_all(
            [self.observed.graph, *other],
            include=options.include,
            exclude=options.exclude,
            merge=options.merge,
            unshare=bool(options.unshare),
        )
        return at_graph_level(plan, self.observed.hidden)

    def folded(self, plan: Plan) -> ProgramSubject:
        return self._like(apply_fold_program(self.observed, plan))

    def proof(self, checking: Checking) -> ProgramProof:
        return ProgramProof(self, checking)

    def plan_insert(self, options: InsertOptions) -> Plan:
        if options.init != "identity":
            raise UsageError("a program takes identity-initialised BatchNorms only")
        return plan_insert_nodes(self.observed.graph, options)

    def inserted(self, options: InsertOptions) -> tuple[Plan, ProgramSubject]:
        plan = self.plan_insert(options)
        return plan, self._like(apply_insert_program(self.observed, plan)) if plan else self

    def insert_rows(self, plan: Plan, after: ProgramSubject, checking: Checking) -> list[Check]:
        row = check_unchanged(self.runnable, after.runnable, checking.batches_of(self.example()))
        if not row.agrees:
            raise CheckFailed("the insertion changes the output", next_step="please report this program")
        return [row]

    def export(self, path: Path, how: ExportOptions, metadata: Mapping[str, str]) -> ExportResult:
        from bntool.export.exporting import export_program

        return export_program(self.model, self.example(), path, how, metadata=metadata)

    def _like(self, program: ExportedProgram) -> ProgramSubject:
        return ProgramSubject(program, self.given, name=self.name, seed=self._seed)


class ProgramProof:
    """A program's own runs, in its own precision and in float64."""

    looks_elsewhere = True

    def __init__(self, subject: ProgramSubject, checking: Checking) -> None:
        self._subject, self._checking = subject, checking

    @functools.cached_property
    def reference(self) -> Reference:
        subject, checking = self._subject, self._checking
        first = subject.example()
        inputs = checking.batches_of(first)
        if checking.full and not checking.inputs:
            inputs = [first, *inputs]
        if subject.observed.open and subject.given is None:
            inputs.append(drawn_inputs(subject.model, 1))
        return Reference(subject.runnable, inputs)

    @functools.cached_property
    def _wide(self) -> ProgramSubject:
        return ProgramSubject(in_float64(self._subject.model))

    def rows(self, plan: Plan, after: ProgramSubject) -> list[Check]:
        return check_surgery(
            self.reference,
            after.runnable,
            stage="fold",
            redone=Redone(self._folded_in_float64(plan).runnable),
            how=dataclasses.replace(self._checking.on_torch(), device="cpu"),
        )

    def agrees(self, plan: Plan) -> bool:
        return all(row.agrees for row in self.rows(plan, self._subject.folded(plan)))

    def _folded_in_float64(self, plan: Plan) -> ProgramSubject:
        """The same fold planned and done again on the float64 program: constants differ in their digits."""
        try:
            return self._wide.folded(replanned_fold(self._wide, plan))
        except PlanError as error:
            raise CheckFailed("the fold does not come out the same in float64") from error
