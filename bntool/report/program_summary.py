"""The summary of an exported program: one row per stored tensor, exact totals, and its BatchNorms."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn
from torch.export import ExportedProgram

from bntool.core.text import Lines, as_lines
from bntool.observe.exported_program import observe_program
from bntool.report.tables import Column, Table, count, render, shape_text, size

if TYPE_CHECKING:
    from bntool.observe.onnx_model import OnnxObservation

_COLUMNS = (
    Column("Tensor", flexible=True),
    Column("Kind"),
    Column("Shape"),
    Column("Type"),
    Column("Numbers", True),
)
Kind = Literal["trainable", "frozen", "buffer", "constant"]


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A parameter (`trainable` or `frozen`), a buffer or a constant of a program, by qualified name."""

    name: str
    kind: Kind
    shape: tuple[int, ...]
    dtype: str
    elements: int
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "shape": list(self.shape)}


@dataclasses.dataclass(frozen=True)
class ProgramSummary:
    """The tensors of a program, each storage counted once, and how many BatchNorms its graph has."""

    tensors: tuple[StoredTensor, ...]
    batch_norms: int
    model_class: str = "ExportedProgram"
    title: str = "exported program"

    def totals(self) -> dict[str, int]:
        counted = dict.fromkeys(("trainable", "frozen", "buffer", "constant"), 0)
        for tensor in self.tensors:
            counted[tensor.kind] += tensor.elements
        return {
            "parameters": counted["trainable"] + counted["frozen"],
            "trainable": counted["trainable"],
            "frozen": counted["frozen"],
            "buffers": counted["buffer"],
            "constants": counted["constant"],
            "bytes": sum(tensor.bytes for tensor in self.tensors),
        }

    def to_dict(self) -> dict[str, Any]:
        return {
            "model_class": self.model_class,
            "tensors": [tensor.to_dict() for tensor in self.tensors],
            "totals": self.totals(),
            "batch_norms": self.batch_norms,
        }

    def __str__(self) -> str:
        return self.render()

    def render(self, width: int | None = None, *, verbose: bool = True) -> Lines:
        """The summary as plain text; without `verbose` only the totals."""
        totals = self.totals()
        parts = f"{count(totals['trainable'])} trainable, {count(totals['frozen'])} frozen"
        lines = [
            f"parameters  {count(totals['parameters'])} ({parts})",
            f"buffers     {count(totals['buffers'])}",
            f"constants   {count(totals['constants'])}",
            f"memory      {size(totals['bytes'])}",
            f"BatchNorms  {count(self.batch_norms)}",
        ]
        if not verbose:
            return as_lines(*lines)
        rows = [[t.name, t.kind, shape_text(t.shape), t.dtype, count(t.elements)] for t in self.tensors]
        return as_lines(render(Table(_COLUMNS, rows, self.title), width), "", *lines)


def summarize_program(program: ExportedProgram) -> ProgramSummary:
    """Count a program's tensors and BatchNorms, those in a control-flow operator included."""
    observed = observe_program(program)
    buffers = set(program.graph_signature.buffers)
    seen: set[int] = set()
    tensors = []
    for name, value in {**program.state_dict, **program.constants}.items():
        if not isinstance(value, Tensor):
            continue
        # A tied tensor has several names and is counted under the first.
        again = id(value) in seen
        seen.add(id(value))
        kind: Kind = "buffer" if name in buffers else "constant"
        if isinstance(value, nn.Parameter):
            kind = "trainable" if value.requires_grad else "frozen"
        elements = 0 if again else value.numel()
        dtype = str(value.dtype).removeprefix("torch.")
        shape = tuple(int(n) for n in value.shape)
        tensors.append(StoredTensor(name, kind, shape, dtype, elements, elements * value.element_size()))
    return ProgramSummary(tuple(tensors), len(observed.norms) + len(observed.hidden))


def summarize_onnx(observed: OnnxObservation) -> ProgramSummary:
    """Count a file's initializers and BatchNormalizations, those in a body or a function included."""
    found = observed.model.graph.initializers
    tensors = [
        StoredTensor(
            name, "constant", tuple(t.shape.numpy()), t.dtype.name.lower(), int(t.size), int(t.nbytes)
        )
        for name, t in ((name, value.const_value) for name, value in found.items())
        if t is not None
    ]
    norms = len(observed.norms) + len(observed.hidden)
    return ProgramSummary(tuple(tensors), norms, "ONNX", "ONNX file")
