"""The JSON of an exported program, judged before torch reads it.

torch makes Python source of the names in it, and looks up operators, containers and expressions by what
their texts say. So every text must be a plain identifier, except in the places that have a rule of their own.
"""

from __future__ import annotations

import json
import keyword
import re
from collections.abc import Callable, Mapping
from typing import Any

from bntool.files.security.archives import Damaged, Unsafe
from bntool.files.security.expressions import is_guard, is_size_expression
from bntool.files.security.operators import check_operator
from bntool.files.security.pickled_calls import shown

_NOTES = frozenset("stack_trace nn_module_stack source_fn_stack torch_fn custom from_node".split())
"""Metadata that torch keeps as text, or reads as JSON; source_fn_stack is resolved like an operator."""

_CONTAINERS = frozenset({"builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"})
_LOOKED_UP = re.compile(r"(torch|_operator|math)(\.(?!__)\w+)*", re.ASCII)
_CUSTOM = frozenset({"custom_obj", "as_custom_obj", "class_fqn"})
_MAX_DEPTH = 200


def read_json(content: bytes, name: str) -> Any:
    """The JSON of one member; `Damaged` when it is none."""
    try:
        return json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{name} is not JSON: {error}") from error


def check_program(document: Any) -> None:
    """Raises `Unsafe` or `UnknownOperator` for a program through which code could run when it is loaded."""
    if not isinstance(document, dict):
        raise Damaged("the program is not a JSON object")
    if any(not is_guard(guard) for guard in document.get("guards_code") or ()):
        raise Unsafe("has a guard that is more than a comparison of sizes")
    rest = {key: value for key, value in document.items() if key != "guards_code"}
    waiting: list[tuple[str, Any, int, bool]] = [("", rest, 0, False)]
    while waiting:
        place, value, depth, in_node = waiting.pop()
        in_node = in_node or place == "nodes"
        if depth > _MAX_DEPTH:
            raise Unsafe("is nested deeper than a program")
        if place == "metadata":
            _check_metadata(value)
        elif place in _CUSTOM or (place == "custom_obj_values" and value):
            raise Unsafe("holds a custom object, which is made by code of its own")
        elif isinstance(value, dict):
            _check_keys(place, value)
            waiting.extend((key, member, depth + 1, in_node) for key, member in value.items())
        elif isinstance(value, list):
            waiting.extend((place, member, depth + 1, in_node) for member in value)
        # What an operator is given is quoted properly; what the program is given is not.
        elif isinstance(value, str) and not (in_node and place in ("as_string", "as_strings")):
            _RULES.get(place, _check_identifier)(value)


def check_name(text: object) -> None:
    """A qualified name, or a text of the user's: torch puts it between quotes in source code of its own."""
    if not isinstance(text, str) or not text.isprintable() or any(c in "\"'\\`" for c in text):
        raise Unsafe(f"has a name that could end a quoted text: {shown(str(text))}")
    if "__" in text and any(re.fullmatch(r"__\w+__", part) for part in text.split(".")):
        raise Unsafe(f"has a name of Python's own: {shown(text)}")


def _check_identifier(text: str) -> None:
    plain = text.isidentifier() and not keyword.iskeyword(text) and not re.fullmatch(r"__\w+__", text)
    # Constants keep their place under an empty name; True and None are no names but harmless ones.
    if text and not plain:
        raise Unsafe(f"has a name that is no identifier: {shown(text)}")


def _check_keys(place: str, value: Mapping[str, Any]) -> None:
    for key in value:
        if place in ("as_string_to_argument", "treespec_namedtuple_fields"):
            check_name(key)
        else:
            _check_identifier(key)


def _check_metadata(value: Any) -> None:
    if not isinstance(value, dict):
        raise Unsafe("has metadata that is not a table of texts")
    for key, text in value.items():
        if key not in _NOTES or not isinstance(text, str):
            raise Unsafe(f"has metadata that bntool does not know: {shown(key)}")
        if key == "source_fn_stack":
            for entry in text.split(";"):
                target = entry.rpartition(",")[2]
                looked_up = target.startswith(("torch", "_operator", "math", "#"))
                if looked_up and not _LOOKED_UP.fullmatch(target):
                    raise Unsafe(f"looks up {shown(target)}")


def _check_expression(text: str) -> None:
    if not is_size_expression(text):
        raise Unsafe(f"has a size that is more than arithmetic: {shown(text)}")


def _check_number(text: str) -> None:
    if text not in ("Infinity", "-Infinity", "NaN"):
        raise Unsafe(f"has a text where a number belongs: {shown(text)}")


def _check_containers(text: str) -> None:
    """A tree of tuples, lists and dicts; other kinds are made by importing what the file names."""
    document = read_json(text.encode("utf-8", "replace"), "a structure")
    if not isinstance(document, list) or len(document) != 2 or document[0] != 1:
        raise Unsafe("describes the structure of its inputs in a way bntool does not know")
    root = document[1]
    _check_keyword_arguments(root)
    waiting = [root]
    while waiting:
        tree = waiting.pop()
        if not isinstance(tree, dict) or not isinstance(tree.get("children_spec"), list):
            raise Unsafe("describes the structure of its inputs in a way bntool does not know")
        kind, context = tree.get("type"), tree.get("context")
        if kind is not None and kind not in _CONTAINERS:
            raise Unsafe(f"makes containers of the kind {shown(str(kind))}, which it names by itself")
        for key in _keys_of(context):
            if not isinstance(key, int | float | None):
                check_name(key)
        waiting.extend(tree["children_spec"])


def _keys_of(context: Any) -> list[Any]:
    """The keys of a dict, which its context holds as JSON; anything but a row of keys is refused."""
    keys = (
        read_json(context.encode("utf-8", "replace"), "a structure") if isinstance(context, str) else context
    )
    if keys is None:
        return []
    if not isinstance(keys, list):
        raise Unsafe("makes a container in a way of its own")
    return keys


def _check_keyword_arguments(root: Any) -> None:
    """The keyword arguments of a program become the parameters of a function, in source code."""
    children = root.get("children_spec") if isinstance(root, dict) else None
    second = children[1] if isinstance(children, list) and len(children) == 2 else None
    if isinstance(second, dict) and second.get("type") == "builtins.dict":
        for key in _keys_of(second.get("context")):
            _check_identifier(str(key))


_RULES: dict[str, Callable[[str], None]] = {
    "expr_str": _check_expression,
    "target": check_operator,
    "as_operator": check_operator,
    "in_spec": _check_containers,
    "out_spec": _check_containers,
    "torch_version": lambda text: None,
    **dict.fromkeys(("as_float", "as_floats", "as_float_lists", "real", "imag"), _check_number),
    **dict.fromkeys(
        "fqn parameter_name buffer_name tensor_constant_name as_string as_strings".split(), check_name
    ),
}  # fmt: skip
