"""What the dispatch mode and the module hooks see of a forward, as a graph."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from bntool.graph.dataflow import Graph, Module, Op
from bntool.graph.inputs import named_tensors
from bntool.layers import computes_weight, has_foreign_hook
from bntool.observe.aliasing import SMALL_CONSTANT, Holders
from bntool.observe.aten import SHAPE_ONLY, product_of, translate
from bntool.observe.data_reads import numbers_read
from bntool.observe.modules import class_name, is_decomposed, role_of, uses_plain_bias
from bntool.observe.operands import (
    is_handed_on,
    is_one_of,
    is_written,
    operands_of,
    seen_through,
    tensors_in,
)

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


_FILLED = frozenset("zeros ones zeros_like ones_like new_zeros new_ones".split())
"""What these make is the same whatever size Python asks them for."""


def _role(module: nn.Module) -> str:
    """The role of the class, unless this one instance was given another forward."""
    role = role_of(type(module))
    return "custom_norm" if role in ("norm", "norm_act") and "forward" in vars(module) else role


def _sees(hooks: Any) -> bool:
    """Whether a hook may look at what a module takes and gives; one that makes its weight does not."""
    if isinstance(hooks, dict):
        hooks = {key: hook for key, hook in hooks.items() if not computes_weight(hook)}
    return has_foreign_hook(hooks)


@dataclasses.dataclass(slots=True)
class _Frame:
    module: nn.Module
    name: str
    call: int
    start: int
    place: str


class Recorder:
    """Turns the calls that the dispatch mode and the module hooks see into a graph."""

    def __init__(
        self, original: nn.Module, run: list[tuple[str, nn.Module]], copies: dict[int, nn.Module]
    ) -> None:
        self.graph = Graph()
        self.graph.model_class = class_name(type(original))
        self.original = original
        self.originals = {id(module): name for name, module in original.named_modules()}
        self.unregistered: list[nn.Module] = []
        self.around: list[int] = []  # how many known layers each of them runs in
        self.names: dict[int, str] = {}
        self.places: dict[int, str] = {}
        self.frames: list[_Frame] = []
        self.holders = Holders(self.graph, run)
        self.graph.reads_sizes = any(isinstance(module, torch.jit.ScriptModule) for _, module in run)
        families: dict[int, str] = {}
        for name, module in run:
            first = families.setdefault(id(_first(module, copies)), name)
            if id(module) not in self.names:
                self.names[id(module)] = first
                self.places[id(module)] = name if name != first else ""
            if name != first:
                self.graph.aliases.setdefault(first, []).append(name)
                continue
            self.graph.modules[name] = Module(
                name,
                class_name(type(module)),
                role=_role(module),
                children=tuple(child for child, _ in module._modules.items()),
                own_tensors=len(module._parameters) + len(module._buffers),
                plain_bias=uses_plain_bias(type(module)) and "forward" not in vars(module),
                hooked=any(_sees(getattr(module, hooks, None)) for hooks in _HOOKS),
                left_in_train=getattr(module, "training", False) and not run[0][1].training,
            )

    # -- modules ----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        before = register_module_forward_pre_hook(self.enter)
        after = register_module_forward_hook(self.leave, with_kwargs=True)
        try:
            yield
        finally:
            before.remove()
            after.remove()
            # torch's handle forgets this registry; what stays there makes torch.compile warn for ever after
            nn.modules.module._global_forward_hooks_with_kwargs.pop(after.id, None)

    def enter(self, module: nn.Module, args: Any) -> None:
        name = self.names.get(id(module))
        if name is None and (name := self._in_original(module)) is None:
            self.unregistered.append(module)
            self.around.append(len(self.frames))
            return
        info = self.graph.modules[name]
        if id(module) not in self.names:
            info.from_outside = True
            self._watch_original(module, args)
        place = self.places.get(id(module), "")
        self.frames.append(_Frame(module, name, info.calls, len(self.graph.ops), place))
        info.calls += 1
        info.inputs.append(self._first_value(args))
        if info.hooked:
            self._watch(args, name)

    def leave(self, module: nn.Module, _: Any, kwargs: Any, output: Any) -> None:
        name = self.names.get(id(module))
        if name is None and (name := self._in_original(module)) is None:
            if module in self.unregistered:
                first = self.unregistered.index(module)
                del self.unregistered[first:], self.around[first:]
            return
        if id(module) not in self.names:
            self._watch_original(module, (kwargs, output))
        while self.frames and self.frames[-1].module is not module:
            self.frames.pop()
        if not self.frames:
            return
        frame = self.frames.pop()
        info = self.graph.modules[name]
        info.whole.append(list(range(frame.start, len(self.graph.ops))))
        value = self._first_value((output,))
        info.outputs.append(value)
        if info.hooked:
            # a global pre-hook is not shown the keyword inputs
            self._watch((kwargs, output), name)
        if value is None:
            return
        if frame.start == len(self.graph.ops) and value == info.inputs[-1]:
            self.graph.values[value].through.append(name)

    def _watch(self, structure: Any, name: str) -> None:
        """A hook on `name` sees every tensor in `structure`."""
        for _, tensor in named_tensors(structure):
            self.graph.values[self.holders.value_of(tensor)].watched.append(name)

    def _watch_original(self, module: nn.Module, structure: Any) -> None:
        """A closure that reaches the original's own layer does so in any copy: nothing moves past it."""
        self._watch(structure, f"{class_name(type(module))} (reached through a closure)")

    def _in_original(self, module: nn.Module) -> str | None:
        """The name of a layer of the original itself, which only what holds it from outside can call here."""
        name = self.originals.get(id(module))
        return name if name in self.graph.modules else None

    def where(self) -> str:
        return self.frames[-1].name if self.frames else ""

    def running(self) -> tuple[str, nn.Module | None]:
        """The module that runs at the moment, and its name."""
        return self.where(), self.frames[-1].module if self.frames else None

    def _first_value(self, structure: Any) -> int | None:
        for item in structure:
            if isinstance(item, Tensor):
                return self.holders.value_of(item)
        return None

    def read(self, tensor: Tensor | None) -> None:
        """Python was shown the numbers of a tensor, or of one that is not known (None)."""
        if tensor is None or not self.graph.values[self.holders.value_of(tensor)].constant:
            self.graph.reads_numbers = True

    def read_size(self) -> None:
        """Python asked how long a tensor is."""
        self.graph.reads_sizes = True

    # -- operations -------------------------------------------------------------------------------------

    def record(
        self, name: str, bound: dict[str, Any], written: frozenset[str], draws: bool, out: Any
    ) -> None:
        graph, holders = self.graph, self.holders
        operands = operands_of(bound)
        for unread in SHAPE_ONLY.get(name, ()):
            operands.pop(unread, None)
        outs = list(tensors_in(out))
        inputs = {role: holders.value_of(tensor) for role, tensor in operands.items()}
        if not all(graph.values[inputs[role]].constant for role in numbers_read(name, operands, bound)):
            graph.reads_numbers = True
        targets = [t for role, t in operands.items() if is_written(role, written)] if written else []
        if not targets and outs and all(is_handed_on(o, operands) for o in outs):
            return
        kind, attrs = translate(name, bound)
        if kind == "matmul":
            kind, inputs = product_of(inputs, graph.values)
        constant = not draws and all(graph.values[v].constant for v in inputs.values())
        if graph.reads_numbers:
            # any Python number from here on may have been read from the data
            constant = constant and (bool(inputs) or kind in _FILLED)
            unsure = {"number"} if attrs.get("alpha") == 1.0 else {"number", "alpha"}
            attrs = {k: None if k in unsure else v for k, v in attrs.items()}
        if kind in ("conv", "linear"):
            self._keep_computed(inputs, operands)
        # what fake quantisation returns is none of what it writes to
        new = [out for out in outs if not is_one_of(out, targets)]
        made = [*new, *targets]
        values = tuple(self._made(tensor, constant=constant, written=bool(targets)) for tensor in made)
        frame = self.frames[-1] if self.frames else None
        if kind == "batch_norm" and self.around and self.around[-1] >= len(self.frames):
            attrs = {**attrs, "unregistered": class_name(type(self.unregistered[-1]))}
        op = graph.add_op(
            kind,
            inputs,
            values,
            attrs=attrs,
            scope=frame.name if frame else "",
            call=frame.call if frame else 0,
            inplace=bool(targets),
            views=seen_through(made, operands),
            place=frame.place if frame else "",
        )
        if frame is not None and kind == "add" and is_decomposed(type(frame.module)):
            self._collapse_norm(frame, op)
        for number, (tensor, value) in enumerate(zip(made, values, strict=True)):
            (holders.hold if number < len(new) else holders.overwrite)(tensor, value)

    def _made(self, tensor: Tensor, *, constant: bool, written: bool) -> int:
        """A new value, with its numbers where they are few and of no input."""
        value = self.graph.add_value(tuple(tensor.shape), constant=constant, dtype=str(tensor.dtype)).id
        if constant and tensor.numel() <= SMALL_CONSTANT:
            # an own tensor that was written to is put back later
            self.graph.constants[value] = tensor.clone() if written else tensor
        return value

    def _keep_computed(self, inputs: dict[str, int], operands: dict[str, Tensor]) -> None:
        """What a layer computes of its weight or bias from its parameters is known, however large."""
        for role in ("weight", "bias"):
            value = self.graph.values[inputs[role]] if role in inputs else None
            if value is not None and value.constant and not value.handle:
                self.graph.constants.setdefault(value.id, operands[role])

    def _collapse_norm(self, frame: _Frame, last: Op) -> None:
        """A frozen norm computes x·scale + bias by elementary ops: record it as one batch_norm."""
        module = self.graph.modules[frame.name]
        source = module.inputs[-1]
        if source is None or self.graph.values[last.outputs[0]].constant:
            return
        outputs = last.outputs
        self.graph.drop_ops_from(frame.start)
        inputs = {"input": source}
        for role in ("weight", "bias", "running_mean", "running_var"):
            inputs[role] = self.holders.value_of(getattr(frame.module, role))
        attrs = {"eps": float(getattr(frame.module, "eps", 0.0)), "training": False, "axis": 1}
        attrs["frozen"] = True
        self.graph.add_op("batch_norm", inputs, outputs, attrs=attrs, scope=frame.name, call=frame.call)


def _first(module: nn.Module, copies: dict[int, nn.Module]) -> nn.Module:
    """The module that was there before any copy was made; a copy may have been copied again."""
    while id(module) in copies:
        module = copies[id(module)]
    return module
