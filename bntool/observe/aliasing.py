"""Which value of the graph each tensor holds at the moment: told by object and by memory, never by name.

A tensor that holds a value carries a mark, for as long as the forward is observed. Views and in-place
writes are followed through the memory that tensors share.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import TensorWeakRef

from bntool.graph.dataflow import Graph
from bntool.graph.inputs import named_tensors
from bntool.observe.side_effects import Kept, storage_of

MARK = "_bntool_value"
"""The attribute by which a tensor names the value it holds, for as long as the forward is observed."""

SMALL_CONSTANT = 1 << 16
"""Constants made during the forward are kept up to this many elements, for laws that need numbers."""


class Holders:
    """The tensors that hold values of one graph, while its forward runs on the modules of `run`."""

    def __init__(self, graph: Graph, run: list[tuple[str, nn.Module]]) -> None:
        self.graph = graph
        self.kept = Kept(module for _, module in run)
        self._handles: dict[int, str] = {}
        self._of_handle: dict[str, int] = {}
        self._inputs: list[Tensor] = []
        self._held: list[TensorWeakRef] = []
        self._by_storage: dict[int, tuple[StorageWeakRef, list[TensorWeakRef]]] = {}
        self._name_own_tensors(run)

    def _name_own_tensors(self, run: list[tuple[str, nn.Module]]) -> None:
        for slots in ("_parameters", "_buffers"):
            for prefix, module in run:
                for slot, tensor in getattr(module, slots).items():
                    if tensor is None:
                        continue
                    name = f"{prefix}.{slot}" if prefix else slot
                    first = self._handles.setdefault(id(tensor), name)
                    if first == name:
                        self.graph.tensors[name] = tensor
                    else:
                        self.graph.aliases.setdefault(first, []).append(name)

    # -- reading ----------------------------------------------------------------------------------------

    def value_of(self, tensor: Tensor) -> int:
        """The value a tensor holds now; a tensor never seen before is a constant."""
        known: int | None = getattr(tensor, MARK, None)
        if known is not None:
            return known
        handle = self._handles.get(id(tensor)) or self._handle_by_place.get(_place_in_memory(tensor))
        if handle is not None:
            if handle not in self._of_handle:
                self._of_handle[handle] = self._new_value(tensor, handle=handle, constant=True)
            return self._of_handle[handle]
        for other in self._aliases(tensor):
            if _place_in_memory(other) == _place_in_memory(tensor):
                return int(getattr(other, MARK))
        # once a number was read from the data, what Python makes of it may depend on the data too
        constant = not self.graph.reads_numbers
        value = self._new_value(tensor, constant=constant)
        if constant and tensor.numel() <= SMALL_CONSTANT:
            self.graph.constants[value] = tensor
        self.hold(tensor, value)
        return value

    def _new_value(self, tensor: Tensor, **fields: Any) -> int:
        return self.graph.add_value(tuple(tensor.shape), dtype=str(tensor.dtype), **fields).id

    @functools.cached_property
    def _handle_by_place(self) -> dict[Any, str]:
        """Names by memory: `weight.detach()` and `weight.data` are other objects for the same tensor."""
        names: dict[Any, str] = {}
        for name, tensor in self.graph.tensors.items():
            names.setdefault(_place_in_memory(tensor), name)
        return names

    def _aliases(self, tensor: Tensor) -> list[Tensor]:
        """Other live tensors that hold values in the same storage."""
        storage = storage_of(tensor)
        if storage is None or storage not in self._by_storage:
            return []
        alive, references = self._by_storage[storage]
        if alive.expired():
            return []
        tensors = [(reference, reference()) for reference in references]
        references[:] = [reference for reference, found in tensors if found is not None]
        return [found for _, found in tensors if found is not None and found is not tensor]

    # -- writing ----------------------------------------------------------------------------------------

    def hold_input(self, tensor: Tensor) -> None:
        self._inputs.append(tensor)
        self.hold(tensor, self._new_value(tensor))

    def hold(self, tensor: Tensor, value: int) -> None:
        """From now on the tensor holds this value."""
        seen = hasattr(tensor, MARK)
        setattr(tensor, MARK, value)
        if seen or (storage := storage_of(tensor)) is None:
            return
        known = self._by_storage.get(storage)
        if known is None or known[0].expired():
            known = self._by_storage[storage] = StorageWeakRef(tensor.untyped_storage()), []
        reference = TensorWeakRef(tensor)
        known[1].append(reference)
        self._held.append(reference)

    def keep_before_write(self, targets: Iterable[Tensor]) -> None:
        """Copy what is about to be written to: the user's own tensors, and constants already noted."""
        constants = self.graph.constants
        for target in targets:
            self.kept.before_write(target)
            for tensor in (target, *self._aliases(target)):
                value = getattr(tensor, MARK, None)
                if value in constants:
                    constants[value] = constants[value].clone()

    def overwrite(self, tensor: Tensor, value: int) -> None:
        """An in-place write: every live view of the storage now holds something new."""
        place = _place_in_memory(tensor)
        own = [t for t in self.kept.sharing(tensor) if t is not tensor and not hasattr(t, MARK)]
        for other in (*self._aliases(tensor), *own):
            if _place_in_memory(other) == place:
                self.hold(other, value)
                continue
            before, mixed = self.value_of(other), self._new_value(other)
            self.graph.add_op(
                "overwritten_view", {"input": before, "other": value}, (mixed,), attrs={}, views=("other",)
            )
            self.hold(other, mixed)
        self.hold(tensor, value)

    # -- the end ----------------------------------------------------------------------------------------

    def finish(self, output: Any) -> None:
        """Mark the values that the model returned, and those still held by somebody else."""
        mine = {id(tensor) for tensor in self._inputs}
        for _, tensor in named_tensors(output):
            self.graph.values[self.value_of(tensor)].is_output = True
            mine.add(id(tensor))
        if any(self._escaped(mine)):
            # Cycles of the forward's own: while the collector is paused, all that was made is young. A full
            # collection takes seconds in a process that holds a large index.
            gc.collect(0)
        for value in self._escaped(mine):
            self.graph.values[value].escapes = True

    def _escaped(self, mine: set[int]) -> Iterator[int]:
        for tensor in self._alive():
            value = self.graph.values[getattr(tensor, MARK)]
            if not (value.constant or value.is_output or id(tensor) in mine):
                yield value.id

    def _alive(self) -> Iterator[Tensor]:
        return (tensor for reference in self._held if (tensor := reference()) is not None)

    def forget(self) -> None:
        """Take every mark off the tensors, and put back what the forward wrote to the user's own."""
        for tensor in self._alive():
            tensor.__dict__.pop(MARK, None)
        self.kept.restore()


def _place_in_memory(tensor: Tensor) -> Any:
    """What tells whether two tensor objects are the same memory seen the same way."""
    try:
        return (
            tensor.untyped_storage()._cdata,
            tensor.storage_offset(),
            tuple(tensor.shape),
            tensor.stride(),
            tensor.dtype,
        )
    except (RuntimeError, NotImplementedError):
        return id(tensor)
