"""Which operators an exported program may name: torch's own, by a fixed grammar.

torch resolves such a name by a chain of getattr from the module `torch` and calls what it finds.
"""

from __future__ import annotations

import contextlib
import importlib
import re

import torch

from bntool.files.security.archives import Unsafe
from bntool.files.security.pickled_calls import shown

_OPERATOR = re.compile(r"torch\.ops\.([A-Za-z_]\w*)\.([A-Za-z_]\w*)\.([A-Za-z_]\w*)", re.ASCII)
_HIGHER_ORDER = re.compile(r"torch\.ops\.higher_order\.(\w+)", re.ASCII)
_NAMESPACES = frozenset({"aten", "prims", "torchvision"})
_BODIES = frozenset(
    """cond while_loop map_impl scan associative_scan wrap_with_set_grad_enabled
    wrap_with_autocast""".split()
)
_SCALARS = frozenset(
    [f"_operator.{n}" for n in """eq ne le ge lt gt neg pos mul add sub floordiv mod pow truediv
    and_ or_ lshift rshift""".split()]
    + [f"torch.{n}" for n in "sym_not sym_int sym_float sym_ite sym_max sym_min sym_sqrt sym_sum".split()]
    + [f"math.{n}" for n in "trunc ceil floor sqrt".split()]
)  # fmt: skip
# aten.from_file makes a file, aten.save writes one.
_FILE_ARGUMENT = "filename"


class UnknownOperator(ValueError):
    """An operator that is not registered here; its name is the message."""


def check_operator(target: object) -> None:
    """Nothing, for an operator that only computes.

    Raises `UnknownOperator` for a custom one, `Unsafe` for whatever is no operator or touches files.
    """
    if not isinstance(target, str):
        raise Unsafe("names an operator by something that is not a text")
    if target in _SCALARS:
        return
    body = _HIGHER_ORDER.fullmatch(target)
    if body:
        if body[1] not in _BODIES:
            raise Unsafe(f"uses the higher-order operator {shown(body[1])}, which bntool does not read")
        return
    match = _OPERATOR.fullmatch(target)
    if match is None:
        raise Unsafe(f"calls {shown(target)}, which is no operator")
    namespace, name, overload = match.groups()
    if namespace not in _NAMESPACES:
        raise UnknownOperator(f"{namespace}.{name}.{overload}")
    if namespace == "torchvision":
        with contextlib.suppress(ImportError):
            importlib.import_module("torchvision")
    found = getattr(getattr(getattr(torch.ops, namespace), name, None), overload, None)
    if not isinstance(found, torch._ops.OpOverload):
        raise UnknownOperator(f"{namespace}.{name}.{overload}")
    if any(argument.name == _FILE_ARGUMENT for argument in found._schema.arguments):
        raise Unsafe(f"calls {namespace}.{name}, which reads or writes files")
