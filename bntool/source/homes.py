"""Where the text of a file makes a layer: the class, the assignment, or the `nn.Sequential` written out."""

from __future__ import annotations

import itertools

import libcst as cst
from torch import nn

from bntool.core.sites import InsertSite
from bntool.source.mentions import Assignment, Family, methods
from bntool.source.reading import SourceFile, Unsafe
from bntool.source.sequentials import is_sequential


class Homes:
    """Finds the lines that make the layers of a model. What cannot be told for certain is `Unsafe`.

    Args:
        file: that defines the model's classes.
        attribute: the name in the file that made the model.
        model: whose layers they are.
    """

    def __init__(self, file: SourceFile, attribute: str, model: nn.Module) -> None:
        self.file, self.attribute, self.model = file, attribute, model
        self.modules = dict(model.named_modules())
        self.families: dict[type, Family] = {}

    def home(self, site: InsertSite) -> tuple[type | None, str, tuple[str, ...]]:
        """The class of the file whose lines make the layer, its instance, and the way from there."""
        parts = site.conv.split(".") if site.conv else []
        between = ""
        for depth in range(len(parts) - 1, -1, -1):
            owner = ".".join(parts[:depth])
            module, path = self.modules[owner], tuple(parts[depth:])
            if type(module).__module__ == self.file.module.__name__:
                home = self._maker(type(module), path)
                if between:
                    line = self.line_of(home, path)
                    raise Unsafe(line, f"the layer stands inside {between}, not in a plain Sequential")
                return home, owner, path
            if type(module) is not nn.Sequential and not between:
                between = f"a {type(module).__name__}"
        root = type(self.model)
        if root is nn.Sequential and parts and not between:
            return None, "", tuple(parts)
        raise Unsafe(1, f"{root.__module__}.{root.__qualname__} is not defined in this file")

    def _maker(self, cls: type, path: tuple[str, ...]) -> type:
        """The class in the inheritance of `cls` that assigns the first step of the way."""
        if issubclass(cls, nn.Sequential) and path[0] in self._children_of(cls):
            return cls
        for base in cls.__mro__:
            if base.__module__ == self.file.module.__name__ and self.assigned(base, path[0]):
                return base
        node = self.file.class_of(cls)
        for call in self.file.find(cst.Call, node):
            if self.file.code(call.func) in ("setattr", "self.add_module", "self.register_module"):
                raise Unsafe(self.file.line(call), "layers are given to self by a call, not by name")
        raise Unsafe(self.file.line(node), f"no statement here assigns self.{path[0]}")

    def _children_of(self, cls: type[nn.Module]) -> set[str]:
        """The names of the children that instances of a class have."""
        found: set[str] = set()
        for module in self.modules.values():
            if isinstance(module, cls):
                found |= set(module._modules)
        return found

    def assigned(self, cls: type, name: str) -> list[Assignment]:
        node = self.file.class_of(cls)
        found = self.family(cls).assignments(name)
        return [a for a in found if self.file.enclosing(cst.ClassDef, a.statement) is node]

    def line_of(self, home: type, path: tuple[str, ...]) -> int:
        assigned = self.assigned(home, path[0])
        return self.file.line(assigned[0].statement if assigned else self.file.class_of(home))

    def family(self, cls: type) -> Family:
        if cls not in self.families:
            self.families[cls] = Family(self.file, self.file.class_of(cls))
        return self.families[cls]

    def root_literal(self) -> cst.Call:
        """The `nn.Sequential(...)` that a function returns, or that stands at the top of the file."""
        made: list[cst.BaseExpression | None] = []
        for statement in self.file.tree.body:
            if isinstance(statement, cst.FunctionDef) and statement.name.value == self.attribute:
                made += [node.value for node in self.file.find(cst.Return, statement)]
            for assign in self.file.find(cst.Assign, statement):
                names = [t.target.value for t in assign.targets if isinstance(t.target, cst.Name)]
                at_top = self.file.enclosing(cst.FunctionDef, assign) is None
                if at_top and self.attribute in names:
                    made.append(assign.value)
        value = made[0] if len(made) == 1 else None
        if value is None or not is_sequential(self.file, value):
            line = self.file.line(value) if value is not None else 1
            raise Unsafe(line, f"{self.attribute} is not one nn.Sequential(...) written out")
        assert isinstance(value, cst.Call)
        for node in self.file.find(cst.Subscript, self.file.tree):
            if isinstance(node.value, cst.Name) and node.value.value == self.attribute:
                raise Unsafe(self.file.line(node), f"{self.file.code(node)} takes a layer by its number")
        return value

    def own_children(self, home: type) -> cst.Call:
        """The `super().__init__(...)` that gives a subclass of Sequential its children."""
        node = self.file.class_of(home)
        for method in methods(node, "forward"):
            raise Unsafe(self.file.line(method), "a Sequential with a forward of its own")
        for part in self.file.find(cst.Subscript, node):
            if isinstance(part.value, cst.Name) and part.value.value == "self":
                raise Unsafe(self.file.line(part), f"{self.file.code(part)} takes a layer by its number")
        for name, module in self.modules.items():
            owner, _, own = name.rpartition(".")
            if isinstance(module, home) and own.isidentifier():
                self.require_not_numbered(own)
                if type(self.modules[owner]).__module__ == self.file.module.__name__:
                    self.family(type(self.modules[owner])).require_plain_container(own)
        calls = [c for c in self.file.find(cst.Call, node) if self._is_super_init(c)]
        if len(calls) != 1:
            raise Unsafe(self.file.line(node), "its layers are not written out in one super().__init__(...)")
        return calls[0]

    def _is_super_init(self, call: cst.Call) -> bool:
        func = call.func
        if not isinstance(func, cst.Attribute) or func.attr.value != "__init__":
            return False
        return isinstance(func.value, cst.Call) and self.file.code(func.value.func) == "super"

    def local(self, name: cst.Name) -> cst.BaseExpression:
        """What a local name was given, once, in the same function, and never handed on but here."""
        function = self.file.enclosing(cst.FunctionDef, name)
        why = f"the layer {name.value} is made elsewhere"
        if function is None:
            raise Unsafe(self.file.line(name), why)
        values = []
        for other in self.file.find(cst.Name, function):
            parent = self.file.parent(other)
            if other is name or other.value != name.value:
                continue
            if isinstance(parent, cst.AssignTarget):
                assign = self.file.parent(parent)
                assert isinstance(assign, cst.Assign)
                if len(assign.targets) > 1:
                    raise Unsafe(self.file.line(other), f"{name.value} is assigned with another name")
                values.append(assign.value)
            elif (isinstance(parent, cst.Attribute) and parent.value is not other) or isinstance(
                parent, cst.Attribute | cst.Comparison | cst.ComparisonTarget
            ):
                continue
            else:
                raise Unsafe(self.file.line(other), f"the layer {name.value} is handed on here too")
        if len(values) != 1:
            raise Unsafe(self.file.line(name), why)
        for around in self.file.above(values[0]):
            if isinstance(around, cst.For | cst.While):
                raise Unsafe(self.file.line(values[0]), "it stands in a loop")
        return values[0]

    def require_not_numbered(self, name: str) -> None:
        """`Unsafe` where the file counts the children of a Sequential of this name, or knows their keys."""
        for node in self.file.find(cst.Subscript, self.file.tree):
            if isinstance(node.value, cst.Attribute) and node.value.attr.value == name:
                raise Unsafe(self.file.line(node), f"{self.file.code(node)} takes a layer by its number")
        for string in self.file.find(cst.SimpleString, self.file.tree):
            parts = str(string.evaluated_value).split(".")
            for before, number in itertools.pairwise(parts):
                if before == name and number.isdecimal():
                    raise Unsafe(self.file.line(string), f"{string.value} names a layer by its number")
