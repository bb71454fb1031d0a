"""What a pickle may pass to the few functions it may call. Nothing is called here."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import torch

from bntool.core.text import shown as shown  # noqa: PLC0414 - files/ takes it from here

PARTIAL = "functools.partial"
PARAMETER = "torch.nn.parameter.Parameter"
FROM_TYPE = "torch._tensor._rebuild_from_type_v2"
REBUILD_TENSOR = frozenset(
    f"torch._utils.{n}" for n in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3")
)
REBUILD_PARAMETER = frozenset(
    f"torch._utils.{n}" for n in ("_rebuild_parameter", "_rebuild_parameter_with_state")
)
TENSORS = REBUILD_TENSOR | REBUILD_PARAMETER | {FROM_TYPE, PARAMETER, "torch.Tensor"}
MAPPINGS = frozenset({"collections.OrderedDict", "collections.Counter"})
ENCODE = "_codecs.encode"

_ITEM_BYTES = {
    "Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1,
    "Byte": 1, "Bool": 1, "ComplexDouble": 16, "ComplexFloat": 8, "Untyped": 1,
}  # fmt: skip
_STORAGE = re.compile(r"torch\.(?:cuda\.|storage\.)?(\w+)Storage")
_REGISTRIES = frozenset({"_parameters", "_buffers", "_modules"})
_RECURRENT = "torch.nn.modules.rnn."
_MAX_RECURRENT_LAYERS = 1000
MAX_EXPANSION_BYTES = 1 << 28
"""An expanded view may be larger than its storage; past this it can only be meant to exhaust memory."""
MOST_EXPANDED = 1 << 30
"""All of a file's expanded views together."""


@dataclasses.dataclass(frozen=True)
class Global:
    """A name that the pickle refers to, not looked up."""

    name: str


@dataclasses.dataclass(frozen=True)
class Made:
    """What calling or instantiating `name` would give."""

    name: str


@dataclasses.dataclass(eq=False)
class Entries:
    """A plain dict that the pickle makes, as far as its keys are texts."""

    texts: dict[str, Any] = dataclasses.field(default_factory=dict)
    has_other_keys: bool = False
    count: int = 0


@dataclasses.dataclass(frozen=True)
class Storage:
    """The bytes of a tensor, kept outside the pickle under `key`."""

    key: str
    nbytes: int
    item_bytes: int


def item_bytes(storage_type: str) -> int | None:
    """Bytes of one element of `torch.FloatStorage` and its like; None for another name."""
    match = _STORAGE.fullmatch(storage_type)
    return _ITEM_BYTES.get(match[1]) if match else None


def is_tensor(value: Any) -> bool:
    """Whether a value of the dry run stands for a tensor."""
    return isinstance(value, Made) and value.name in TENSORS


def wrong_arguments(function: str, args: tuple[Any, ...]) -> str | None:
    """What is wrong with a call, in words; None when it is as torch.save writes it."""
    check = _CHECKS.get(function)
    return check(args) if check else None


def wrong_state(cls: str, state: Entries) -> str | None:
    """What is wrong with the attributes given to an object of class `cls`, in words."""
    for registry in _REGISTRIES & state.texts.keys():
        value = state.texts[registry]
        # Layers look their members up while they are loaded; any other object could answer with a call.
        if not isinstance(value, Entries) and not (isinstance(value, Made) and value.name in MAPPINGS):
            return f"keeps the {registry} of a {shown(cls)} in something that is not a dict"
    for key, value in state.texts.items():
        # torch.jit.script leaves an empty table of overloads in every layer that it has seen.
        scripted = key == "__overloads__" and isinstance(value, Entries) and not value.count
        if key.startswith("__") and key.endswith("__") and not scripted:
            return f"sets {shown(key)} of a {shown(cls)}"
    layers = state.texts.get("num_layers", 0)
    # It writes down a name for every one of them while it is loaded.
    if cls.startswith(_RECURRENT) and not (isinstance(layers, int) and layers <= _MAX_RECURRENT_LAYERS):
        return f"claims more layers for a {shown(cls)} than one can have"
    return None


def is_plain(value: Any) -> bool:
    """Whether this is a number, a text, None, a class or function by name, or a tuple or dict of such."""
    waiting, seen = [value], set[int]()
    while waiting:
        part = waiting.pop()
        # Tuples that hold one another twice over and over would never end.
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, Made | Storage | list) or (isinstance(part, Entries) and part.has_other_keys):
            return False
        if isinstance(part, Entries):
            waiting.extend(part.texts.values())
        elif isinstance(part, tuple):
            waiting.extend(part)
    return True


def _tensor(args: tuple[Any, ...]) -> str | None:
    if len(args) < 4 or not isinstance(args[0], Storage):
        return "makes a tensor from something that is not a storage"
    storage, offset, size, stride = args[:4]
    if not isinstance(size, tuple) or not isinstance(stride, tuple) or len(size) != len(stride):
        return "makes a tensor without a proper shape"
    if not all(isinstance(n, int) and n >= 0 for n in (offset, *size, *stride)):
        return "makes a tensor whose shape is not a row of non-negative numbers"
    if 0 in size:
        return None
    item = _dtype_bytes(args) or storage.item_bytes
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if (last + 1) * item > storage.nbytes:
        return "makes a tensor that reaches past the end of its data"
    nbytes = math.prod(size) * item
    if nbytes > max(storage.nbytes, MAX_EXPANSION_BYTES):
        return f"makes a tensor of {nbytes} bytes from {storage.nbytes} bytes of data"
    return None


def expansion(function: str, args: tuple[Any, ...]) -> int:
    """By how many bytes a tensor, rightly made, is larger than its storage; 0 for any other call."""
    if function not in REBUILD_TENSOR:
        return 0
    storage, size = args[0], args[2]
    nbytes: int = math.prod(size) * (_dtype_bytes(args) or storage.item_bytes)
    return max(nbytes - int(storage.nbytes), 0)


def _dtype_bytes(args: tuple[Any, ...]) -> int | None:
    """`_rebuild_tensor_v3` names the type itself, its storage being untyped."""
    if len(args) > 6 and isinstance(args[6], Global):
        dtype = getattr(torch, args[6].name.removeprefix("torch."), None)
        return dtype.itemsize if isinstance(dtype, torch.dtype) else None
    return None


def _parameter(args: tuple[Any, ...]) -> str | None:
    if not args or not is_tensor(args[0]):
        return "makes a parameter from something that is not a tensor"
    return _attributes(args[3]) if len(args) > 3 else None


def _attributes(state: Any) -> str | None:
    """Attributes of a tensor, which torch sets one by one: none may be more than a value of the user's."""
    for part in state if isinstance(state, tuple) else (state,):
        if isinstance(part, Made | Storage | Global | list | tuple):
            return "gives a tensor attributes that are not in a dict"
        if isinstance(part, Entries) and (
            part.has_other_keys or any(hasattr(torch.Tensor, key) for key in part.texts)
        ):
            return "changes what a tensor is made of"
    return None


def _from_type(args: tuple[Any, ...]) -> str | None:
    function, cls = (a.name if isinstance(a, Global) else "" for a in (*args, None, None)[:2])
    inner = args[2] if len(args) > 2 else None
    plain = function in REBUILD_TENSOR | REBUILD_PARAMETER and cls in ("torch.Tensor", PARAMETER)
    if not plain or not isinstance(inner, tuple):
        return "makes a tensor through a function or a class of its own"
    return wrong_arguments(function, inner) or (_attributes(args[3]) if len(args) > 3 else None)


def _encode(args: tuple[Any, ...]) -> str | None:
    latin = len(args) == 2 and args[1] in ("latin1", "latin-1")
    return None if latin else "encodes text with a codec of its own choice"


def _bytearray(args: tuple[Any, ...]) -> str | None:
    encoded = len(args) == 2 and isinstance(args[0], str) and args[1] in ("latin1", "latin-1")
    whole = len(args) == 1 and isinstance(args[0], Made) and args[0].name == ENCODE
    return None if not args or encoded or whole else "makes a byte array of a size of its own choice"


def _sequence(args: tuple[Any, ...]) -> str | None:
    plain = not args or (len(args) == 1 and isinstance(args[0], list | tuple))
    return None if plain else "fills a container from something that is not a list"


def _mapping(args: tuple[Any, ...]) -> str | None:
    """A dict, or pairs as Python 2 wrote them; another object would be asked for its keys by a call."""
    if not args or (len(args) == 1 and isinstance(args[0], Entries)):
        return None
    pairs = args[0] if len(args) == 1 and isinstance(args[0], list | tuple) else (None,)
    plain = all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs)
    return None if plain else "fills a dict from something that is neither a dict nor pairs"


_CHECKS: dict[str, Callable[[tuple[Any, ...]], str | None]] = {
    FROM_TYPE: _from_type,
    ENCODE: _encode,
    "builtins.bytearray": _bytearray,
    "builtins.set": _sequence,
    "torch.Size": _sequence,
    **dict.fromkeys(MAPPINGS, _mapping),
    **dict.fromkeys(REBUILD_TENSOR, _tensor),
    **dict.fromkeys(REBUILD_PARAMETER, _parameter),
}
