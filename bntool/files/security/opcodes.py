"""A dry run of a pickle: what it would call and build, found without calling or importing anything.

It knows exactly the opcodes that `torch.load(weights_only=True)` accepts. Values are tracked only as far as
the checks need them: names, tuples, lists, dicts, strings, numbers and storages; the rest is opaque.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import Any, BinaryIO

from torch._utils import IMPORT_MAPPING, NAME_MAPPING

from bntool.files.security.pickle_bytes import DamagedPickle, exactly, line_of, number_of
from bntool.files.security.pickled_calls import (
    MAPPINGS,
    MOST_EXPANDED,
    PARAMETER,
    PARTIAL,
    TENSORS,
    Entries,
    Global,
    Made,
    Storage,
    expansion,
    is_plain,
    is_tensor,
    item_bytes,
    shown,
    wrong_arguments,
    wrong_state,
)

_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)
_MAX_PROBLEMS = 50
_MOST_COPIED = 1 << 24
"""Items, of some 64 bytes each."""


class _Opaque:
    """A value of which only the type matters."""


_OTHER, _MARK = _Opaque(), _Opaque()


class DryRun:
    """One pickle, run without effect. `problems` holds what no honest file does, in words.

    `whole` says that it was read up to its STOP; an opcode that is not known ends it with a problem.
    """

    def __init__(self) -> None:
        self.globals: set[str] = set()
        self.called: set[str] = set()
        self.instantiated: set[str] = set()
        self.partial_targets: set[str] = set()
        self.odd_states: set[str] = set()
        self.odd_calls: set[str] = set()
        self.copied = self.expanded = 0
        self.given_state: set[str] = set()
        self.storages: dict[str, Storage] = {}
        self.strings: set[str] = set()
        self.problems: list[str] = []
        self.whole = False
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self, file: BinaryIO) -> DryRun:
        """Read one pickle up to its STOP; `DamagedPickle` when it is not well formed."""
        try:
            while (op := exactly(file, 1)) != b".":
                handler = _HANDLERS.get(op)
                if handler is None:
                    self._problem(f"uses pickle opcode {op!r}, which torch.save does not write")
                    return self
                handler(self, file)
        except (IndexError, KeyError, ValueError, struct.error, TypeError) as error:
            raise DamagedPickle(str(error) or type(error).__name__) from error
        self.whole = True
        return self

    def _problem(self, text: str) -> None:
        if text not in self.problems and len(self.problems) < _MAX_PROBLEMS:
            self.problems.append(text)

    def _proto(self, file: BinaryIO) -> None:
        protocol = exactly(file, 1)[0]
        if protocol != 2:
            self._problem(
                f"is pickled with protocol {protocol}: save it again with pickle_protocol=2, the default"
            )

    def _global(self, file: BinaryIO) -> None:
        module, name = line_of(file), line_of(file)
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        full = f"{module}.{name}"
        if not _NAME.fullmatch(full):
            self._problem(f"refers to {shown(full)}, which is no Python name")
        self.globals.add(full)
        self._stack.append(Global(full))

    def _newobj(self, _: BinaryIO) -> None:
        args, cls = self._stack.pop(), self._stack.pop()
        if not isinstance(cls, Global):
            self._problem("instantiates something that is not a named class")
            self._stack.append(_OTHER)
            return
        # Files of PyTorch 0.1 make a Parameter from its tensor.
        old_parameter = cls.name == PARAMETER and args and isinstance(args, tuple) and is_tensor(args[0])
        if args != () and not old_parameter:
            self._problem(f"instantiates {shown(cls.name)} with arguments of its own")
        self.instantiated.add(cls.name)
        self._stack.append(Made(cls.name))

    def _reduce(self, _: BinaryIO) -> None:
        args, function = self._stack.pop(), self._stack.pop()
        if not isinstance(function, Global) or not isinstance(args, tuple):
            self._problem("calls something that is not a named function")
            self._stack.append(_OTHER)
            return
        self.called.add(function.name)
        self._count_copies(args)
        if len(args) != 1 or not is_plain(args[0]):
            self.odd_calls.add(function.name)
        if function.name == PARTIAL:
            self._partial(args)
        elif wrong := wrong_arguments(function.name, args):
            self._problem(wrong)
        else:
            self.expanded += expansion(function.name, args)
            if self.expanded > MOST_EXPANDED:
                self._problem(f"makes tensors of over {MOST_EXPANDED} bytes from far fewer bytes of data")
        self._stack.append(Made(function.name))

    def _count_copies(self, args: tuple[Any, ...]) -> None:
        """What is called copies what it is given, which may be one large object over and over."""
        for value in args:
            if isinstance(value, Entries):
                self.copied += value.count
            elif isinstance(value, tuple | list):
                self.copied += len(value)
            elif isinstance(value, str):
                self.copied += len(value) // 64
        if self.copied > _MOST_COPIED:
            raise DamagedPickle("it copies what it holds over and over, to more than a gigabyte")

    def _build(self, _: BinaryIO) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        self.given_state.add(getattr(target, "name", ""))
        if not isinstance(target, Made):
            self._problem("sets the state of something it did not make")
        elif target.name in TENSORS:
            self._problem("changes a tensor after making it")
        elif target.name == PARTIAL:
            self._partial(state if isinstance(state, tuple) else ())
        elif not isinstance(state, Entries):
            # Only a class's own __setstate__ takes anything else, and only a dict is read without a call.
            self.odd_states.add(target.name)
        elif wrong := wrong_state(target.name, state):
            self._problem(wrong)

    def _persistent(self, _: BinaryIO) -> None:
        pid = self._stack.pop()
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
            source = isinstance(pid, tuple) and pid[:1] == ("module",)
            self._problem(
                "holds a whole model in the format before PyTorch 1.6, with its source code: save it anew"
                if source
                else "refers to data that is not a tensor's"
            )
            self._stack.append(_OTHER)
            return
        kind, key, numel = pid[1], pid[2], pid[4]
        size = item_bytes(kind.name) if isinstance(kind, Global) else None
        if size is None or not isinstance(key, str) or not isinstance(numel, int) or numel < 0:
            self._problem("describes a tensor's storage wrongly")
            self._stack.append(_OTHER)
            return
        storage = Storage(key, numel * size, size)
        known = self.storages.setdefault(key, storage)
        if known != storage:
            self._problem(f"describes storage {shown(key)} in two ways")
        self._stack.append(storage)

    def _partial(self, args: tuple[Any, ...]) -> None:
        if not args or not isinstance(args[0], Global) or args[0].name == PARTIAL:
            self._problem("makes a functools.partial of something that is not a named class or function")
            return
        self.partial_targets.add(args[0].name)
        if not all(map(is_plain, args[1:])):
            self._problem(f"makes a functools.partial of {shown(args[0].name)} with objects of its own")

    def _pop_mark(self) -> list[Any]:
        at = len(self._stack) - 1
        while self._stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise DamagedPickle("no mark")
        items = self._stack[at + 1 :]
        del self._stack[at:]
        return items

    def _fill(self, many: bool, mapping: bool) -> None:
        items = self._pop_mark() if many else [self._stack.pop() for _ in range(1 + mapping)][::-1]
        target = self._stack[-1]
        if isinstance(target, list) and not mapping:
            target.extend(items)
        elif isinstance(target, Entries) and mapping:
            target.count += len(items)
            for key, value in zip(items[::2], items[1::2], strict=True):
                if isinstance(key, str):
                    target.texts[key] = value
                else:
                    target.has_other_keys = True
        elif not (mapping and isinstance(target, Made) and target.name in MAPPINGS):
            self._problem(f"adds items to something that is not a {'dict' if mapping else 'list'}")

    def _tuple(self, count: int) -> None:
        items = tuple(self._stack[-count:])
        if len(items) < count or any(i is _MARK for i in items):
            raise DamagedPickle("tuple without items")
        self._stack[-count:] = [items]

    def _remember(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def _text(self, raw: bytes, errors: str) -> None:
        text = raw.decode("utf-8", errors)
        self.strings.add(text)
        self._stack.append(text)


def _push(value: Any) -> Callable[[DryRun, BinaryIO], None]:
    return lambda run, file: run._stack.append(value)


def _push_number(code: str) -> Callable[[DryRun, BinaryIO], None]:
    return lambda run, file: run._stack.append(number_of(file, code))


def _long(run: DryRun, file: BinaryIO) -> None:
    data = exactly(file, exactly(file, 1)[0])
    run._stack.append(int.from_bytes(data, "little", signed=True))


_Handler = Callable[[DryRun, BinaryIO], None]
_HANDLERS: dict[bytes, _Handler] = {
    b"\x80": DryRun._proto,
    b"c": DryRun._global,
    b"\x81": DryRun._newobj,
    b"R": DryRun._reduce,
    b"b": DryRun._build,
    b"Q": DryRun._persistent,
    b"(": _push(_MARK),
    b"t": lambda r, f: r._stack.append(tuple(r._pop_mark())),
    b"\x85": lambda r, f: r._tuple(1),
    b"\x86": lambda r, f: r._tuple(2),
    b"\x87": lambda r, f: r._tuple(3),
    b"a": lambda r, f: r._fill(many=False, mapping=False),
    b"e": lambda r, f: r._fill(many=True, mapping=False),
    b"s": lambda r, f: r._fill(many=False, mapping=True),
    b"u": lambda r, f: r._fill(many=True, mapping=True),
    **dict.fromkeys((b"N", b"\x88", b"\x89", b"\x8f"), _push(_OTHER)),
    b")": _push(()),
    b"]": lambda r, f: r._stack.append([]),
    b"}": lambda r, f: r._stack.append(Entries()),
    b"J": _push_number("<i"),
    b"K": _push_number("<B"),
    b"M": _push_number("<H"),
    b"G": _push_number(">d"),
    b"X": lambda r, f: r._text(exactly(f, number_of(f, "<I")), "surrogatepass"),
    b"U": lambda r, f: r._text(exactly(f, exactly(f, 1)[0]), "strict"),
    b"\x8a": _long,
    b"h": lambda r, f: r._stack.append(r._memo[number_of(f, "<B")]),
    b"j": lambda r, f: r._stack.append(r._memo[number_of(f, "<I")]),
    b"q": lambda r, f: r._remember(number_of(f, "<B")),
    b"r": lambda r, f: r._remember(number_of(f, "<I")),
}
