"""An ONNX file: its own graph is planned on and edited; it runs in ONNX Runtime."""

from __future__ import annotations

import dataclasses
import functools
import shlex
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from bntool.core.errors import CheckFailed, InvariantError, LoadError
from bntool.core.options import ExportOptions, FoldOptions, InsertOptions
from bntool.core.plan import Plan
from bntool.core.verdicts import Check
from bntool.files.onnx_files import OnnxFile, open_onnx, save_onnx
from bntool.files.onnx_forms import take_off_inputs
from bntool.folding import at_graph_level, plan_on_all
from bntool.graph.dataflow import Graph
from bntool.graph.inputs import Inputs
from bntool.inserting import plan_insert_nodes
from bntool.observe.onnx_model import OnnxObservation, observe_onnx
from bntool.observe.onnx_nodes import stored_tensors
from bntool.observe.onnx_shapes import asked_shapes
from bntool.runtime.onnx_inputs import first_runs
from bntool.runtime.onnx_sizes import SeenSizes
from bntool.subjects.base import Checking, Kind, Parameters
from bntool.surgery.fold_onnx import apply_fold_onnx
from bntool.surgery.insert_onnx import apply_insert_onnx
from bntool.surgery.onnx_wiring import bind_branches
from bntool.verifying.onnx_checking import OnnxReference, check_onnx_unchanged, example_inputs_of, opened

if TYPE_CHECKING:
    from bntool.export.exporting import ExportResult

LEAST_OPSET = 7
Shapes = Mapping[str, Sequence[int | None]]


class Scratch:
    """A folder that is made when it is first asked for, and is gone with the last who holds this object."""

    @functools.cached_property
    def path(self) -> Path:
        folder = tempfile.TemporaryDirectory(prefix="bntool.")
        weakref.finalize(self, folder.cleanup)
        return Path(folder.name)


class OnnxSubject:
    """A file, and where new files are made from it.

    Args:
        path: the file.
        folder: an existing folder for what is made; without, one that is gone with the last of them.
        data: a file of its own with the numbers, where it has one.
        name: how the user calls it.
        shapes: of inputs, by name, where the user said on what it is to be run.
    """

    kind: Kind = "onnx"

    def __init__(
        self,
        path: str | Path,
        *,
        folder: Path | Scratch | None = None,
        data: Path | None = None,
        name: str = "",
        shapes: Shapes | None = None,
    ) -> None:
        self.model, self.may_run, self.freeze = Path(path), True, False
        self.data = data
        self.name = name or str(path)
        self._file: OnnxFile | None = open_onnx(path)
        self.files = self._file.files
        self.asked = shapes or {}
        self._told = asked_shapes(self._file.model)
        self._folder = folder or Scratch()
        self._observed: OnnxObservation | None = None

    def read_as(self, *, run: bool = True, freeze: bool = False) -> None:
        """`run`: it may be run to see sizes that inference cannot tell; `freeze`: inputs that have a default
        are constants.
        """
        self.may_run, self.freeze = run, freeze
        self._file = self._observed = None

    @property
    def runnable(self) -> None:
        """Torch does not run it."""

    @property
    def file(self) -> OnnxFile:
        """The file as it stands on the disk; read anew once it was changed in memory."""
        if self._file is None:
            self._file = open_onnx(self.model)
            if self.freeze:
                take_off_inputs(self._file.model)
        return self._file

    @property
    def shapes(self) -> Shapes:
        """Of inputs, as the user asked, or as the layers that read them do."""
        return {**self._told, **self.asked}

    @property
    def input_names(self) -> list[str]:
        """What a caller must give it."""
        graph = self.file.model.graph
        return [str(v.name) for v in graph.inputs if v.name not in graph.initializers]

    @property
    def observed(self) -> OnnxObservation:
        if self._observed is None:
            self._observed = observe_onnx(self.file.model, seen=self._seen())
        return self._observed

    def _seen(self) -> SeenSizes | None:
        def inputs() -> list[Inputs]:
            return first_runs(opened(self.model, self.shapes), 2, shapes=self.shapes).inputs

        return SeenSizes(self.file.model, inputs, asked=bool(self.asked)) if self.may_run else None

    @functools.cached_property
    def counts(self) -> tuple[int, int, int]:
        """Nodes, numbers in all stored tensors, and their bytes."""
        held = [tensor for _, tensor in stored_tensors(self.file.model).values()]
        nodes = sum(1 for _ in self.file.model.graph.all_nodes())
        return nodes, sum(tensor.size for tensor in held), sum(tensor.nbytes for tensor in held)

    def graph(self) -> Graph:
        return self.observed.graph

    def example(self, batch: int = 1, seed: int = 0) -> Inputs:
        return example_inputs_of(self.model, batch, seed, self.shapes)

    def parameters(self, after: OnnxSubject) -> Parameters:
        """All numbers of a file are counted as frozen: nothing in it says which of them are trained."""
        (_, old, old_bytes), (_, new, new_bytes) = self.counts, after.counts
        none = {"trainable": 0, "buffers": 0}
        return {
            "before": {**none, "frozen": old, "bytes": old_bytes},
            "after": {**none, "frozen": new, "bytes": new_bytes},
            "delta": {**none, "frozen": new - old, "bytes": new_bytes - old_bytes, "conv_bias": 0},
        }

    def _require_opset(self) -> None:
        """Older ops broadcast, and normalise, by rules of their own. Raises `LoadError`."""
        opset = self.file.model.opset_imports.get("", LEAST_OPSET)
        if opset < LEAST_OPSET:
            raise LoadError(
                f"it is written in opset {opset}, and bntool changes files of opset {LEAST_OPSET} or later",
                where=self.name,
                next_step=f"bntool export {shlex.quote(self.name)} --opset 17 converts it",
            )

    def export(self, path: Path, how: ExportOptions, metadata: Mapping[str, str]) -> ExportResult:
        """Convert it to the opset that is asked for, into a new file."""
        from bntool.export.exporting import Form, written
        from bntool.export.onnx_converting import converted

        if how.opset is None:
            raise InvariantError("no opset was asked for, which was told before")
        return written(converted(self.model, how.opset, how.ir_version), Form(path, how, metadata))

    def plan_fold(self, options: FoldOptions, *, thorough: bool = True) -> Plan:  # noqa: ARG002 - costs nothing
        """Where an axis has no fixed size, a fold counts only if it is the same for two sets of sizes."""
        self._require_opset()
        plan, self._observed = plan_fold_onnx(
            self.file.model,
            include=options.include,
            exclude=options.exclude,
            merge=options.merge,
            unshare=options.unshare,
            seen=self._seen(),
        )
        return plan

    def folded(self, plan: Plan) -> OnnxSubject:
        _ = self.counts  # of the file as it is, before it is changed in memory
        file, observed = self._taken()
        apply_fold_onnx(observed, plan)
        return self._written(file)

    def proof(self, checking: Checking) -> OnnxProof:
        return OnnxProof(self, checking)

    def plan_insert(self, options: InsertOptions) -> Plan:
        self._require_opset()
        return plan_insert_nodes(self.observed.graph, options)

    def inserted(self, options: InsertOptions) -> tuple[Plan, OnnxSubject]:
        plan = self.plan_insert(options)
        if not plan:
            return plan, self
        _ = self.counts
        file, observed = self._taken()
        plan = apply_insert_onnx(observed, plan)
        return plan, self._written(file)

    def insert_rows(self, plan: Plan, after: OnnxSubject, checking: Checking) -> list[Check]:  # noqa: ARG002
        inputs = [self.example(batch, checking.seed) for batch in ((1, 2, 3) if checking.full else (1,))]
        row = check_onnx_unchanged(self.model, after.model, inputs)
        if not row.agrees:
            raise CheckFailed(
                f"the new file differs by {row.max_abs:.3g}",
                where=f"output {row.worst[0]}",
                next_step="please report this file",
            )
        return [row]

    @property
    def branches(self) -> bool:
        """Whether some op of it runs one of two bodies."""
        return any(node.op_type == "If" for node in self.file.model.graph.all_nodes())

    def bound_to(self, taken: bool) -> OnnxSubject:
        """The same file with every If bound to its then-branch, or to its else-branch."""
        file = open_onnx(self.model)
        bind_branches(file.model, taken=taken)
        scratch = Scratch()
        path, data = save_onnx(file, scratch.path / "bound.onnx")
        return self._at(path, data, scratch)

    def _at(self, path: Path, data: Path | None, folder: Path | Scratch) -> OnnxSubject:
        made = OnnxSubject(path, folder=folder, data=data, name=self.name, shapes=self.asked)
        made.read_as(run=self.may_run)
        return made

    def _taken(self) -> tuple[OnnxFile, OnnxObservation]:
        """The file and its observation, which are changed now and no longer what stands on the disk."""
        found = self.file, self.observed
        self._file = self._observed = None
        return found

    def _written(self, file: OnnxFile) -> OnnxSubject:
        folder = self._folder if isinstance(self._folder, Path) else self._folder.path
        path, data = save_onnx(file, folder / self.model.name, force=True)
        return self._at(path, data, self._folder)


def plan_fold_onnx(
    model: ir.Model,
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    merge: bool = True,
    unshare: bool = False,
    seen: SeenSizes | None = None,
) -> tuple[Plan, OnnxObservation]:
    """A verdict for every BatchNorm of the model, and the observation it was planned on.

    Where an axis has no fixed size, a fold counts only if it comes out the same for two sets of sizes.
    `seen` tells of sizes that only runs of the model show.
    """
    observed = observe_onnx(model, seen=seen)
    graphs = [observed.graph, *([observe_onnx(model, 1, seen).graph] if observed.open else [])]
    plan = plan_on_all(graphs, include=include, exclude=exclude, merge=merge, unshare=unshare)
    return at_graph_level(plan, observed.hidden), observed


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

    def rows(self, plan: Plan, after: OnnxSubject) -> list[Check]:  # noqa: ARG002 - a protocol's
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
            subject.model, nodes, count=count, seed=self._checking.seed, shapes=self._subject.shapes
        )

    def _rows(self, reference: OnnxReference, after: OnnxSubject) -> list[Check]:
        checking = self._checking
        return reference.checks(after.model, device=checking.onnx_device, tolerance=checking.tolerance)
