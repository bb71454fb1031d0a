"""An ONNX file: its own graph is planned on and edited; it runs in ONNX Runtime."""

from __future__ import annotations

import functools
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from bntool.core.errors import CheckFailed
from bntool.core.options import FoldOptions, InsertOptions
from bntool.core.plan import Plan
from bntool.core.verdicts import Check
from bntool.files.onnx_files import OnnxFile, open_onnx, save_onnx
from bntool.folding import at_graph_level, plan_on_all
from bntool.graph.dataflow import Graph
from bntool.graph.inputs import Inputs
from bntool.inserting import plan_insert_nodes
from bntool.observe.onnx_model import OnnxObservation, observe_onnx
from bntool.subjects.base import Checking, Kind, Parameters
from bntool.surgery.fold_onnx import apply_fold_onnx
from bntool.surgery.insert_onnx import apply_insert_onnx
from bntool.verifying.onnx_checking import OnnxReference, check_onnx_unchanged, example_inputs_of


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
    """

    kind: Kind = "onnx"

    def __init__(
        self,
        path: str | Path,
        *,
        folder: Path | Scratch | None = None,
        data: Path | None = None,
        name: str = "",
    ) -> None:
        self.model = Path(path)
        self.data = data
        self.name = name or str(path)
        self._file: OnnxFile | None = open_onnx(path)
        self.files = self._file.files
        self._folder = folder or Scratch()
        self._observed: OnnxObservation | None = None

    @property
    def runnable(self) -> None:
        """Torch does not run it."""

    @property
    def file(self) -> OnnxFile:
        """The file as it stands on the disk; read anew once it was changed in memory."""
        if self._file is None:
            self._file = open_onnx(self.model)
        return self._file

    @property
    def observed(self) -> OnnxObservation:
        if self._observed is None:
            self._observed = observe_onnx(self.file.model)
        return self._observed

    @functools.cached_property
    def counts(self) -> tuple[int, int, int]:
        """Nodes, numbers in all initializers, and their bytes."""
        tensors = [v.const_value for v in self.file.model.graph.initializers.values()]
        held = [tensor for tensor in tensors if tensor is not None]
        nodes = sum(1 for _ in self.file.model.graph)
        return nodes, sum(tensor.size for tensor in held), sum(tensor.nbytes for tensor in held)

    def graph(self) -> Graph:
        return self.observed.graph

    def example(self, batch: int = 1, seed: int = 0) -> Inputs:
        return example_inputs_of(self.model, batch, seed)

    def parameters(self, after: OnnxSubject) -> Parameters:
        """All numbers of a file are counted as frozen: nothing in it says which of them are trained."""
        (_, old, old_bytes), (_, new, new_bytes) = self.counts, after.counts
        none = {"trainable": 0, "buffers": 0}
        return {
            "before": {**none, "frozen": old, "bytes": old_bytes},
            "after": {**none, "frozen": new, "bytes": new_bytes},
            "delta": {**none, "frozen": new - old, "bytes": new_bytes - old_bytes, "conv_bias": 0},
        }

    def plan_fold(self, options: FoldOptions, *, thorough: bool = True) -> Plan:  # noqa: ARG002 - costs nothing
        """Where an axis has no fixed size, a fold counts only if it is the same for two sets of sizes."""
        plan, self._observed = plan_fold_onnx(
            self.file.model,
            include=options.include,
            exclude=options.exclude,
            merge=options.merge,
            unshare=options.unshare,
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
        return plan_insert_nodes(self.observed.graph, options)

    def inserted(self, options: InsertOptions) -> tuple[Plan, OnnxSubject]:
        plan = self.plan_insert(options)
        if not plan:
            return plan, self
        _ = self.counts
        file, observed = self._taken()
        apply_insert_onnx(observed, plan)
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

    def _taken(self) -> tuple[OnnxFile, OnnxObservation]:
        """The file and its observation, which are changed now and no longer what stands on the disk."""
        found = self.file, self.observed
        self._file = self._observed = None
        return found

    def _written(self, file: OnnxFile) -> OnnxSubject:
        folder = self._folder if isinstance(self._folder, Path) else self._folder.path
        path, data = save_onnx(file, folder / self.model.name, force=True)
        return OnnxSubject(path, folder=self._folder, data=data, name=self.name)


def plan_fold_onnx(
    model: ir.Model,
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    merge: bool = True,
    unshare: bool = False,
) -> tuple[Plan, OnnxObservation]:
    """A verdict for every BatchNorm of the model, and the observation it was planned on.

    Where an axis has no fixed size, a fold counts only if it comes out the same for two sets of sizes.
    """
    observed = observe_onnx(model)
    graphs = [observed.graph, *([observe_onnx(model, sizes=1).graph] if observed.open else [])]
    plan = plan_on_all(graphs, include=include, exclude=exclude, merge=merge, unshare=unshare)
    return at_graph_level(plan, observed.hidden), observed


class OnnxProof:
    """A file's own runs, of several sizes where it leaves axes open."""

    looks_elsewhere = True

    def __init__(self, subject: OnnxSubject, checking: Checking) -> None:
        self._subject, self._checking = subject, checking

    @functools.cached_property
    def reference(self) -> OnnxReference:
        nodes, *_ = self._subject.counts
        count = 3 if self._checking.full else 2
        return OnnxReference(self._subject.model, nodes, count=count, seed=self._checking.seed)

    def rows(self, plan: Plan, after: OnnxSubject) -> list[Check]:  # noqa: ARG002 - a protocol's
        return self.reference.checks(
            after.model, device=self._checking.onnx_device, atol=self._checking.atol, rtol=self._checking.rtol
        )

    def agrees(self, plan: Plan) -> bool:
        return all(row.agrees for row in self.rows(plan, self._subject.folded(plan)))
