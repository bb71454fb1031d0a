"""A Python file as text and as a syntax tree that knows where everything stands."""

from __future__ import annotations

import dataclasses
import io
import re
import tokenize
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import libcst as cst
from libcst.metadata import CodeRange, MetadataWrapper, ParentNodeProvider, PositionProvider

from bntool.core.errors import LoadError

_BOM = b"\xef\xbb\xbf"
_MISSING = object()
_Node = TypeVar("_Node", bound=cst.CSTNode)


class Unsafe(Exception):
    """An edit that could be wrong: the line it concerns, and why."""

    def __init__(self, line: int, why: str) -> None:
        super().__init__(why)
        self.line, self.why = line, why


@dataclasses.dataclass(frozen=True)
class Insertion:
    """Text to put in before the character at `offset`; nothing is ever taken out."""

    offset: int
    text: str


class SourceFile:
    """One file of the user's, its tree, and the module that Python made of it."""

    def __init__(self, path: Path, module: types.ModuleType) -> None:
        """Read and parse the file; `module` is what its names mean.

        Raises `LoadError` where it cannot be read as Python.
        """
        self.path, self.module = path, module
        self.raw = path.read_bytes()
        try:
            self.encoding, _ = tokenize.detect_encoding(io.BytesIO(self.raw).readline)
            if self.encoding == "utf-8-sig":
                self.encoding = "utf-8"
            self.text = self.raw.removeprefix(_BOM).decode(self.encoding)
            tree = cst.parse_module(self.text)
        except (SyntaxError, ValueError, LookupError, RecursionError, cst.ParserSyntaxError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise LoadError(
                f"{path.name} cannot be read as Python: {lines[0]}",
                where=str(path),
                next_step="leave out --source, or mend the file",
            ) from error
        wrapper = MetadataWrapper(tree, unsafe_skip_copy=True)
        self.tree = wrapper.module
        self._ranges: Mapping[cst.CSTNode, Any] = wrapper.resolve(PositionProvider)
        self._parents: Mapping[cst.CSTNode, Any] = wrapper.resolve(ParentNodeProvider)
        self._starts = [0, *(m.end() for m in re.finditer(r"\r\n|\r|\n", self.text))]
        self.classes: dict[str, list[cst.ClassDef]] = {}
        for node in self.find(cst.ClassDef, self.tree):
            self.classes.setdefault(self._qualified(node), []).append(node)

    # -- the tree ---------------------------------------------------------------------------------------

    def find(self, kind: type[_Node], root: cst.CSTNode) -> Iterator[_Node]:
        """Every node of a kind below `root`, `root` included, in the order of the text."""
        if isinstance(root, kind):
            yield root
        for child in root.children:
            yield from self.find(kind, child)

    def parent(self, node: cst.CSTNode) -> cst.CSTNode | None:
        parent: cst.CSTNode | None = self._parents.get(node)
        return parent

    def above(self, node: cst.CSTNode) -> Iterator[cst.CSTNode]:
        """The nodes around a node, innermost first."""
        parent = self.parent(node)
        while parent is not None:
            yield parent
            parent = self.parent(parent)

    def enclosing(self, kind: type[_Node], node: cst.CSTNode) -> _Node | None:
        return next((around for around in self.above(node) if isinstance(around, kind)), None)

    def class_of(self, cls: type) -> cst.ClassDef:
        """The definition of a class of this file. `Unsafe` where it is not plainly there."""
        found = self.classes.get(cls.__qualname__, [])
        if len(found) == 1:
            return found[0]
        if found:
            raise Unsafe(self.line(found[1]), f"class {cls.__qualname__} is defined more than once")
        raise Unsafe(
            1, f"class {cls.__qualname__} is not defined at the top of the file, nor in a class there"
        )

    def _qualified(self, node: cst.ClassDef) -> str:
        outer = [n.name.value for n in self.above(node) if isinstance(n, cst.ClassDef | cst.FunctionDef)]
        return ".".join([*reversed(outer), node.name.value])

    # -- the text ---------------------------------------------------------------------------------------

    def line(self, node: cst.CSTNode) -> int:
        return int(self._range(node).start.line)

    def span(self, node: cst.CSTNode) -> tuple[int, int]:
        """Where a node's text starts and ends, parentheses around it left out, as offsets of characters."""
        where = self._range(node)
        start = self._starts[where.start.line - 1] + where.start.column
        return start, self._starts[where.end.line - 1] + where.end.column

    def code(self, node: cst.CSTNode) -> str:
        start, end = self.span(node)
        return self.text[start:end]

    def end_of_line(self, offset: int) -> tuple[int, str]:
        """Where the line that holds `offset` ends, before its newline, and what newline that is."""
        match = re.compile(r"\r\n|\r|\n").search(self.text, offset)
        if match is None:
            return len(self.text), self.tree.default_newline
        return match.start(), match.group()

    def indent(self, offset: int) -> str | None:
        """The blanks before `offset`, where nothing else stands before it on its line."""
        start = max(s for s in self._starts if s <= offset)
        before = self.text[start:offset]
        return before if not before.strip() else None

    def _range(self, node: cst.CSTNode) -> CodeRange:
        where = self._ranges[node]
        assert isinstance(where, CodeRange)
        return where

    def edited(self, insertions: Sequence[Insertion]) -> str:
        """The text with every insertion made; of two at one place the first given comes first."""
        text = self.text
        for _, made in sorted(enumerate(insertions), key=lambda e: (e[1].offset, e[0]), reverse=True):
            text = text[: made.offset] + made.text + text[made.offset :]
        return text

    def encoded(self, text: str) -> bytes:
        """A text as the bytes of this file: its encoding, and its byte order mark if it has one."""
        return (_BOM if self.raw.startswith(_BOM) else b"") + text.encode(self.encoding)

    # -- names ------------------------------------------------------------------------------------------

    def meaning(self, node: cst.BaseExpression) -> Any:
        """What a dotted name means where it stands. `Unsafe` where it is not known from the file alone."""
        if isinstance(node, cst.Name):
            if node.value in self._locals(node):
                raise Unsafe(self.line(node), f"{node.value} is a local name, so that what it means may vary")
            found = getattr(self.module, node.value, _MISSING)
        elif isinstance(node, cst.Attribute):
            found = getattr(self.meaning(node.value), node.attr.value, _MISSING)
        else:
            raise Unsafe(self.line(node), "what is called here is not a plain name")
        if found is _MISSING:
            raise Unsafe(self.line(node), f"{self.code(node)} is not known at the top of the file")
        return found

    def _locals(self, node: cst.CSTNode) -> set[str]:
        """The names that the function around a node binds."""
        function = self.enclosing(cst.FunctionDef, node)
        if function is None:
            return set()
        return {p.name.value for p in self.find(cst.Param, function)} | self.bound_in(function)

    def bound_in(self, function: cst.FunctionDef) -> set[str]:
        """The names that a function's statements bind."""
        targets: list[cst.CSTNode] = [t.target for t in self.find(cst.AssignTarget, function)]
        targets += [a.target for a in self.find(cst.AugAssign, function)]
        targets += [a.target for a in self.find(cst.AnnAssign, function)]
        targets += [w.target for w in self.find(cst.NamedExpr, function)]
        targets += [loop.target for loop in self.find(cst.For, function)]
        targets += [loop.target for loop in self.find(cst.CompFor, function)]
        targets += [node.name for node in self.find(cst.AsName, function)]
        names = {name for target in targets for name in _bound(target)}
        for alias in self.find(cst.ImportAlias, function):
            names.add(alias.evaluated_alias or alias.evaluated_name.partition(".")[0])
        return names


def _bound(target: cst.CSTNode) -> Iterator[str]:
    """The names that an assignment to `target` binds: not those that it only looks into."""
    if isinstance(target, cst.Name):
        yield target.value
    elif isinstance(target, cst.Tuple | cst.List):
        for element in target.elements:
            yield from _bound(element.value)
