"""Whether the code of a model reaches into a Sequential other than by calling it: a sibling would shift that.

It may do so where no input of ours leads, so the text of its classes is read. An expression that stands for
the Sequential may be called, asked for what does not hang on its children's places, and given another name,
which is followed. Anything else (an index, a slice, `len`, a loop, being handed on) counts.
"""

from __future__ import annotations

import ast
import dis
import functools
import inspect
import textwrap
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType
from typing import Any

from torch import nn

_ORDERED = frozenset(
    {"children", "named_children", "_modules", "get_submodule", "__getitem__", "__len__", "__iter__", "pop"}
)
"""What a Sequential gives by the places of its children."""

_OF_CONTAINERS = frozenset({"values", "items", "keys"})
_ASKING = frozenset({"isinstance", "issubclass", "hasattr", "type", "id", "print", "callable", "repr", "str"})
_CALLING = frozenset({"checkpoint"})
"""Functions that call a layer that they are given."""

_IN_TURN = frozenset({"enumerate", "zip", "reversed", "list", "tuple", "iter", "sorted"})


def is_reached_into(model: nn.Module, sequential: str) -> bool:
    """Whether the code of a class in the model, or of a function that it calls, takes the children of the
    Sequential of this qualified name by their places.

    Args:
        model: whose classes are read, all but PyTorch's own.
        sequential: as `named_modules` has it; the model itself, `""`, is reached by its own methods alone.
    """
    own = type(model.get_submodule(sequential))
    classes: set[Any] = {type(module) for module in model.modules()}
    return any(
        _reaches(cls, name, depth, cls is own and cls is not nn.Sequential)
        for name, depth in _attributes(model, sequential)
        for cls in classes
    )


def _attributes(model: nn.Module, sequential: str) -> Iterator[tuple[str, int]]:
    """The names by which code can come to it, each with the number of containers that lie between."""
    parts = sequential.split(".")
    for at in reversed(range(len(parts))):
        if parts[at].isidentifier() or not sequential:
            yield parts[at], len(parts) - 1 - at
        around = model.get_submodule(".".join(parts[:at]))
        if not isinstance(around, nn.Sequential | nn.ModuleList | nn.ModuleDict):
            return


@functools.cache
def _reaches(cls: Any, name: str, depth: int, is_itself: bool) -> bool:
    for function in _functions_of(cls):
        tree = _tree_of(function)
        if tree is None:
            if _may_reach(function.__code__, name):
                return True
            continue
        owner = tree.args.args[0].arg if is_itself and tree.args.args else ""
        if _Reader(name, depth, {owner: 0} if owner else {}).finds(tree):
            return True
    return False


def _functions_of(cls: type) -> Iterator[FunctionType]:
    """The methods of a class, inherited ones too, and the functions of its modules that they name."""
    bases = [base for base in cls.__mro__ if base.__module__.partition(".")[0] not in ("torch", "builtins")]
    waiting = [found for base in bases for value in vars(base).values() for found in _plain(value)]
    seen: set[CodeType] = set()
    while waiting:
        function = waiting.pop()
        if function.__code__ in seen:
            continue
        seen.add(function.__code__)
        yield function
        named = (function.__globals__.get(name) for name in function.__code__.co_names)
        waiting += [
            other
            for other in named
            if isinstance(other, FunctionType) and other.__module__ == function.__module__
        ]


def _plain(value: Any) -> Iterator[FunctionType]:
    """The functions behind a method, a property, a class method or what a decorator has wrapped."""
    if isinstance(value, property):
        for part in (value.fget, value.fset):
            yield from _plain(part)
        return
    found = inspect.unwrap(getattr(value, "__func__", value))
    if isinstance(found, FunctionType):
        yield found


def _tree_of(function: FunctionType) -> ast.FunctionDef | None:
    """The text of a function; None where there is none to be had."""
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, TypeError, SyntaxError, ValueError, IndentationError):
        return None
    return tree if isinstance(tree, ast.FunctionDef) else None


_TAKING = ("[]", "len", "getattr")


def _may_reach(code: CodeType, name: str) -> bool:
    """The same of code without a text: whether it names the attribute, and takes anything by its place."""
    codes = [code, *(const for const in code.co_consts if isinstance(const, CodeType))]
    steps = [step for one in codes for step in dis.get_instructions(one)]
    takes = any(step.opname.startswith(("BINARY_S", "FOR_ITER")) or step.argrepr in _TAKING for step in steps)
    return code.co_name != "__init__" and takes and any(name in one.co_names for one in codes)


class _Reader(ast.NodeVisitor):
    """Reads one function. `depth` is how many containers lie around the Sequential below the attribute."""

    def __init__(self, name: str, depth: int, known: dict[str, int]) -> None:
        self.name, self.depth, self.known = name, depth, known
        self.found = False

    def finds(self, function: ast.FunctionDef) -> bool:
        if function.name == "__init__":  # before the insertion; functions that it makes are called behind it
            made = [node for node in ast.walk(function) if isinstance(node, ast.FunctionDef | ast.Lambda)]
            bodies: Iterable[ast.AST] = [node for node in made if node is not function]
        else:
            bodies = [function]
        for body in bodies:
            for _ in range(2):  # a name may be used in a loop before the line that gives it
                self.visit(body)
        return self.found

    def depth_of(self, node: ast.AST | None) -> int | None:
        """How many containers lie between an expression and the Sequential; None where it is neither."""
        if isinstance(node, ast.Name):
            return self.known.get(node.id)
        if isinstance(node, ast.Attribute):
            if node.attr == self.name:
                return self.depth
            around = self.depth_of(node.value)
            return around if around and node.attr in _OF_CONTAINERS else None
        if isinstance(node, ast.Call):
            return self._depth_of_call(node)
        if isinstance(node, ast.Subscript):
            around = self.depth_of(node.value)
            if isinstance(node.value, ast.Attribute) and node.value.attr == "_modules":
                return self._named(node.slice)
            return None if not around else around if isinstance(node.slice, ast.Slice) else around - 1
        if isinstance(node, ast.IfExp):
            return self._least(node.body, node.orelse)
        if isinstance(node, ast.BoolOp):
            return self._least(*node.values)
        if isinstance(node, ast.NamedExpr | ast.Starred):
            return self.depth_of(node.value)
        if isinstance(node, ast.List | ast.Tuple | ast.Set):
            inner = self._least(*node.elts)
            return None if inner is None else inner + 1
        return None

    def _depth_of_call(self, node: ast.Call) -> int | None:
        called = node.func
        if isinstance(called, ast.Name) and called.id == "getattr" and len(node.args) > 1:
            return self._named(node.args[1])
        if isinstance(called, ast.Name) and called.id in _IN_TURN:
            return self._least(*node.args)
        if isinstance(called, ast.Attribute):
            if called.attr == "get_submodule" and node.args:
                return self._named(node.args[0])
            if called.attr in ("children", "named_children"):
                return 1
            around = self.depth_of(called.value)
            if around and called.attr in _OF_CONTAINERS:
                return around
        return None

    def _named(self, text: ast.AST) -> int | None:
        """What is fetched by a name: by one that is computed it may be any."""
        if not isinstance(text, ast.Constant):
            return 0
        first, *rest = str(text.value).split(".")
        parts = [first, *rest]
        if self.name not in parts:
            return None
        left = self.depth - (len(parts) - 1 - parts.index(self.name))
        self.found |= left < 0  # one of its children
        return max(left, 0)

    def _least(self, *nodes: ast.AST) -> int | None:
        return min((d for d in map(self.depth_of, nodes) if d is not None), default=None)

    # -- what is done with it -----------------------------------------------------------------------------

    def _give(self, target: ast.AST, depth: int) -> None:
        if isinstance(target, ast.Name):
            self.known[target.id] = min(depth, self.known.get(target.id, depth))
        elif isinstance(target, ast.Tuple | ast.List):
            for part in target.elts:
                self._give(part, depth)
        elif isinstance(target, ast.Starred):
            self._give(target.value, depth)
        elif not (isinstance(target, ast.Attribute) and target.attr == self.name):
            self.found = True  # kept where it is not followed

    def _reach(self, node: ast.AST | None) -> None:
        if node is not None and self.depth_of(node) == 0:
            self.found = True

    def _loop(self, target: ast.AST, over: ast.AST) -> None:
        depth = self.depth_of(over)
        if depth == 0:
            self.found = True
        elif depth is not None:
            self._give(target, depth - 1)

    def visit_Assign(self, node: ast.Assign) -> None:
        depth = self.depth_of(node.value)
        for target in node.targets:
            if depth is not None:
                self._give(target, depth)
        self.generic_visit(node)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        depth = self.depth_of(node.value)
        if depth is not None:
            self._give(node.target, depth)
        self.generic_visit(node)

    def visit_For(self, node: ast.For) -> None:
        self._loop(node.target, node.iter)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self._loop(node.target, node.iter)
        self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        self._reach(node.value)
        self.generic_visit(node)

    def visit_Starred(self, node: ast.Starred) -> None:
        self._reach(node.value)
        self.generic_visit(node)

    def visit_Return(self, node: ast.Return) -> None:
        self._reach(node.value)
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if node.attr in _ORDERED:
            self._reach(node.value)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        self.depth_of(node)  # a name that leads to one of its children is found there
        called = node.func
        name = called.id if isinstance(called, ast.Name) else getattr(called, "attr", "")
        if name not in _ASKING | _CALLING:
            for argument in (*node.args, *(keyword.value for keyword in node.keywords)):
                inner = self.depth_of(argument)
                if inner == 0 or (inner and name not in _IN_TURN | {"len"}):
                    self.found = True
        self.generic_visit(node)
