"""Capture a torch model with torch.export and convert it to ONNX, without a word on stdout or stderr."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bntool.core.errors import ExportError, InvariantError
from bntool.export.dynamic_axes import BATCH_AXIS, DynamicAxes, sample_for, shapes_for, symbols_of
from bntool.export.onnx_versions import LEAST_OPSET, OPSETS
from bntool.graph.inputs import Inputs, plain
from bntool.observe.stand_in import set_modes, stand_in

_BFLOAT16_OPSET = 22
_BATCH_NORM_OPS = (
    "aten.batch_norm.",
    "aten._native_batch_norm_legit",
    "aten.native_batch_norm.",
    "aten.cudnn_batch_norm.",
)


def capture(
    model: nn.Module, inputs: Inputs, dynamic: DynamicAxes
) -> tuple[torch.export.ExportedProgram, dict[str, str], list[str]]:
    """The exported program, the name of each of its open axes by torch's symbol, and what to tell.

    Raises `ExportError` when torch.export cannot capture the model in eval mode on these inputs, or cannot
    leave an axis open that was asked for, and `UsageError` for an axis that there is not.
    """
    notes: list[str] = []
    asked = dynamic.named_for(inputs)
    if dynamic.batch and not any(0 in axes for axes in asked.values()):
        why = why_no_batch_axis(inputs)
        if not why:
            try:
                return *_capture_open(model, inputs, True, asked), notes
            except Exception as error:  # noqa: BLE001 - the capture below tells whether it matters
                why = essence(error)
        notes.append(fixed_batch(inputs, why))
    try:
        return *_capture_open(model, inputs, False, asked), notes
    except Exception as error:
        if asked and _captures(model, inputs):
            axes = ", ".join(f"{name}:{','.join(map(str, of))}" for name, of in asked.items())
            raise ExportError(
                f"torch.export cannot leave {axes} open: {essence(error)}",
                where=user_line(error),
                next_step="leave that axis out of --dynamic, or give another example with --input",
            ) from error
        raise ExportError(
            f"torch.export cannot capture the model: {essence(error)}",
            where=user_line(error),
            next_step="make forward free of decisions on tensor values (of a detector, export the network "
            "without what picks its boxes), or use --exporter legacy",
        ) from error


def fixed_batch(inputs: Inputs, why: str) -> str:
    return f"the batch axis is fixed, as in the example input ({inputs.shapes()}): {why}"


def _captures(model: nn.Module, inputs: Inputs) -> bool:
    try:
        _capture_open(model, inputs, False, {})
    except Exception:  # noqa: BLE001 - whether it can be captured is the question
        return False
    return True


def why_no_batch_axis(inputs: Inputs) -> str:
    """Why the leading axis of the inputs is not surely the batch; empty where it is."""
    if any(isinstance(value, list | tuple) for value in _flat((*inputs.args, *inputs.kwargs.values()))):
        return "an input is a list, whose tensors may be the samples"
    sizes = {t.shape[0] for t in inputs.tensors().values() if t.dim()}
    if len(sizes) != 1:
        return "the inputs have no common leading axis"
    return ""


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    """The values, those of a dict in place of the dict: its keys name inputs as those of a forward do."""
    for value in values:
        yield from _flat(value.values()) if isinstance(value, Mapping) else (value,)


def _capture_open(
    model: nn.Module, inputs: Inputs, batch: bool, asked: Mapping[str, Sequence[int]]
) -> tuple[torch.export.ExportedProgram, dict[str, str]]:
    # A sample of 1 would be taken for a constant: torch specialises axes of length 0 and 1.
    if batch and next(t for t in inputs.tensors().values() if t.dim()).shape[0] < 2:
        inputs = inputs.rebatched(2)
    # Copies, because torch marks the very tensors whose axes it is told to leave open.
    sample = sample_for(inputs, asked).map(torch.clone)
    shapes = shapes_for(sample, torch.export.Dim(BATCH_AXIS) if batch else None, asked)
    run = set_modes(stand_in(model).module, training=False)  # of its own: a failed try leaves its marks
    if not isinstance(run, torch.jit.ScriptModule):
        # by the class: an attribute of the model may hide the method
        nn.Module.register_forward_hook(run, lambda _module, _args, output: _known_to_torch(output))
    program = torch.export.export(
        run,
        sample.args,
        dict(sample.kwargs),
        dynamic_shapes=shapes if batch or asked else None,
        strict=False,
    )
    return program, symbols_of(program, sample, asked)


def _known_to_torch(output: Any) -> Any:
    """An output as containers that torch.export takes apart: of a dataclass, say, a dict of its fields."""
    leaves = torch.utils._pytree.tree_leaves(output)
    known = all(leaf is None or isinstance(leaf, Tensor | int | float) for leaf in leaves)
    return output if known else plain(output)


def convert(program: torch.export.ExportedProgram, opset: int | None) -> Any:
    """The program as torch's `ONNXProgram`, nothing optimised, in the lowest opset that works.

    Raises `ExportError` when an op has no ONNX form or the opset asked for cannot be written.
    """
    first: ExportError | None = None
    for candidate in _opsets(program) if opset is None else (opset,):
        try:
            return _convert_to(program, candidate)
        except ExportError as error:
            first = first or error
    raise first or InvariantError("there was no opset to try")


def _opsets(program: torch.export.ExportedProgram) -> list[int]:
    # Opset 22 brought bfloat16 to Conv.
    brain = any(t.dtype == torch.bfloat16 for t in program.state_dict.values())
    return [o for o in OPSETS if o >= (_BFLOAT16_OPSET if brain else LEAST_OPSET)]


def _convert_to(program: torch.export.ExportedProgram, opset: int) -> Any:
    try:
        converted = torch.onnx.export(
            program, f=None, dynamo=True, optimize=False, verbose=False, opset_version=opset
        )
    except Exception as error:
        raise ExportError(
            f"torch cannot convert the model to ONNX: {essence(error)}",
            where=user_line(error),
            next_step="try another --opset, or --exporter legacy",
        ) from error
    if converted is None:
        raise InvariantError("torch.onnx.export returned nothing")
    written = int(converted.model.opset_imports[""])
    if written != opset:
        older = ", or --exporter legacy for an older one" if opset < written else ""
        raise ExportError(
            f"opset {opset} was asked for, torch's exporter could only write {written}",
            next_step=f"use --opset {written}{older}",
        )
    return converted


def refuse_batch_statistics(program: torch.export.ExportedProgram) -> None:
    """Raise `ExportError`, naming the layer, when a BatchNorm normalises with the batch even in eval mode.

    Not one that reads weights alone, which standardises them.
    """
    of_data = _reading_data(program)
    for node in batch_norm_nodes(program):
        if node.graph is program.graph and node not in of_data:
            continue
        schema = _argument_names(node)
        flag = next((schema.index(name) for name in ("training", "train") if name in schema), len(node.args))
        if flag < len(node.args) and node.args[flag]:
            stack = node.meta.get("nn_module_stack") or {}
            layer = [name for name, _ in stack.values()][-1:]
            raise ExportError(
                "a BatchNorm normalises with the statistics of the batch, also in eval mode",
                where=(layer[0] if layer else "") or str(node.name),
                next_step="give it running statistics first: `bntool calibrate --data ...`",
            )


def _reading_data(program: torch.export.ExportedProgram) -> set[torch.fx.Node]:
    """The nodes whose numbers depend on the inputs, or on a random draw."""
    inputs = set(program.graph_signature.user_inputs)
    found: set[torch.fx.Node] = set()
    for node in program.graph.nodes:
        draws = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if draws or node.name in inputs or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _argument_names(node: torch.fx.Node) -> list[str]:
    target: Any = node.target
    return [argument.name for argument in target._schema.arguments]


def batch_norm_nodes(program: torch.export.ExportedProgram) -> list[torch.fx.Node]:
    """Every call of a batch normalisation, subgraphs included."""
    return [
        node
        for module in program.graph_module.modules()
        for node in _nodes_of(module)
        if node.op == "call_function" and str(node.target).startswith(_BATCH_NORM_OPS)
    ]


def running_instance_norms(program: torch.export.ExportedProgram) -> int:
    """How many InstanceNorms normalise by stored statistics, as a BatchNorm in eval mode does."""
    nodes = (node for module in program.graph_module.modules() for node in _nodes_of(module))
    called = [node for node in nodes if str(node.target).startswith("aten.instance_norm.")]
    flags = (dict(zip(_argument_names(node), node.args, strict=False)) | node.kwargs for node in called)
    return sum(not given.get("use_input_stats", True) for given in flags)


def _nodes_of(module: nn.Module) -> Iterable[torch.fx.Node]:
    return module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ()


def mode_notes(model: nn.Module) -> list[str]:
    """What to tell of layers in train mode, which are exported in eval mode."""
    training = [(name, module) for name, module in model.named_modules() if module.training]
    if not training:
        return []
    layers = [name for name, module in training if isinstance(module, nn.modules.batchnorm._NormBase)]
    told = f", {layers[0]} (a BatchNorm) among them" if layers and not model.training else ""
    return [f"{len(training)} module(s) were in train mode{told}; exported in eval mode"]


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Keep the exporter's prints, logs and own warnings away; what matters is raised or noted."""
    disabled = logging.root.manager.disable
    logging.disable(max(disabled, logging.ERROR))
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            for module in ("torch", "onnxscript", "onnx_ir", "onnx", "copyreg"):
                warnings.filterwarnings("ignore", module=rf"{module}(\.|$)")
            with contextlib.redirect_stderr(io.StringIO()):
                yield
    finally:
        logging.disable(disabled)


def essence(error: BaseException) -> str:
    """The line that says what went wrong: the first of the deepest cause, without colours."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    broken = [line for line in lines if line.startswith("- ")]  # torch lists violated constraints so
    line = (
        broken[0].removeprefix("- ") if broken and "onstraints violated" in lines[0] else (lines or [""])[0]
    )
    # What follows is advice on torch's own flags, which the user of this export does not set, or names
    # torch's symbols.
    line = re.split(r"\s*For more information, run with |\. If you're using |\s*\(unhinted: ", line)[0]
    return textwrap.shorten(line, _LONGEST, placeholder=" …") or type(error).__name__


_LONGEST = 300
"""Letters of a line that is told: an expression over a hundred unknown sizes has some thousands."""


def user_line(error: BaseException) -> str:
    """The last line of the model's own code that the error names; else that of a library it is made of."""
    found = re.findall(r'File "([^"]+)", line (\d+), in (\w+)', str(error))
    own = [entry for entry in found if "site-packages" not in entry[0]]
    entries = own or re.findall(r"^Caused by: \((.+):(\d+) in (\w+)\)", str(error), flags=re.MULTILINE)
    return "{}, line {}, in {}".format(*entries[-1]) if entries else ""
