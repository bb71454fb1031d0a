"""What to do about a forward that raised: advice that fits the error."""

from __future__ import annotations

import dis
import inspect
import itertools
import re
from collections.abc import Sequence

from torch import nn
from torch.nn.modules.conv import _ConvNd

from bntool.graph.dataflow import Graph
from bntool.observe.first_layer import first_layer, shapes_for

_IN_PYTHON = "(example_inputs= in Python)"
_ANY_SHAPE = "1x3x224x224"
_MISSING = re.compile(r"missing \d+ required (?:positional|keyword-only) arguments?: (.+)")
_OF_INTEGERS = re.compile(
    r"scalar types? .*(Long|Int)\b|\b(Long|Int)(Tensor)?,|indices.* (Long|Int)\b|as indices"
)
_OF_NAMES = re.compile(
    r"too many indices for tensor|invalid data type 'str'|string indices|is not subscriptable"
)
_OF_CODE = (TypeError, AttributeError, KeyError, NameError, NotImplementedError, AssertionError)


def what_to_do(
    error: Exception, model: nn.Module, given: str, graph: Graph, where: str, layer: nn.Module | None
) -> str:
    """The way out of a forward that raised.

    Args:
        error: what it raised.
        model: that was run.
        given: the shapes that it was given.
        graph: of what ran until then.
        where: the name of the module that was running; empty where none was.
        layer: that module.
    """
    return (
        _of_the_norm(error, graph, where, layer)
        or _of_the_arguments(error, model)
        or _of_the_numbers(error)
        or _of_the_code(error)
        or _of_the_size(model, given)
        or f"give the right shape with --input {_shape_for(model)} {_IN_PYTHON}"
    )


def _of_the_norm(error: Exception, graph: Graph, where: str, layer: nn.Module | None) -> str:
    """A layer that no other shape of the input would fit."""
    known = graph.modules.get(where) if layer is not None else None
    channels = getattr(layer, "num_features", None)
    if known is None or not known.role.startswith("norm") or not known.inputs or known.inputs[-1] is None:
        return ""
    shape = graph.values[known.inputs[-1]].shape
    wrong_axes = re.search(r"expected .*\dD input", str(error))
    if len(shape) > 1 and channels not in (None, shape[1]) and not wrong_axes:
        return f"this BatchNorm has {channels} channels and is given {shape[1]}: mend the model"
    return ""


def _of_the_arguments(error: Exception, model: nn.Module) -> str:
    text, shape = str(error), _shape_for(model)
    missing = _MISSING.search(text) if isinstance(error, TypeError) else None
    if missing is not None:
        names, needed = re.findall(r"'(\w+)'", missing[1]), _needed(model)
        each = _each(needed if set(names) <= set(needed) else names, shape)
        return f"give every argument of forward an input: {each} {_IN_PYTHON}"
    if isinstance(error, TypeError) and "positional argument" in text and "given" in text:
        taken = ", ".join(inspect.signature(model.forward).parameters)
        return (
            f"its forward takes {taken or 'nothing'}: name each, {_each(_needed(model), shape)} {_IN_PYTHON}"
        )
    entries = _entries(model)
    if _OF_NAMES.search(text) or (isinstance(error, KeyError) and error.args[0] in entries):
        are = "are entries" if len(entries) > 1 else "is an entry"
        return f"where forward takes a dict, {_each(entries or ['KEY'], shape)} {are} of it {_IN_PYTHON}"
    return ""


def _each(names: Sequence[str], shape: str) -> str:
    return " ".join(f"--input {name}:{shape}" for name in names) or f"--input {shape}"


def _needed(model: nn.Module) -> list[str]:
    """What forward cannot do without."""
    parameters = inspect.signature(model.forward).parameters.values()
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in variable]


def _entries(model: nn.Module) -> list[str]:
    """The names that forward and the methods it names look up, as batch["image"] does."""
    code = getattr(type(model).forward, "__code__", None)
    methods = [getattr(type(model), name, None) for name in code.co_names] if code is not None else []
    found: dict[str, None] = {}
    for each in (code, *(getattr(method, "__code__", None) for method in methods)):
        for step, after in itertools.pairwise(dis.get_instructions(each) if each is not None else ()):
            looks_up = step.opname == "LOAD_CONST" and after.opname.startswith("BINARY_")
            if looks_up and isinstance(step.argval, str) and step.argval.isidentifier():
                found[step.argval] = None
    return list(found)


def _of_the_numbers(error: Exception) -> str:
    if "does not require grad" in str(error):
        return "its forward differentiates: fold the layers below that, bntool.fold(model.part, inputs)"
    if _OF_INTEGERS.search(str(error)):
        return f"an input holds integers: --input NAME:1x16:int64 {_IN_PYTHON}"
    return ""


def _of_the_size(model: nn.Module, given: str) -> str:
    """Where all fits but the length: another guess would be no better than the one that has just failed."""
    first = first_layer(model)
    dims = len(first[1].kernel_size) if first is not None and isinstance(first[1], _ConvNd) else 0
    _, channels, *lengths = [*given.split("x"), ""]
    if first is None or len(lengths) != dims + 1 or channels != str(first[1].in_channels):
        return ""
    sides = "x".join(("DEPTH", "HEIGHT", "WIDTH")[-dims:]) if dims > 1 else "LENGTH"
    return f"give it the size that it was trained on, --input 1x{channels}x{sides} {_IN_PYTHON}"


def _of_the_code(error: Exception) -> str:
    """An error that no shape mends."""
    if not isinstance(error, _OF_CODE):
        return ""
    return f"this {type(error).__name__} is raised by its own code: run model(*inputs) by itself to see where"


def _shape_for(model: nn.Module) -> str:
    """A shape that its first layer takes."""
    first = first_layer(model)
    shapes = shapes_for(first[1], False) if first is not None else iter(())
    return "x".join(map(str, next(shapes, ()))) or _ANY_SHAPE
