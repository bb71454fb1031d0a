"""Rewire an ONNX graph in memory: store tensors, take nodes out, and keep every name that others rely on."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir
from torch import Tensor

from bntool.observe.onnx_constants import DTYPE_OF, to_onnx
from bntool.observe.onnx_nodes import bodies_of

Place = tuple[ir.Node, int]
"""A node, and the index of one of its inputs."""


class Wiring:
    """The main graph of a model under surgery."""

    def __init__(self, model: ir.Model) -> None:
        self.model, self.graph = model, model.graph
        self.taken = _names(model)
        self.released: list[ir.Value] = []

    # -- tensors ----------------------------------------------------------------------------------------

    def store(self, old: ir.Value, places: Iterable[Place], tensor: Tensor) -> None:
        """Put a tensor where `places` read `old`: in its stead where nobody else reads it, else beside it."""
        places = list(places)
        own = all(tuple(use) in places for use in old.uses()) and not old.is_graph_output()
        if own and old.name in self.graph.initializers and self.graph.initializers[old.name] is old:
            old.const_value = to_onnx(tensor, old.name)
            if old.shape is not None:
                old.shape = ir.Shape(tuple(tensor.shape))
            return
        value = self.new_initializer(f"{old.name}_folded", tensor)
        for node, index in places:
            node.replace_input_with(index, value)
        self.released.append(old)

    def new_initializer(self, name: str, tensor: Tensor) -> ir.Value:
        name = self._free(name)
        stored = to_onnx(tensor, name)
        value = ir.Value(
            name=name, shape=ir.Shape(tuple(tensor.shape)), type=ir.TensorType(stored.dtype), const_value=stored
        )
        self.graph.register_initializer(value)
        if (self.model.ir_version or 0) < 4:
            self.graph.inputs.append(value)  # what the file format asked for then
        return value

    def _free(self, name: str) -> str:
        candidate, number = name, 1
        while candidate in self.taken:
            number += 1
            candidate = f"{name}_{number}"
        self.taken.add(candidate)
        return candidate

    # -- nodes ------------------------------------------------------------------------------------------

    def take_out(self, source: ir.Value, nodes: list[ir.Node]) -> None:
        """Nodes in a row go: whoever read the last one's output reads `source`. Outputs keep their names."""
        output = nodes[-1].outputs[0]
        source = self._current(source, nodes[0])
        if output.is_graph_output():
            if source.producer() is None or source.is_graph_output():
                self._keep_as_identity(source, nodes)
                return
            name, kind, shape = output.name, output.type, output.shape
            output.name = self._free(f"{name}_unfolded")
            source.name, source.type, source.shape = name, kind, shape
        output.replace_all_uses_with(source, replace_graph_outputs=True)
        self._remove(nodes)

    def _current(self, source: ir.Value, first: ir.Node) -> ir.Value:
        """What the first node reads now: what stood before it may have been taken out already."""
        del source
        raise NotImplementedError
