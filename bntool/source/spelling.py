"""How the new layer is written: `nn.BatchNorm2d(16)` beside `nn.Conv2d(3, 16, 3)`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import libcst as cst
import torch
from torch import nn

from bntool.core.sites import InsertSite
from bntool.source.reading import Insertion, SourceFile, Unsafe

_DEFAULTS = {"eps": 1e-5, "momentum": 0.1, "affine": True}
_PLACED = ("device", "dtype")


@dataclasses.dataclass(frozen=True)
class Spelled:
    """The call that makes the new layer, and what the file's imports need for it."""

    text: str
    imports: tuple[Insertion, ...] = ()


def require_maker(file: SourceFile, value: cst.BaseExpression, cls: type) -> cst.Call:
    """`value` as the call that makes a layer of class `cls`. `Unsafe` where it is another thing."""
    line = file.line(value)
    if isinstance(value, cst.IfExp):
        raise Unsafe(line, "a condition chooses which layer it is")
    if not isinstance(value, cst.Call):
        raise Unsafe(line, f"the layer is made elsewhere: here stands {file.code(value)}")
    if isinstance(value.func, cst.Attribute | cst.Name):
        meaning = file.meaning(value.func)
    else:
        raise Unsafe(line, "what is called here is not a plain name")
    if meaning is cls:
        return value
    name = file.code(value.func)
    if isinstance(meaning, type):
        raise Unsafe(line, f"{name} stands here, the model that was built has a {cls.__name__} there")
    raise Unsafe(line, f"{name} is a factory: what it makes is not written here")


def spelled(
    file: SourceFile, call: cst.Call, site: InsertSite, options: Mapping[str, Any], layer: str, moved: bool
) -> Spelled:
    """The new layer for the one that `call` makes and `layer` (an expression, or "") names.

    `moved`: it is written where other values may have been given to the names of the call.
    """
    channels = _channels(file, call, layer, moved)
    arguments = [channels]
    arguments += [f"{k}={options[k]!r}" for k, v in _DEFAULTS.items() if options.get(k, v) != v]
    for arg in call.args:
        if arg.keyword is not None and arg.keyword.value in _PLACED:
            if not _is_simple(arg.value):
                raise Unsafe(file.line(arg), f"{file.code(arg)} may not mean the same twice")
            arguments.append(f"{arg.keyword.value}={file.code(arg.value)}")
    norm = "SyncBatchNorm" if options.get("sync") else f"BatchNorm{site.dims}d"
    name, imports = _class_name(file, call.func, norm)
    return Spelled(f"{name}({', '.join(arguments)})", imports)


def _channels(file: SourceFile, call: cst.Call, layer: str, moved: bool) -> str:
    """The number of channels as the call writes it, so that it stays right; else as the layer knows it."""
    cls = file.meaning(call.func)
    expression = _out_channels(file, call) if _takes_stock_arguments(cls) else None
    if expression is not None and _is_simple(expression):
        function = file.enclosing(cst.FunctionDef, call)
        bound = file.bound_in(function) if function is not None and moved else set()
        if not any(name.value in bound for name in file.find(cst.Name, expression)):
            code = file.code(expression)
            if "\n" not in code and "\r" not in code:
                return code
    if not layer:
        raise Unsafe(file.line(call), "its number of channels is not a plain expression")
    return f"{layer}.{'out_features' if issubclass(cls, nn.Linear) else 'out_channels'}"


def _takes_stock_arguments(cls: type) -> bool:
    """Whether a layer class is PyTorch's, or a subclass without an `__init__` of its own."""
    owner = next(base for base in cls.__mro__ if "__init__" in vars(base))
    return owner.__module__.startswith("torch.nn.modules.")


def _out_channels(file: SourceFile, call: cst.Call) -> cst.BaseExpression | None:
    for arg in call.args:
        if arg.star:
            raise Unsafe(file.line(call), f"{arg.star} hides its number of channels")
        if arg.keyword is not None and arg.keyword.value in ("out_channels", "out_features"):
            return arg.value
    positional = [arg.value for arg in call.args if arg.keyword is None]
    return positional[1] if len(positional) > 1 else None


def _is_simple(node: cst.BaseExpression) -> bool:
    """Whether evaluating it once more gives the same and does nothing else."""
    if isinstance(node, cst.Name | cst.Integer | cst.SimpleString):
        return True
    if isinstance(node, cst.Attribute):
        return _is_simple(node.value)
    if isinstance(node, cst.BinaryOperation):
        return _is_simple(node.left) and _is_simple(node.right)
    if isinstance(node, cst.UnaryOperation):
        return _is_simple(node.expression)
    if isinstance(node, cst.Subscript) and len(node.slice) == 1:
        index = node.slice[0].slice
        return isinstance(index, cst.Index) and _is_simple(node.value) and _is_simple(index.value)
    if isinstance(node, cst.Call) and isinstance(node.func, cst.Name):
        known = node.func.value in ("int", "max", "min", "round", "abs")
        return known and all(not arg.star and _is_simple(arg.value) for arg in node.args)
    return False


def _class_name(file: SourceFile, func: cst.BaseExpression, norm: str) -> tuple[str, tuple[Insertion, ...]]:
    """The class as this file names it; where it has no name for it, the import that gives it one."""
    wanted = getattr(nn, norm)
    if isinstance(func, cst.Attribute) and getattr(file.meaning(func.value), norm, None) is wanted:
        return f"{file.code(func.value)}.{norm}", ()
    if getattr(file.module, norm, None) is wanted:
        return norm, ()
    if hasattr(file.module, norm):
        raise Unsafe(file.line(func), f"{norm} means something else in this file")
    for statement in file.find(cst.ImportFrom, file.tree):
        if file.enclosing(cst.FunctionDef, statement) is None and _gives(statement, func):
            last = statement.names[-1] if not isinstance(statement.names, cst.ImportStar) else None
            assert last is not None
            return norm, (Insertion(file.span(last)[1], f", {norm}"),)
    for name, meaning in vars(file.module).items():
        if meaning is nn:
            return f"{name}.{norm}", ()
        if meaning is torch:
            return f"{name}.nn.{norm}", ()
    raise Unsafe(file.line(func), f"the file has no name for {norm}; import torch.nn in it")


def _gives(statement: cst.ImportFrom, func: cst.BaseExpression) -> bool:
    """Whether this is the `from torch.nn import Conv2d` that brought a bare class name in."""
    if statement.module is None or isinstance(statement.names, cst.ImportStar):
        return False
    if cst.Module([]).code_for_node(statement.module) != "torch.nn" or not isinstance(func, cst.Name):
        return False
    return any((a.evaluated_alias or a.evaluated_name) == func.value for a in statement.names)
