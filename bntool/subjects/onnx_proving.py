"""Prove the fold of an ONNX file by running it: of several sizes, and with each branch of every If."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

from bntool.core.plan import Plan
from bntool.core.verdicts import Check
from bntool.subjects.base import Checking
from bntool.verifying.onnx_checking import OnnxReference

if TYPE_CHECKING:
    from bntool.subjects.onnx import OnnxSubject


class OnnxProof:
    """A file's own runs, of several sizes where it leaves axes open, and with each branch of every If."""

    looks_elsewhere = True

    def __init__(self, subject: OnnxSubject, checking: Checking) -> None:
        self._subject, self._checking = subject, checking

    @functools.cached_property
    def reference(self) -> OnnxReference:
        return self._reference_of(self._subject)

    @functools.cached_property
    def _branches(self) -> list[tuple[bool, OnnxSubject, OnnxReference]]:
        """The file with every If bound to one of its branches: a run takes one, and proves only that."""
        choices = (True, False) if self._subject.branches else ()
        bound = [(taken, self._subject.bound_to(taken)) for taken in choices]
        return [(taken, subject, self._reference_of(subject)) for taken, subject in bound]

    def rows(self, plan: Plan, after: OnnxSubject) -> list[Check]:
        rows = self._rows(self.reference, after)
        for taken, _, reference in self._branches:
            why = f"every If takes its {'then' if taken else 'else'} branch"
            found = self._rows(reference, after.bound_to(taken))
            rows += [dataclasses.replace(row, detail=f"{row.detail}; {why}") for row in found]
        return rows

    def agrees(self, plan: Plan) -> bool:
        return all(row.agrees for row in self.rows(plan, self._subject.folded(plan)))

    def _reference_of(self, subject: OnnxSubject) -> OnnxReference:
        nodes, *_ = subject.counts
        count = 3 if self._checking.full else 2
        return OnnxReference(
            subject.model,
            nodes,
            count=count,
            seed=self._checking.seed,
            shapes=self._subject.shapes,
            given=self._checking.inputs or self._subject.real,
        )

    def _rows(self, reference: OnnxReference, after: OnnxSubject) -> list[Check]:
        checking = self._checking
        return reference.checks(after.model, device=checking.onnx_device, tolerance=checking.tolerance)
