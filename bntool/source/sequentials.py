"""The children of an `nn.Sequential(...)` as they are written, and where a newcomer goes between them."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Sequence

import libcst as cst
from torch import nn

from bntool.source.reading import Insertion, SourceFile, Unsafe

_LINE_DONE = re.compile(r"[ \t]*,[ \t]*(#[^\r\n]*)?(?=\r|\n)")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One child: its name, the expression that makes it, and the text that stands for it in the list."""

    name: str
    value: cst.BaseExpression
    whole: cst.CSTNode
    style: str
    """`position`, `keyword`, or the quotation mark of its name in a list of pairs."""


def is_sequential(file: SourceFile, value: cst.BaseExpression) -> bool:
    return _means(file, value, nn.Sequential)


def _means(file: SourceFile, value: cst.BaseExpression, cls: type) -> bool:
    """Whether `value` plainly calls the class `cls`."""
    if not isinstance(value, cst.Call) or not isinstance(value.func, cst.Name | cst.Attribute):
        return False
    try:
        return file.meaning(value.func) is cls
    except Unsafe:
        return False


def entries_of(file: SourceFile, call: cst.Call) -> list[Entry]:
    """The children that a call of `nn.Sequential` is given. `Unsafe` where they are not written out."""
    for arg in call.args:
        if arg.star:
            raise Unsafe(file.line(arg), f"{file.code(arg)} hides the layers of the Sequential")
    if len(call.args) == 1 and _means(file, call.args[0].value, collections.OrderedDict):
        inner = call.args[0].value
        assert isinstance(inner, cst.Call)
        return _named(file, inner)
    return [Entry(str(i), arg.value, arg, "position") for i, arg in enumerate(call.args)]


def _named(file: SourceFile, call: cst.Call) -> list[Entry]:
    if call.args and all(arg.keyword is not None for arg in call.args):
        return [Entry(arg.keyword.value, arg.value, arg, "keyword") for arg in call.args if arg.keyword]
    pairs = call.args[0].value if len(call.args) == 1 and not call.args[0].star else None
    if not isinstance(pairs, cst.List | cst.Tuple):
        raise Unsafe(file.line(call), "the layers of the OrderedDict are not written out as pairs")
    found = []
    for element in pairs.elements:
        pair = element.value
        if not isinstance(pair, cst.Tuple | cst.List) or len(pair.elements) != 2:
            raise Unsafe(file.line(element), "this is not a pair of a name and a layer")
        name = pair.elements[0].value
        if not isinstance(name, cst.SimpleString) or not isinstance(name.evaluated_value, str):
            raise Unsafe(file.line(element), "the name of this layer is computed")
        found.append(Entry(name.evaluated_value, pair.elements[1].value, element, name.quote))
    return found


def inserted_after(file: SourceFile, entries: Sequence[Entry], at: int, name: str, norm: str) -> Insertion:
    """The newcomer behind a child: on a line of its own where the children have lines of their own."""
    entry = entries[at]
    if entry.style == "position":
        text = norm
    elif entry.style == "keyword":
        text = f"{name}={norm}"
    else:
        text = f"({entry.style}{name}{entry.style}, {norm})"
    start, end = file.span(entry.whole)
    following = file.span(entries[at + 1].whole)[0] if at + 1 < len(entries) else None
    own = file.indent(start)
    indent = own if following is None else file.indent(following)
    line_end, newline = file.end_of_line(end)
    if indent is not None and _LINE_DONE.match(file.text, end):
        return Insertion(line_end, f"{newline}{indent}{text},")
    if following is None and own is not None:
        return Insertion(end, f",{newline}{own}{text}")
    return Insertion(end, f", {text}")
