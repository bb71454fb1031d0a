"""The summary of a model: one row per layer, exact totals, notes, and the change against a baseline."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from bntool.core.text import Lines, as_lines
from bntool.graph.inputs import Inputs
from bntool.report.counting import Counts, Owned, owned_by_module
from bntool.report.delta import Delta, compare_layers
from bntool.report.layers import Layer
from bntool.report.notes import Note, note_on_biases, notes_on_calls, notes_on_state
from bntool.report.shapes import Call, Calls, observe_calls
from bntool.report.tables import Column, Table, count, render, size, wrapped

_COLUMNS = (
    Column("Layer", flexible=True),
    Column("Name", flexible=True),
    Column("Input"),
    Column("Output"),
    Column("Trainable", number=True),
    Column("Frozen", number=True),
    Column("Buffers", number=True),
)


@dataclasses.dataclass(frozen=True)
class Summary:
    """A model's layers and totals. Prints itself as a table; `to_dict` has every figure."""

    model_class: str
    layers: tuple[Layer, ...]
    totals: Counts
    notes: tuple[Note, ...] = ()
    input_text: str = ""
    delta: Delta | None = None

    def to_dict(self) -> dict[str, Any]:
        document: dict[str, Any] = {
            "model_class": self.model_class,
            "layers": [layer.to_dict() for layer in self.layers],
            "totals": {"parameters": self.totals.parameters, **self.totals.to_dict()},
            "notes": [note.to_dict() for note in self.notes],
        }
        if self.delta is not None:
            document["delta"] = self.delta.to_dict()
        return document

    def __str__(self) -> str:
        return self.render()

    def render(self, width: int | None = None, *, verbose: bool = True) -> Lines:
        """The summary as plain text; `width` defaults to the terminal's, or 80 columns.

        Without `verbose` only the totals.
        """
        if not verbose:
            return as_lines(self._title(), *self._totals())
        parts = [self._title(), render(self._table(), width), "", *self._totals()]
        if self.notes:
            parts += ["", *(wrapped(f"note: {note}", width, indent=" " * 6) for note in self.notes)]
        if self.delta is not None:
            parts += ["", self.delta.render(width)]
        return as_lines(*parts)

    def _title(self) -> str:
        layers = "1 layer" if len(self.layers) == 1 else f"{len(self.layers)} layers"
        return f"{self.model_class}: {layers}" + (f", input {self.input_text}" if self.input_text else "")

    def _table(self) -> Table:
        totals = [count(n) for n in (self.totals.trainable, self.totals.frozen, self.totals.buffers)]
        lines = [*(layer.cells() for layer in self.layers), ["total", "", "", "", *totals]]
        return Table(_COLUMNS, lines[:-1], footer=lines[-1])

    def _totals(self) -> list[str]:
        figures = self.totals
        split = f"({count(figures.trainable)} trainable, {count(figures.frozen)} frozen)"
        return [
            f"parameters  {count(figures.parameters)} {split}",
            f"buffers     {count(figures.buffers)}",
            f"bytes       {count(figures.bytes)} ({size(figures.bytes)})",
        ]


def summarize(
    model: nn.Module,
    inputs: Inputs | None = None,
    *,
    baseline: nn.Module | Summary | None = None,
    idle_biases: Sequence[str] = (),
) -> Summary:
    """Summarise a model; with `inputs` also the shapes of one forward pass in eval mode.

    A row for each module that has no children or holds tensors of its own, in definition order.
    Tensors and modules that stand in several places count once, at the first. The model, its modes
    and the random state stay as they are. A forward pass that fails becomes a note. With a
    `baseline` the summary also tells what was added, removed and changed since. `idle_biases` names the
    layers whose bias a BatchNorm takes out again (`inserting.redundant_biases`).
    """
    modules = dict(model.named_modules())
    owned = owned_by_module(model)
    rows = [
        name
        for name, module in modules.items()
        if owned[name].counts or owned[name].tied or not any(True for _ in module.children())
    ]
    notes = [*notes_on_state(model, owned), *note_on_biases(idle_biases)]
    calls = Calls({})
    if inputs is not None:
        inputs = Inputs.of(inputs)
        calls = observe_calls(model, inputs)
        if calls.failure:
            notes.insert(0, Note(f"the forward pass failed, shapes end there: {calls.failure}"))
        else:
            holding = {name: modules[name] for name in rows if owned[name].counts}
            notes += notes_on_calls(holding, calls.by_name)
    layers = tuple(
        _layer(number, name, modules[name], owned[name], calls.by_name)
        for number, name in enumerate(rows, start=1)
    )
    if isinstance(baseline, nn.Module):
        baseline = summarize(baseline)
    totals = sum((layer.counts for layer in layers), Counts())
    return Summary(
        model_class=type(model).__name__,
        layers=layers,
        totals=totals,
        notes=tuple(notes),
        input_text=inputs.shapes() if inputs is not None else "",
        delta=compare_layers(baseline.layers, layers) if baseline is not None else None,
    )


def _layer(number: int, name: str, module: nn.Module, owned: Owned, calls: Mapping[str, Call]) -> Layer:
    call = calls.get(name) or Call(None, None, 0, 0, 0)
    return Layer(
        number=number,
        name=name,
        type=getattr(module, "original_name", type(module).__name__),  # TorchScript keeps the old name
        input_shape=call.input_shape,
        output_shape=call.output_shape,
        counts=owned.counts,
        own_shapes=owned.shapes,
        more_inputs=call.more_inputs,
        more_outputs=call.more_outputs,
    )
