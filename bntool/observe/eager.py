"""Observe an eager `nn.Module`: one real forward in eval mode under a dispatch mode and module hooks.

Below autograd composite operators stay whole (`linear`, `batch_norm`, `flatten`), which is what the laws
want. `inference_mode` would do that too, but a tensor that a forward keeps in a global (a cached grid) would
then be one that training refuses. The forward runs in isolation (`isolation`), on a stand-in.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from bntool.core.collecting import paused
from bntool.core.errors import ObserveError
from bntool.graph.dataflow import Graph
from bntool.graph.inputs import Inputs, named_tensors
from bntool.observe.advice import what_to_do
from bntool.observe.copying import is_separable, take_apart
from bntool.observe.data_reads import size_reads, unseen_reads
from bntool.observe.isolation import SEED, Isolation, fresh, same_random_numbers
from bntool.observe.norm_modules import recognise_norms
from bntool.observe.operands import tensors_in
from bntool.observe.recording import Recorder
from bntool.observe.side_effects import require_materialised, undeclared_writes
from bntool.observe.stand_in import set_modes
from bntool.observe.watching import OpMode


@dataclasses.dataclass(frozen=True)
class Observation:
    """What one forward showed: its graph, the inputs it ran on, and what it returned.

    `returned` are the outputs by name, where the forward ran as one of a runner does; else None. `path` are
    the ops that ran, each with its module and what it reads, before any were put together.
    """

    graph: Graph
    inputs: Inputs
    output: Any
    returned: dict[str, Tensor] | None = None
    path: tuple[Hashable, ...] = ()


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
        recorder = Recorder(model, modules, copies)
        # Monte Carlo dropout: left on in a model in eval mode, it is what will run
        still_dropping = [] if getattr(run, "training", False) else [m for _, m in modules if _drops(m)]
        set_modes(run, training=False)
        for module in still_dropping:
            module.training = True
        try:
            output = _forward(run, fresh(inputs), recorder)
            returned = None if still_dropping else _returned(output)
            recorder.holders.finish(output)
            path = _path(recorder.graph)
            recognise_norms(recorder.graph)
        finally:
            recorder.holders.forget()
    return Observation(recorder.graph, inputs, output, returned, path)


def _path(graph: Graph) -> tuple[Hashable, ...]:
    handle = {value.id: value.handle for value in graph.values}
    return tuple(
        (op.kind, op.scope, *((role, v, handle[v]) for role, v in op.inputs.items())) for op in graph.ops
    )


def _returned(output: Any) -> dict[str, Tensor] | None:
    """The outputs by name in memory of their own: what the forward wrote to is put back afterwards."""
    found = dict(named_tensors(output))
    if any(tensor.device.type != "cpu" for tensor in found.values()):
        return None  # a runner's own run is on the CPU
    return {name: tensor.detach().clone() for name, tensor in found.items()} or None


def _forward(run: nn.Module, inputs: Inputs, recorder: Recorder) -> Any:
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
                next_step=what_to_do(
                    error, recorder.original, inputs.shapes(), recorder.graph, *recorder.running()
                ),
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
    namespace, _, name = func._schema.name.rpartition("::")
    # an integer layer has the name of another, and other arguments
    name = f"quantized_{name}" if namespace == "quantized" else name
    return name, names, frozenset(names[a.name] for a in written), draws


class _DispatchMode(OpMode):
    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def operator(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        name, names, written, draws = _schema_of(func)
        bound = dict(zip(names.values(), args, strict=False))
        bound.update((names.get(name, name), item) for name, item in kwargs.items())
        for argument in (*written, *undeclared_writes(name, bound)):
            self.recorder.holders.keep_before_write(tensors_in(bound.get(argument)))
        out = func(*args, **kwargs)
        self.recorder.record(name, bound, written, draws, out)
        return out

    def with_functions(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        out = func(*args, **kwargs)
        given = [item for item in pytree.tree_leaves((args, kwargs)) if isinstance(item, Tensor)]
        bound = {f"operand_{i}": tensor for i, tensor in enumerate(given)}
        self.recorder.record(func.name(), bound, frozenset(), False, out)
        return out
