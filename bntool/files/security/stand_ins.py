"""A pickle as a picture: read with every name in it replaced by a stand-in that holds state and runs nothing.

Python's own unpickler in Python, whose calls all end here. No name is looked up and nothing is imported, so
every protocol and every hostile file may be read.
"""

from __future__ import annotations

import dataclasses
import io
import pickle
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

from torch._utils import IMPORT_MAPPING, NAME_MAPPING

from bntool.files.security.pickled_calls import REBUILD_PARAMETER, REBUILD_TENSOR, item_bytes, shown

_REGISTRIES = ("_parameters", "_buffers", "_modules")
_MAX_DEPTH = 500
_KEYS = (str, bytes, int, float, bool, type(None))


@dataclasses.dataclass(eq=False)
class Name:
    """A class or function that the pickle refers to."""

    full: str


@dataclasses.dataclass(eq=False)
class StandIn:
    """What calling or instantiating `name` would have given: the arguments, and what was put into it."""

    name: str
    args: tuple[Any, ...] = ()
    state: Any = None
    items: list[Any] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class PicturedTensor:
    """A tensor in a picture: its qualified name, torch dtype and shape, where its numbers are kept.

    `flipped`: they are the negative or the conjugate of what is kept.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    storage: str
    flipped: bool = False


class Picture(pickle._Unpickler):
    """Reads one pickle. `globals` are the names that it refers to; `value` what it would have built."""

    stack: list[Any]
    append: Callable[[Any], None]
    read: Callable[[int], bytes]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, content: bytes) -> None:
        self.file = io.BytesIO(content)
        super().__init__(self.file, encoding="latin1")
        self.globals: set[str] = set()
        self.value: Any = None
        self.damage = ""

    def read_all(self) -> Picture:
        """Read up to STOP; what ends early keeps what was found, and says so in `damage`."""
        try:
            self.value = super().load()
        except Exception as error:  # noqa: BLE001  any error can come out of a damaged pickle
            self.damage = str(error) or type(error).__name__
            stack = [*getattr(self, "metastack", []), getattr(self, "stack", [])]
            self.value = [item for level in stack for item in level]
        return self

    def find_class(self, module: str, name: str, /) -> Any:
        # Python 2 wrote other names for the same.
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        full = f"{module}.{name}"
        self.globals.add(full)
        return Name(full)

    def persistent_load(self, pid: Any, /) -> Any:
        args = pid if isinstance(pid, tuple) else (pid,)
        # The format before PyTorch 1.6 kept a class's source code beside its name.
        named = len(args) > 1 and args[0] == "module" and isinstance(args[1], Name)
        return args[1] if named else StandIn("persistent", args)

    def get_extension(self, code: int) -> None:
        self.append(StandIn(f"extension {code}"))

    def _call(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        self.append(_made(function, args))

    def _call_with_keywords(self) -> None:
        keywords, args, function = self.stack.pop(), self.stack.pop(), self.stack.pop()
        self.append(dataclasses.replace(_made(function, args), state=keywords))

    def _instantiate(self, klass: Any, args: list[Any]) -> None:
        self.append(_made(klass, tuple(args)))

    def _build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, StandIn):
            target.state = state

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _put(self.stack[-1], [key, value])

    def _set_items(self) -> None:
        items = self.pop_mark()
        _put(self.stack[-1], items)

    def _append(self) -> None:
        value = self.stack.pop()
        _add(self.stack[-1], [value])

    def _append_many(self) -> None:
        items = self.pop_mark()
        _add(self.stack[-1], items)

    def _dict(self) -> None:
        items = self.pop_mark()
        made: dict[Any, Any] = {}
        _put(made, items)
        self.append(made)

    def _set(self) -> None:
        # As a list: members need no hash, which nested tuples can make endless.
        self.append([])

    def _frozen_set(self) -> None:
        self.append(self.pop_mark())

    def _byte_array(self) -> None:
        # Python's own makes room for as many bytes as the file claims.
        self.append(self.read(int.from_bytes(self.read(8), "little")))

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **pickle._Unpickler.dispatch,
        ord("R"): _call, 0x81: _call, 0x92: _call_with_keywords, ord("b"): _build,
        ord("s"): _set_item, ord("u"): _set_items, ord("a"): _append, ord("e"): _append_many,
        0x90: _append_many, ord("d"): _dict, 0x8F: _set, 0x91: _frozen_set, 0x96: _byte_array,
    }  # fmt: skip


def pictured_tensors(value: Any) -> Iterator[PicturedTensor]:
    """Every tensor in a picture with its qualified name, shared ones once, in the order of the file.

    What is nested deeper than any model is left out: its names alone would fill the memory.
    """
    seen: set[int] = set()
    waiting: list[tuple[str, Any, int]] = [("", value, 0)]
    while waiting:
        name, found, depth = waiting.pop()
        if depth > _MAX_DEPTH or isinstance(found, str | bytes | int | float | None) or id(found) in seen:
            continue
        seen.add(id(found))
        tensor = _tensor(name, found)
        if tensor is not None:
            yield tensor
            continue
        waiting.extend(reversed([(_joined(name, key), member, depth + 1) for key, member in members(found)]))


def members(found: Any) -> Iterator[tuple[str, Any]]:
    """What a dict, a list or a stand-in holds, by name."""
    if isinstance(found, dict):
        yield from ((str(key), value) for key, value in found.items())
    elif isinstance(found, list | tuple):
        yield from ((str(i), value) for i, value in enumerate(found))
    elif isinstance(found, StandIn):
        state = found.state[0] if isinstance(found.state, tuple) and found.state else found.state
        for key, value in members(state):
            yield from members(value) if key in _REGISTRIES else [(key, value)]
        yield from (("", item) for item in (*found.args, *found.items))


def _joined(name: str, key: str) -> str:
    return ".".join(filter(None, (name, key)))


def _tensor(name: str, found: Any) -> PicturedTensor | None:
    if isinstance(found, StandIn) and found.name in REBUILD_PARAMETER and found.args:
        return _tensor(name, found.args[0])
    if not isinstance(found, StandIn) or found.name not in REBUILD_TENSOR or len(found.args) < 4:
        return None
    storage, offset, size, stride = found.args[:4]
    pid = storage.args if isinstance(storage, StandIn) and storage.name == "persistent" else ()
    kind = pid[1].full if len(pid) > 2 and isinstance(pid[1], Name) else ""
    if not item_bytes(kind) or not all(map(_whole, (size, stride, (offset,)))):
        return None
    dtype = DTYPES.get(kind.removesuffix("Storage").rpartition(".")[2], "unknown")
    if len(found.args) > 6 and isinstance(found.args[6], Name):
        dtype = found.args[6].full.removeprefix("torch.")
    marks = [extra for extra in found.args[6:] if isinstance(extra, dict)]
    flipped = any(mark.get("neg") or mark.get("conj") for mark in marks)
    return PicturedTensor(name, dtype, size, stride, offset, str(pid[2]), flipped)


DTYPES: Mapping[str, str] = {
    "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64",
    "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool",
    "ComplexDouble": "complex128", "ComplexFloat": "complex64", "Untyped": "uint8",
}  # fmt: skip


def _whole(numbers: Any) -> bool:
    return isinstance(numbers, tuple) and all(type(n) is int and n >= 0 for n in numbers)


def _made(function: Any, args: Any) -> Any:
    if not isinstance(function, Name):
        return StandIn("something that is not a named function", (function,))
    args = args if isinstance(args, tuple) else (args,)
    # Plain containers are what they hold.
    if function.full == "collections.OrderedDict" and not args:
        return {}
    return StandIn(function.full, args)


def _put(target: Any, items: list[Any]) -> None:
    pairs = list(zip(items[::2], items[1::2], strict=True))
    if isinstance(target, dict):
        for i, (key, value) in enumerate(pairs):
            target[key if isinstance(key, _KEYS) else f"key {len(target) + i}"] = value
    elif isinstance(target, StandIn):
        target.items.extend(items)


def _add(target: Any, items: list[Any]) -> None:
    if isinstance(target, list):
        target.extend(items)
    elif isinstance(target, StandIn):
        target.items.extend(items)


def in_words(value: Any) -> str:
    """What a picture shows, in words."""
    if isinstance(value, dict):
        plain = [k for k, v in value.items() if isinstance(v, StandIn) and v.name.startswith("torch._")]
        if value and len(plain) == len(value):
            return "a state_dict"
        keys = [shown(str(key)) for key in list(value)[:12]]
        return (
            f"a dict of {', '.join(keys)}" + (" ..." if len(value) > 12 else "") if keys else "an empty dict"
        )
    if isinstance(value, StandIn):
        state = value.state if isinstance(value.state, dict) else {}
        whole = "_modules" in state
        return f"a whole model of class {shown(value.name)}" if whole else f"a {shown(value.name)}"
    return f"a {type(value).__name__}"
