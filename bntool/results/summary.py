"""The summary of a model: one row per layer, exact totals, notes, and the change against a baseline."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from bntool.core.command_options import ViewOptions
from bntool.core.showing import Part, Said, Shown, count, counted, megabytes, shape_text
from bntool.core.text import Lines
from bntool.graph.inputs import Inputs
from bntool.observe.modules import is_batch_norm_class
from bntool.results.counting import Counts, Owned, owned_by_module
from bntool.results.delta import Delta, compare_layers
from bntool.results.layers import Layer, table_of, total
from bntool.results.notes import Note, note_on_biases, notes_on_calls, notes_on_state
from bntool.results.tables import text_of
from bntool.results.tensor_layers import Found, StoredTensor
from bntool.results.walking import Call, Calls, observe_calls


@dataclasses.dataclass(frozen=True)
class Summary(Shown):
    """A model's layers and totals, whatever its kind. Prints itself as a table; `to_dict` has every figure.

    `rows` are all modules in definition order, containers too; `layers` those that hold tensors or no other
    module, less every `nn.Identity`, as a fold leaves them. `tensors` are those of what is no module;
    `failure` is why the forward pass did not end. `view` says what of it is shown.
    """

    model_class: str
    rows: tuple[Layer, ...]
    totals: Counts
    notes: tuple[Note, ...] = ()
    input_text: str = ""
    delta: Delta | None = None
    kind: str = "module"
    input_bytes: int | None = None
    batch_norms: int = 0
    failure: str = ""
    tensors: tuple[StoredTensor, ...] = ()
    view: ViewOptions = dataclasses.field(default_factory=ViewOptions)

    @property
    def layers(self) -> tuple[Layer, ...]:
        return tuple(row for row in self.rows if not row.container)

    @property
    def mult_adds(self) -> int | None:
        return total(*(row.mult_adds for row in self.layers))

    @property
    def memory(self) -> dict[str, int | None]:
        """Bytes of the input, of what the layers with parameters give on, of parameters and of buffers."""
        buffers = sum(row.buffer_bytes for row in self.layers)
        parts = {
            "input": self.input_bytes,
            "activations": total(*(row.output_bytes for row in self.layers)),
            "parameters": self.totals.bytes - buffers,
            "buffers": buffers,
        }
        return {**parts, "whole": total(*parts.values())}

    def to_dict(self) -> dict[str, Any]:
        document: dict[str, Any] = {
            "model_class": self.model_class,
            "layers": [layer.to_dict() for layer in self.layers],
            "tensors": [tensor.to_dict() for tensor in self.tensors],
            "totals": {
                "parameters": self.totals.parameters,
                **self.totals.to_dict(),
                "constants": sum(t.elements for t in self.tensors if t.kind == "constant"),
                "mult_adds": self.mult_adds,
                **{f"{name}_bytes": held for name, held in self.memory.items()},
            },
            "batch_norms": self.batch_norms,
            "notes": [note.to_dict() for note in self.notes],
        }
        if self.delta is not None:
            document["delta"] = self.delta.to_dict()
        return document

    def seen(self, **view: Any) -> Summary:
        """The same with other columns, depth, order or form; `UsageError` for what there is not."""
        chosen = dataclasses.replace(self.view, **view)
        chosen.validate()
        return dataclasses.replace(self, view=chosen)

    def __str__(self) -> str:
        return self.render()

    def render(self, width: int | None = None, *, verbose: bool = True) -> Lines:
        """The summary as plain text, made to fit a `width` or the terminal; without `verbose` the totals."""
        return text_of(self.parts(verbose=verbose), width)

    def parts(self, *, verbose: bool = True) -> Sequence[Part]:
        if not verbose:
            return [self._title(), *self._totals()]
        parts: list[Part] = [self._title(), table_of(self.rows, self.view), "", *self._totals()]
        if self.notes:
            parts += ["", *(Said(f"note: {note}", " " * 6) for note in self.notes)]
        if self.delta is not None:
            parts += ["", *self.delta.parts()]
        return parts

    def _title(self) -> str:
        given = f", input {self.input_text}" if self.input_text else ""
        return f"{self.model_class}: {counted(len(self.layers), 'layer')}{given}"

    def _totals(self) -> list[str]:
        figures, memory = self.totals, self.memory
        split = f"({count(figures.trainable)} trainable, {count(figures.frozen)} frozen)"
        lines = [
            f"parameters  {count(figures.parameters)} {split}",
            f"buffers     {count(figures.buffers)}",
        ]
        if self.mult_adds is not None:
            lines.append(f"mult-adds   {count(self.mult_adds)}")
        parts = {name: held for name, held in memory.items() if held is not None}
        whole = parts.pop("whole")
        lines.append(f"memory      {megabytes(whole)}")
        return lines + [f"  {name:<12}{megabytes(held):>14}" for name, held in parts.items()]


def summarize(
    model: nn.Module,
    inputs: Inputs | None = None,
    *,
    baseline: nn.Module | Summary | None = None,
    idle_biases: Sequence[str] = (),
    calls: Calls | None = None,
) -> Summary:
    """Summarise a module; with `inputs` also the shapes and costs of one forward pass in eval mode.

    A row for each module, in definition order. Tensors and modules that stand in several places count once,
    at the first. The model, its modes and the random state stay as they are. A forward pass that fails
    becomes a note.

    Args:
        model: the module.
        inputs: what it is run on.
        baseline: the summary also tells what was added, removed and changed since.
        idle_biases: the layers whose bias a BatchNorm takes out again (`inserting.redundant_biases`).
        calls: of a forward pass on these inputs that was made already.
    """
    modules = dict(model.named_modules())
    owned = owned_by_module(model)
    notes = [*notes_on_state(model, owned), *note_on_biases(idle_biases)]
    if inputs is not None:
        inputs = Inputs.of(inputs)
        calls = calls or observe_calls(model, inputs)
    seen = calls or Calls({})
    rows = _rows(modules, owned, seen)
    if seen.gave_up:
        notes.insert(0, Note(f"mult-adds and activations are left out, torchinfo gave up: {seen.gave_up}"))
    if seen.failure:
        place = f" in {seen.failed_in}" if seen.failed_in else ""
        notes.insert(0, Note(f"the forward pass failed{place}, shapes end there: {seen.failure}"))
    elif calls is not None:
        holding = {row.name: modules[row.name] for row in rows if owned[row.name].counts}
        notes += notes_on_calls(holding, seen.by_name)
    found = Summary(
        model_class=getattr(model, "original_name", type(model).__name__),
        rows=rows,
        totals=sum((row.counts for row in rows), Counts()),
        notes=tuple(notes),
        input_text=inputs.shapes() if inputs is not None else "",
        input_bytes=seen.input_bytes if calls is not None else None,
        failure=seen.failure,
        batch_norms=sum(map(_is_norm, modules.values())),
    )
    return found if baseline is None else since(found, baseline)


def summarize_found(found: Found, model_class: str, kind: str) -> Summary:
    """Summarise what is no module, by what was found in it."""
    return Summary(
        model_class=model_class,
        rows=found.layers,
        totals=sum((row.counts for row in found.layers), Counts()),
        notes=tuple(Note(text) for text in found.notes),
        input_text=", ".join(map(shape_text, found.input_shapes)),
        kind=kind,
        input_bytes=found.input_bytes,
        batch_norms=found.batch_norms,
        tensors=found.tensors,
    )


def since(found: Summary, baseline: nn.Module | Summary) -> Summary:
    """The summary with what was added, removed and changed since another model, of whatever kind."""
    before = baseline if isinstance(baseline, Summary) else summarize(baseline)
    alike = before.kind == found.kind
    delta = compare_layers(before.layers, found.layers, alike=alike)
    said = (
        () if alike else (Note("the two are of different kinds: all parameters are compared as trainable"),)
    )
    return dataclasses.replace(found, delta=delta, notes=(*found.notes, *said))


def _rows(modules: Mapping[str, nn.Module], owned: Mapping[str, Owned], calls: Calls) -> tuple[Layer, ...]:
    rows, number = [], 0
    for name, module in modules.items():
        own, call = owned[name], calls.by_name.get(name)
        container = not (own.counts or own.tied) and _only_holds(module)
        number += not container
        seen = call or Call()
        costs = call is not None and not container and not calls.gave_up
        rows.append(
            Layer(
                number=0 if container else number,
                name=name,
                type=getattr(
                    module, "original_name", type(module).__name__
                ),  # TorchScript keeps the old name
                input_shape=seen.input_shape,
                output_shape=seen.output_shape,
                counts=own.counts,
                own_shapes=own.shapes,
                more_inputs=seen.more_inputs,
                more_outputs=seen.more_outputs,
                kernel=seen.kernel or _kernel_of(module),
                mult_adds=seen.mult_adds if costs else None,
                output_bytes=seen.output_bytes if costs else None,
                buffer_bytes=own.buffer_bytes,
                container=container,
            )
        )
    return tuple(rows)


def _only_holds(module: nn.Module) -> bool:
    """Whether a module without tensors is no layer: it has others inside, or is the place where one stood."""
    return any(True for _ in module.children()) or type(module) is nn.Identity


def _is_norm(module: nn.Module) -> bool:
    scripted = str(getattr(module, "original_name", "")).startswith(("BatchNorm", "SyncBatchNorm"))
    return scripted or is_batch_norm_class(type(module))


def _kernel_of(module: nn.Module) -> tuple[int, ...] | None:
    """Of a layer that did not run: TorchScript, or one after a forward that failed."""
    sizes = getattr(module, "kernel_size", None)
    return tuple(sizes) if isinstance(sizes, tuple | list) and all(type(n) is int for n in sizes) else None
