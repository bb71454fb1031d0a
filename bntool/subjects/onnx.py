"""An ONNX file: its own graph is planned on and edited; it runs in ONNX Runtime."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from bntool.core.documents import Kind
from bntool.core.errors import CheckFailed, InvariantError, UsageError
from bntool.core.options import ExportOptions, FoldOptions, InsertOptions
from bntool.core.plan import Plan
from bntool.core.refusals import KINDS
from bntool.core.verdicts import Check
from bntool.files.drafting import Drafts, Scratch
from bntool.files.onnx_files import OnnxFile, open_onnx, put_onnx, require_opset, save_onnx
from bntool.files.onnx_forms import take_off_inputs
from bntool.folding import at_graph_level, plan_on_all
from bntool.graph.dataflow import Graph
from bntool.graph.inputs import Inputs
from bntool.inserting import plan_insert_nodes
from bntool.observe.onnx_model import OnnxObservation, observe_onnx
from bntool.observe.onnx_nodes import stored_tensors
from bntool.observe.onnx_shapes import asked_shapes
from bntool.results.counting import Counts, delta_of
from bntool.results.graph_layers import of_onnx
from bntool.results.summary import Summary, summarize_found
from bntool.runtime.onnx_inputs import first_runs
from bntool.runtime.onnx_sizes import SeenSizes
from bntool.subjects.base import Checking, Parameters, Subject
from bntool.subjects.onnx_proving import OnnxProof
from bntool.surgery.fold_onnx import apply_fold_onnx
from bntool.surgery.insert_onnx import apply_insert_onnx
from bntool.surgery.onnx_wiring import bind_branches
from bntool.verifying.blaming import Found, blame_files
from bntool.verifying.onnx_checking import check_onnx_unchanged, opened
from bntool.verifying.onnx_verifying import seeded_file_inputs

if TYPE_CHECKING:
    from bntool.export.exporting import ExportResult

Shapes = Mapping[str, Sequence[int | None]]


class OnnxSubject(Subject):
    """A file, and where new files are made from it.

    Args:
        path: the file.
        folder: an existing folder for what is made; without, one that is gone with the last of them.
        data: a file of its own with the numbers, where it has one.
        name: how the user calls it.
        shapes: of inputs, by name, where the user said on what it is to be run.
        real: inputs of the user's own, by name, of which it is read and on which it is checked.
    """

    kind: Kind = "onnx"
    suffix = ".onnx"
    on_torch = False

    def __init__(
        self,
        path: str | Path,
        *,
        folder: Path | Scratch | None = None,
        data: Path | None = None,
        name: str = "",
        shapes: Shapes | None = None,
        real: Sequence[Inputs] = (),
    ) -> None:
        self.model, self.may_run, self.freeze = Path(path), True, False
        self.data = data
        self.name = name or str(path)
        self._file: OnnxFile | None = open_onnx(path)
        self.files = self._file.files
        self.asked = shapes or {}
        self.real: Sequence[Inputs] = ()
        self.run_on(real)
        self._told = asked_shapes(self._file.model)
        self._folder = folder or Scratch()
        self._observed: OnnxObservation | None = None

    def read_as(self, *, run: bool = True, freeze: bool = False) -> None:
        """`run`: it may be run to see sizes that inference cannot tell; `freeze`: inputs that have a default
        are constants.
        """
        self.may_run, self.freeze = run, freeze
        self._file = self._observed = None

    def run_on(self, real: Sequence[Inputs]) -> None:
        """Inputs of the user's own take the place of drawn ones."""
        if real:
            self.real = real
            self.asked = {name: list(t.shape) for name, t in real[0].tensors().items()}
            self._observed = None

    def take(self, example_inputs: Any) -> None:
        """Inputs as everywhere, by the names of the file's or in their order. Raises `UsageError`."""
        given, names = Inputs.of(example_inputs), self.input_names
        held = given.tensors()
        if not set(names) <= held.keys():
            if len(names) != len(held):
                raise UsageError(
                    f"{len(held)} input(s) are given, and the file takes {', '.join(names)}", where=self.name
                )
            held = dict(zip(names, held.values(), strict=True))
        self.run_on([Inputs((), {name: held[name] for name in names}, given.origin)])

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
            drawn = first_runs(opened(self.model, self.shapes), 2, shapes=self.shapes).inputs
            return [*self.real[:1], *drawn[1:]] if self.real else drawn

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
        """One that it takes, of several batches where it leaves that axis open."""
        return self.real[0] if self.real else seeded_file_inputs(self.model, (batch,), seed, self.shapes)[0]

    def batched(self, seed: int = 0) -> Callable[[int], Inputs | None]:
        return super().batched(seed) if self.real else lambda batch: self.example(batch, seed)

    def counted(self) -> Summary:
        return summarize_found(of_onnx(self.observed), "ONNX", "onnx")

    def parameters(self, after: OnnxSubject) -> Parameters:
        """All numbers of a file are counted as frozen: nothing in it says which of them are trained."""
        (_, old, old_bytes), (_, new, new_bytes) = self.counts, after.counts
        return delta_of((Counts(frozen=old, bytes=old_bytes), 0), (Counts(frozen=new, bytes=new_bytes), 0))

    def exportable(self, how: ExportOptions) -> OnnxSubject:
        if how.opset is None:
            raise UsageError(
                f"{self.name} is {KINDS['onnx']} already",
                next_step=f"bntool export {self.name} --opset 17 converts it to another opset",
            )
        return self

    def export(self, path: Path, how: ExportOptions, metadata: Mapping[str, str]) -> ExportResult:
        """Convert it to the opset that is asked for, into a new file."""
        from bntool.export.exporting import Form, written
        from bntool.export.onnx_converting import converted

        if how.opset is None:
            raise InvariantError("no opset was asked for, which was told before")
        return written(converted(self.model, how.opset, how.ir_version), Form(path, how, metadata))

    def plan_fold(self, options: FoldOptions, *, thorough: bool = True) -> Plan:
        """Where an axis has no fixed size, a fold counts only if it is the same for two sets of sizes."""
        require_opset(self.file.model, self.name)
        plan, self._observed = plan_fold_onnx(
            self.file.model,
            include=options.include,
            exclude=options.exclude,
            merge=options.merge,
            unshare=options.unshare is not False,  # nobody trains a file, so nothing is tied for good
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
        require_opset(self.file.model, self.name)
        return plan_insert_nodes(self.observed.graph, options)

    def inserted(self, options: InsertOptions) -> tuple[Plan, OnnxSubject]:
        plan = self.plan_insert(options)
        if not plan:
            return plan, self
        _ = self.counts
        file, observed = self._taken()
        plan = apply_insert_onnx(observed, plan)
        return plan, self._written(file)

    def insert_rows(self, plan: Plan, after: OnnxSubject, checking: Checking) -> list[Check]:
        batches = (1, 2, 3) if checking.full else (1,)
        inputs = self.real or seeded_file_inputs(self.model, batches, checking.seed, self.shapes)
        row = check_onnx_unchanged(self.model, after.model, inputs)
        if not row.agrees:
            raise CheckFailed(
                f"the new file differs by {row.max_abs:.3g}",
                where=f"output {row.worst[0]}",
                next_step="please report this file",
            )
        return [row]

    def apart(self, after: Subject, proof: Any) -> Found | None:
        return blame_files(self.model, after.model, [self.example()])

    def draft(self, path: Path, drafts: Drafts) -> str:
        put_onnx(self.model, self.data, path, drafts)
        return ""

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

    def working_in(self, folder: Callable[[], Path]) -> OnnxSubject:
        """The same, where new files are made in the folder that this makes."""
        return self._at(self.model, None, folder(), freeze=self.freeze)

    def _at(
        self, path: Path, data: Path | None, folder: Path | Scratch, *, freeze: bool = False
    ) -> OnnxSubject:
        made = OnnxSubject(path, folder=folder, data=data, name=self.name, shapes=self.asked, real=self.real)
        made.read_as(run=self.may_run, freeze=freeze)
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
