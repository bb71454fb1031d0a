"""Running an exported program: as a module, on inputs of the shapes that it declares."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from bntool.graph.drawing import Draw
from bntool.graph.inputs import Inputs, map_tensors
from bntool.observe.program_sizes import Sizes


def example_inputs_of(program: ExportedProgram, seed: int = 0) -> Inputs:
    """The example inputs that a program keeps, else seeded ones of the shapes it was exported with."""
    if program.example_inputs is not None:
        args, kwargs = program.example_inputs
        return Inputs(tuple(args), dict(kwargs), origin="the example that the program keeps")
    return drawn_inputs(program, 0, seed)


def drawn_inputs(program: ExportedProgram, which: int, seed: int = 0) -> Inputs:
    """Seeded inputs of the shapes that a program declares, under one of the two sets of open sizes."""
    draw = Draw(seed)
    sizes = Sizes(program, which)
    user_inputs = {str(name) for name in program.graph_signature.user_inputs}
    drawn: list[Any] = []
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op != "placeholder" or node.name not in user_inputs:
            continue
        if not isinstance(value, Tensor):
            drawn.append(sizes.number(value))
        else:
            drawn.append(draw.numbers(sizes.shape(value), value.dtype))
    spec = program.call_spec.in_spec
    if spec is None:
        return Inputs(tuple(drawn))
    args, kwargs = torch.utils._pytree.tree_unflatten(drawn, spec)
    return Inputs(tuple(args), dict(kwargs), origin="the shapes that the program declares")


class RunnableProgram(nn.Module):
    """A program as a module that runs alike every time: on copies of its inputs, its buffers put back.

    It asserts nothing of types, so that it runs in float64 too.
    """

    leaves_no_trace = True
    """`Isolation` need make no stand-in: a copy of a graph module is compiled anew."""

    def __init__(self, program: ExportedProgram) -> None:
        super().__init__()
        module = program.module()
        assert isinstance(module, torch.fx.GraphModule)
        for node in list(module.graph.nodes):
            if node.target is torch.ops.aten._assert_tensor_metadata.default:
                module.graph.erase_node(node)
        module.recompile()
        self.program = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # An expanded one cannot be written, by the program or afterwards.
        written = [buffer for buffer in self.program.buffers() if not _is_expanded(buffer)]
        before = [(buffer, buffer.clone()) for buffer in written]
        try:
            return self.program(*map_tensors(args, torch.clone), **map_tensors(kwargs, torch.clone))
        finally:
            for buffer, numbers in before:
                buffer.copy_(numbers)


def _is_expanded(tensor: Tensor) -> bool:
    return any(size > 1 and step == 0 for size, step in zip(tensor.shape, tensor.stride(), strict=True))
