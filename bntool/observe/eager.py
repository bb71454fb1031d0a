"""Observe an eager `nn.Module`: one real forward in eval mode under a dispatch mode and module hooks.

Below autograd composite operators stay whole (`linear`, `batch_norm`, `flatten`), which is what the laws
want. `inference_mode` would do that too, but a tensor that a forward keeps in a global (a cached grid) would
then be one that training refuses. The forward runs in isolation (`isolation`), on a stand-in.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from bntool.core.collecting import paused
from bntool.core.errors import ObserveError
from bntool.graph.dataflow import Graph, Module, Op
from bntool.graph.inputs import Inputs, named_tensors
from bntool.layers import has_foreign_hook
from bntool.observe.aten import SHAPE_ONLY, product_of, translate
from bntool.observe.copying import is_separable, take_apart
from bntool.observe.holding import SMALL_CONSTANT, Holders
from bntool.observe.isolation import SEED, Isolation, fresh, same_random_numbers
from bntool.observe.leftovers import require_materialised, storage_of, undeclared_writes
from bntool.observe.modules import class_name, is_decomposed, role_of, uses_plain_bias
from bntool.observe.reading_out import size_reads, told, unseen_reads
from bntool.observe.standing_in import set_modes
from bntool.observe.written_out import recognise_norms

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclasses.dataclass(frozen=True)
class Observation:
    """What one forward showed: its graph, the inputs it ran on, and what it returned.

    `returned` are the outputs by name, where the forward ran as one of a runner does; else None.
    """

    graph: Graph
    inputs: Inputs
    output: Any
    returned: dict[str, Tensor] | None = None


def observe(model: nn.Module, inputs: Inputs, *, apart: bool = False) -> Observation:
    """Run `model` once in eval mode and return its dataflow graph.

    The model, its modes, its buffers and the random state stay as they were. Only the path that this
    input takes is seen. With `apart`, ops tell under which of its names a layer was called (`Op.place`).

    Raises:
        ObserveError: the forward raised, with its last line; or a lazy layer has no shape yet.
    """
    require_materialised(model)
    with paused(), Isolation(model).run(in_eval=False) as run:
        copies = _taken_apart(run) if apart else {}
        modules = list(run.named_modules(remove_duplicate=False))
        recorder = _Recorder(model, modules, copies)
        # Monte Carlo dropout: left on in a model in eval mode, it is what will run
        still_dropping = [] if run.training else [m for _, m in modules if _drops(m)]
        set_modes(run, training=False)
        for module in still_dropping:
            module.training = True
        try:
            output = _forward(run, fresh(inputs), recorder)
            returned = None if still_dropping else _returned(output)
            recorder.holders.finish(output)
            recognise_norms(recorder.graph)
        finally:
            recorder.holders.forget()
    return Observation(recorder.graph, inputs, output, returned)


def _returned(output: Any) -> dict[str, Tensor] | None:
    """The outputs by name in memory of their own: what the forward wrote to is put back afterwards."""
    found = dict(named_tensors(output))
    if any(tensor.device.type != "cpu" for tensor in found.values()):
        return None  # a runner's own run is on the CPU
    return {name: tensor.detach().clone() for name, tensor in found.items()} or None


def _forward(run: nn.Module, inputs: Inputs, recorder: _Recorder) -> Any:
    with contextlib.ExitStack() as stack:
        stack.enter_context(unseen_reads(recorder.read))
        stack.enter_context(size_reads(recorder.read_size))
        stack.enter_context(_room_to_nest())
        stack.enter_context(same_random_numbers(SEED))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch._C._AutoDispatchBelowAutograd())
        stack.enter_context(recorder.hooks())
        stack.enter_context(_DispatchMode(recorder))
        try:
            for tensor in inputs.tensors().values():
                recorder.holders.hold_input(tensor)
            return run(*inputs.args, **inputs.kwargs)
        except Exception as error:
            raise ObserveError(
                f"the model failed on an example input of {inputs.shapes()}: {_first_line(error)}",
                where=recorder.where(),
                next_step=recorder.what_to_do(error),
            ) from error


@contextlib.contextmanager
def _room_to_nest() -> Iterator[None]:
    """Hooks and the dispatch mode add frames of their own to every nested module."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(2 * limit)
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)


def _taken_apart(run: nn.Module) -> dict[int, nn.Module]:
    copies: dict[int, nn.Module] = {}
    for module in list(run.modules()):
        if is_separable(module):
            copies.update(take_apart(run, module))
    return copies


def _drops(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.dropout._DropoutNd) and module.training


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _role(module: nn.Module) -> str:
    """The role of the class, unless this one instance was given another forward."""
    role = role_of(type(module))
    return "custom_norm" if role in ("norm", "norm_act") and "forward" in vars(module) else role


@dataclasses.dataclass(slots=True)
class _Frame:
    module: nn.Module
    name: str
    call: int
    start: int
    place: str


@functools.cache
def _schema_of(func: Any) -> tuple[str, dict[str, str], frozenset[str], bool]:
    """Operator name, its arguments in order and what bntool calls them, those that it writes to (as bntool
    calls them), and whether it draws random numbers.

    What is only written to is `out`, whatever the schema calls it, and `out_1` where it is the second.
    """
    arguments = func._schema.arguments
    written = [a for a in arguments if a.alias_info is not None and a.alias_info.is_write]
    outs = [a.name for a in written if a.kwarg_only]
    names = {a.name: a.name for a in arguments}
    names |= {name: f"out_{i}" if i else "out" for i, name in enumerate(outs)}
    draws = torch.Tag.nondeterministic_seeded in func.tags
    return func._schema.name.split("::")[-1], names, frozenset(names[a.name] for a in written), draws


class _DispatchMode(TorchDispatchMode):
    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, names, written, draws = _schema_of(func)
        bound = dict(zip(names.values(), args, strict=False))
        bound.update((names.get(name, name), item) for name, item in (kwargs or {}).items())
        for argument in (*written, *undeclared_writes(name, bound)):
            self.recorder.holders.keep_before_write(_tensors_in(bound.get(argument)))
        out = func(*args, **(kwargs or {}))
        self.recorder.record(name, bound, written, draws, out)
        return out


class _Recorder:
    """Turns the calls that the dispatch mode and the module hooks see into a graph."""

    def __init__(
        self, original: nn.Module, run: list[tuple[str, nn.Module]], copies: dict[int, nn.Module]
    ) -> None:
        self.graph = Graph()
        self.graph.model_class = class_name(type(original))
        self.original = original
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
                hooked=any(has_foreign_hook(getattr(module, hooks, None)) for hooks in _HOOKS),
                left_in_train=module.training and not run[0][1].training,
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
        if name is None:
            self._watch_original(module, args)
            return
        info = self.graph.modules[name]
        place = self.places[id(module)]
        self.frames.append(_Frame(module, name, info.calls, len(self.graph.ops), place))
        info.calls += 1
        info.inputs.append(self._first_value(args))
        if info.hooked:
            self._watch(args, name)

    def leave(self, module: nn.Module, _: Any, kwargs: Any, output: Any) -> None:
        name = self.names.get(id(module))
        if name is None:
            self._watch_original(module, (kwargs, output))
            return
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
        if any(module is own for own in self.original.modules()):
            self._watch(structure, f"{class_name(type(module))} (reached through a closure)")

    def where(self) -> str:
        return self.frames[-1].name if self.frames else ""

    def what_to_do(self, error: Exception) -> str:
        """The way out of a forward that raised: another shape, but not where a layer cannot fit any."""
        frame = self.frames[-1] if self.frames else None
        known = self.graph.modules[frame.name] if frame is not None else None
        channels = getattr(frame.module, "num_features", None) if frame is not None else None
        if known is not None and known.role.startswith("norm") and known.inputs[-1] is not None:
            shape = self.graph.values[known.inputs[-1]].shape
            wrong_axes = re.search(r"expected .*\dD input", str(error))
            if len(shape) > 1 and channels not in (None, shape[1]) and not wrong_axes:
                return f"this BatchNorm has {channels} channels and is given {shape[1]}: mend the model"
        if "does not require grad" in str(error):
            return "its forward differentiates: fold the layers below that, bntool.fold(model.part, inputs)"
        if isinstance(error, TypeError) and "required positional argument" in str(error):
            return "give every argument of forward an --input, in turn or by name (example_inputs= in Python)"
        return "give the right shape with --input 1x3x224x224 (example_inputs= in Python)"

    def _first_value(self, structure: Any) -> int | None:
        for item in structure:
            if isinstance(item, Tensor):
                return self.holders.value_of(item)
        return None

    def read(self, tensor: Tensor) -> None:
        """Python was shown the numbers of a tensor."""
        if not self.graph.values[self.holders.value_of(tensor)].constant:
            self.graph.reads_numbers = True

    def read_size(self) -> None:
        """Python asked how long a tensor is."""
        self.graph.reads_sizes = True

    # -- operations -------------------------------------------------------------------------------------

    def record(
        self, name: str, bound: dict[str, Any], written: frozenset[str], draws: bool, out: Any
    ) -> None:
        graph, holders = self.graph, self.holders
        operands = _operands(bound)
        for unread in SHAPE_ONLY.get(name, ()):
            operands.pop(unread, None)
        outs = list(_tensors_in(out))
        inputs = {role: holders.value_of(tensor) for role, tensor in operands.items()}
        if not all(graph.values[inputs[role]].constant for role in told(name, operands)):
            graph.reads_numbers = True
        targets = [t for role, t in operands.items() if _is_written(role, written)] if written else []
        if not targets and outs and all(_is_handed_on(o, operands) for o in outs):
            return
        kind, attrs = translate(name, bound)
        if kind == "matmul":
            kind, inputs = product_of(inputs, graph.values)
        constant = not draws and all(graph.values[v].constant for v in inputs.values())
        if graph.reads_numbers:
            # any Python number from here on may have been read from the data
            constant = constant and bool(inputs)
            unsure = {"number"} if attrs.get("alpha") == 1.0 else {"number", "alpha"}
            attrs = {k: None if k in unsure else v for k, v in attrs.items()}
        made = targets or outs
        values = []
        for tensor in made:
            value = graph.add_value(tuple(tensor.shape), constant=constant, dtype=str(tensor.dtype)).id
            if constant and tensor.numel() <= SMALL_CONSTANT:
                # an own tensor that was written to is put back later
                graph.constants[value] = tensor.clone() if targets else tensor
            values.append(value)
        frame = self.frames[-1] if self.frames else None
        op = graph.add_op(
            kind,
            inputs,
            tuple(values),
            attrs=attrs,
            scope=frame.name if frame else "",
            call=frame.call if frame else 0,
            inplace=bool(targets),
            views=_seen_through(made, operands),
            place=frame.place if frame else "",
        )
        if frame is not None and kind == "add" and is_decomposed(type(frame.module)):
            self._collapse_norm(frame, op)
        hold = holders.overwrite if targets else holders.hold
        for tensor, value in zip(made, values, strict=True):
            hold(tensor, value)

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


def _operands(bound: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors among the arguments by role; those of a list are numbered."""
    found: dict[str, Tensor] = {}
    for name, item in bound.items():
        role = "input" if name == "self" else name
        if isinstance(item, Tensor):
            found[role] = item
        elif isinstance(item, list | tuple):
            for i, entry in enumerate(item):
                if isinstance(entry, Tensor):
                    found[f"{role}_{i}"] = entry
    return found


def _is_written(role: str, written: frozenset[str]) -> bool:
    """Whether the operator writes to this operand, or to the list it stands in (`input_0`, `out_1`)."""
    stem, _, index = role.rpartition("_")
    name = stem if index.isdigit() else role
    return name in written or (name == "input" and "self" in written)


def _is_handed_on(tensor: Tensor, operands: dict[str, Tensor]) -> bool:
    """`contiguous`, `to` and eval dropout return their input itself."""
    return any(tensor is source for source in operands.values())


def _seen_through(made: list[Tensor], operands: dict[str, Tensor]) -> tuple[str, ...]:
    """The operands whose memory a result shares: those that were written to, and those it is a view of."""
    storages = {storage_of(tensor) for tensor in made} - {None}
    return tuple(role for role, tensor in operands.items() if storage_of(tensor) in storages)


def _tensors_in(out: Any) -> Iterator[Tensor]:
    if isinstance(out, Tensor):
        yield out
    elif isinstance(out, list | tuple):
        for item in out:
            yield from _tensors_in(item)
