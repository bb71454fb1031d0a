"""What the classes of a file say of `self.NAME`: where it is made, where it is called, and anything else."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator

import libcst as cst

from bntool.source.reading import SourceFile, Unsafe

_LAYER_READS = frozenset(
    "weight bias in_channels out_channels in_features out_features kernel_size stride padding dilation "
    "groups parameters named_parameters requires_grad_ state_dict".split()
)
_CONTAINER_READS = frozenset("parameters named_parameters requires_grad_ modules apply train eval to".split())


@dataclasses.dataclass(frozen=True)
class Assignment:
    """One statement `self.NAME = value`."""

    statement: cst.SimpleStatementLine
    value: cst.BaseExpression
    owner: str
    """What `self` is called there."""


class Family:
    """A class of the file with all that it inherits from and that inherits from it, in this file."""

    def __init__(self, file: SourceFile, home: cst.ClassDef) -> None:
        self.file = file
        self.classes = _related(file, home)
        self._mentions: dict[str, list[tuple[cst.Attribute, str]]] = {}
        for cls in self.classes:
            for method in _methods(cls):
                self._collect(method)

    def _collect(self, method: cst.FunctionDef) -> None:
        owner = method.params.params[0].name.value
        for node in self.file.find(cst.Attribute, method):
            if isinstance(node.value, cst.Name) and node.value.value == owner:
                self._mentions.setdefault(node.attr.value, []).append((node, owner))

    @property
    def names(self) -> Collection[str]:
        """Every NAME of a `self.NAME`."""
        return self._mentions.keys()

    def assignments(self, name: str) -> list[Assignment]:
        """Where `self.NAME` is made. `Unsafe` where one of them is more than a plain statement."""
        found = []
        for node, owner in self._mentions.get(name, ()):
            made = self._assignment(node, owner)
            if made is not None:
                found.append(made)
        return found

    def _assignment(self, node: cst.Attribute, owner: str) -> Assignment | None:
        parent = self.file.parent(node)
        line = self.file.line(node)
        if isinstance(parent, cst.Element):
            tuple_of = self.file.parent(parent)
            if tuple_of is not None and isinstance(self.file.parent(tuple_of), cst.AssignTarget):
                raise Unsafe(line, f"{self.file.code(node)} is one of several targets of an assignment")
            return None
        if isinstance(parent, cst.AssignTarget):
            assign = self.file.parent(parent)
            assert isinstance(assign, cst.Assign)
            if len(assign.targets) > 1:
                raise Unsafe(line, f"{self.file.code(node)} is assigned together with another name")
            value = assign.value
        elif isinstance(parent, cst.AnnAssign) and parent.target is node:
            if parent.value is None:
                return None
            assign, value = parent, parent.value
        else:
            return None
        statement = self.file.parent(assign)
        if not isinstance(statement, cst.SimpleStatementLine) or len(statement.body) > 1:
            raise Unsafe(line, "several statements stand on this line")
        self.require_straight(statement, line)
        return Assignment(statement, value, owner)

    def require_straight(self, node: cst.CSTNode, line: int) -> None:
        """`Unsafe` where a node stands in a loop or in a function of its own inside the method."""
        for around in self.file.above(node):
            if isinstance(around, cst.For | cst.While | cst.CompFor | cst.BaseComp):
                raise Unsafe(line, "it stands in a loop")
            if isinstance(around, cst.Lambda):
                raise Unsafe(line, "it stands in a lambda")
            if isinstance(around, cst.FunctionDef):
                if self.file.enclosing(cst.FunctionDef, around) is not None:
                    raise Unsafe(line, f"it stands in a function inside a method ({around.name.value})")
                return

    def call_of(self, name: str) -> tuple[cst.Call, str]:
        """The one place that calls `self.NAME`, and what `self` is called there."""
        calls = []
        for node, owner in self._others(name, _LAYER_READS, "layer"):
            parent = self.file.parent(node)
            assert isinstance(parent, cst.Call)
            calls.append((parent, owner))
        if not calls:
            line = self.file.line(self._mentions[name][0][0])
            raise Unsafe(line, f"nothing calls self.{name} by its name")
        if len(calls) > 1:
            first = self.file.line(calls[0][0])
            raise Unsafe(self.file.line(calls[1][0]), f"self.{name} is called here and in line {first}")
        call, owner = calls[0]
        self.require_straight(call, self.file.line(call))
        self._require_no_reaching_by_other_ways(name)
        return call, owner

    def require_plain_container(self, name: str) -> None:
        """`Unsafe` where anything but a call reaches into the Sequential `self.NAME`."""
        for _ in self._others(name, _CONTAINER_READS, "Sequential"):
            pass

    def _others(self, name: str, reads: Collection[str], what: str) -> Iterator[tuple[cst.Attribute, str]]:
        """The calls among the mentions; `Unsafe` for one that is no call, harmless reading or assignment."""
        for node, owner in self._mentions.get(name, ()):
            parent = self.file.parent(node)
            if isinstance(parent, cst.Call) and parent.func is node:
                yield node, owner
            elif isinstance(parent, cst.AssignTarget | cst.AnnAssign) or (
                isinstance(parent, cst.Attribute) and parent.attr.value in reads
            ):
                continue
            elif isinstance(parent, cst.Subscript) and parent.value is node:
                raise Unsafe(self.file.line(node), f"{self.file.code(parent)} takes a layer by its number")
            else:
                raise Unsafe(self.file.line(node), f"the {what} self.{name} is handed on under another name")

    def _require_no_reaching_by_other_ways(self, name: str) -> None:
        for cls in self.classes:
            for method in _methods(cls):
                owner = method.params.params[0].name.value
                for call in self.file.find(cst.Call, method):
                    if self._computed_name(call, owner, name):
                        raise Unsafe(self.file.line(call), "getattr may reach the layer by a computed name")
                if method.name.value == "__init__":
                    continue
                for node in self.file.find(cst.Attribute, method):
                    of_self = isinstance(node.value, cst.Name) and node.value.value == owner
                    if of_self and node.attr.value in ("children", "named_children", "_modules"):
                        raise Unsafe(
                            self.file.line(node), f"{self.file.code(node)} reaches the layers in turn"
                        )

    @staticmethod
    def _computed_name(call: cst.Call, owner: str, name: str) -> bool:
        if not isinstance(call.func, cst.Name) or call.func.value != "getattr" or len(call.args) < 2:
            return False
        of, which = call.args[0].value, call.args[1].value
        if not isinstance(of, cst.Name) or of.value != owner:
            return False
        return not isinstance(which, cst.SimpleString) or which.evaluated_value == name


def _methods(cls: cst.ClassDef) -> Iterator[cst.FunctionDef]:
    for node in cls.body.body:
        if isinstance(node, cst.FunctionDef) and node.params.params:
            yield node


def methods(cls: cst.ClassDef, name: str) -> list[cst.FunctionDef]:
    """The methods of that name that a class body defines."""
    return [method for method in _methods(cls) if method.name.value == name]


def _related(file: SourceFile, home: cst.ClassDef) -> list[cst.ClassDef]:
    everyone = [cls for group in file.classes.values() for cls in group]
    related = [home]
    for cls in related:
        for other in everyone:
            if other not in related and (_inherits(other, cls) or _inherits(cls, other)):
                related.append(other)
    return related


def _inherits(cls: cst.ClassDef, base: cst.ClassDef) -> bool:
    for arg in cls.bases:
        value = arg.value
        name = value.attr if isinstance(value, cst.Attribute) else value
        if isinstance(name, cst.Name) and name.value == base.name.value:
            return True
    return False
