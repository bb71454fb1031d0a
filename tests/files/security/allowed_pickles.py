"""Hostile files whose names a user might allow. Every payload only makes a marker file.

Each runs when the file is trusted, once it is loaded and its model called, which a test shows.
"""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import nn

from tests.files.security import tempting
from tests.files.security.hostile_pickles import LAYERS, as_zip, code
from tests.files.torch_files import (
    BUILD,
    EMPTY_DICT,
    EMPTY_LIST,
    EMPTY_TUPLE,
    FALSE,
    NEWOBJ,
    NONE,
    REDUCE,
    call,
    mapping,
    module,
    name,
    number,
    text,
    tup,
)

_MODULE = {n: EMPTY_DICT if isinstance(v, dict) else NONE for n, v in vars(nn.Module()).items()}
Make = Callable[[Path, Path], object]
ATTACKS: dict[str, Make] = {}
HERE = "tests.files.security.tempting"


def _raw(title: str, body: Callable[[Path], bytes]) -> None:
    ATTACKS[title] = lambda path, marker: as_zip(path, body(marker))


def _saved(title: str, model: Callable[[Path], Any]) -> None:
    ATTACKS[title] = lambda path, marker: torch.save(model(marker), path)


def _layer(kind: str, *attributes: tuple[str, bytes]) -> bytes:
    """A layer with all the registries that its forward looks at."""
    rest = {n: value for n, value in _MODULE.items() if n not in dict(attributes)}
    return module(kind, *rest.items(), ("training", FALSE), *attributes)


def _evaluated(marker: Path) -> str:
    return f"__import__('pathlib').Path({str(marker)!r}).touch()"


class _Runs:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return exec, (code(self.marker),)


def _array(marker: Path) -> str:
    """A file of numpy's beside the model, which runs the payload when numpy may unpickle it."""
    beside = marker.with_name("weights.npy")
    beside.write_bytes(pickle.dumps(_Runs(marker)))
    return str(beside)


def _transformer(activation: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    layer.activation = activation
    layer.activation_relu_or_gelu = 0
    return layer.eval()


# -- a call put off: a partial of what a library or the user's own code offers -----------------------------

_saved("partial/numpy.load", lambda m: _transformer(functools.partial(np.load, _array(m), allow_pickle=True)))
_saved("partial/a-function", lambda m: _transformer(functools.partial(tempting.load_engine, code(m))))
_saved("partial/a-layer", lambda m: _transformer(functools.partial(tempting.Opens, code(m))))
_saved("partial/a-layer-by-keyword", lambda m: tempting.CallsWithout(
    functools.partial(tempting.Opens, engine=code(m))))  # fmt: skip
_saved("partial/in-a-sequential", lambda m: nn.Sequential(
    nn.Linear(8, 8), _transformer(functools.partial(tempting.Opens, code(m)))))  # fmt: skip
_saved("partial/of-an-editor", lambda m: tempting.Calls(
    functools.partial(click.edit, editor=f"touch {m}"), "text"))  # fmt: skip
_saved("partial/torch.hub", lambda m: tempting.Calls(functools.partial(
    torch.hub.load, _repository(m), "make", source="local"), "make"))  # fmt: skip
_raw(
    "partial/of-a-re-export",
    lambda m: _layer(
        f"{HERE}.Calls",
        ("make", name("functools.partial") + tup(name(f"{HERE}.compute")) + REDUCE),
        ("value", text(code(m))),
    ),
)


def _repository(marker: Path) -> str:
    folder = marker.with_name("repository")
    folder.mkdir(exist_ok=True)
    (folder / "hubconf.py").write_text(f"{code(marker)}\ndef make(*_): return None\n")
    return str(folder)


# -- a name kept as it is, which the layer calls with a value of the file's --------------------------------


def _kept(title: str, target: str, value: Callable[[Path], str]) -> None:
    _raw(title, lambda m: _layer(f"{HERE}.Calls", ("make", name(target)), ("value", text(value(m)))))


_kept("kept/a-function", f"{HERE}.load_engine", code)
_kept("kept/a-class", f"{HERE}.Opens", code)
_kept("kept/a-re-export-of-exec", f"{HERE}.compute", code)
_kept("kept/sympify", "sympy.core.sympify.sympify", _evaluated)
_kept("kept/sympify-by-its-package", "sympy.sympify", _evaluated)
_kept("kept/an-enum-that-guesses", f"{HERE}.Guesses", code)

# -- attributes that stand where a method is ---------------------------------------------------------------

_LOADS = name("functools.partial") + tup(name(f"{HERE}.load_engine")) + REDUCE


def _loads(marker: Path) -> bytes:
    function, given = name(f"{HERE}.load_engine"), tup(text(code(marker)))
    return _LOADS + tup(function, given, mapping(), b"N") + BUILD


for _method in ("forward", "_call_impl", "_compiled_call_impl"):
    _raw(f"attribute/{_method}", lambda m, n=_method: _layer(f"{HERE}.Plain", (n, _loads(m))))
for _hooks in ("_forward_hooks", "_forward_pre_hooks"):
    _raw(f"attribute/{_hooks}", lambda m, h=_hooks: _layer(
        f"{HERE}.Plain", (h, mapping((number(0), _loads(m))))))  # fmt: skip

# -- what runs while it is made, restored or dropped -------------------------------------------------------


def _built(kind: str, *attributes: tuple[str, bytes]) -> bytes:
    return name(kind) + EMPTY_TUPLE + NEWOBJ + mapping(*((text(n), v) for n, v in attributes)) + BUILD


for _kind in ("Restores", "RestoresByItsBase", "RestoresByAMixin", "Config"):
    _raw(f"setstate/{_kind}", lambda m, k=_kind: _built(f"{HERE}.{k}", ("engine", text(code(m)))))
_raw(
    "setstate/of-a-child",
    lambda m: _layer(
        f"{LAYERS}.container.Sequential",
        ("_modules", mapping((text("0"), _built(f"{HERE}.Restores", ("engine", text(code(m))))))),
    ),
)
_raw("setstate/beside-the-model", lambda m: mapping(
    (text("model"), _layer(f"{HERE}.Plain")),
    (text("args"), _built(f"{HERE}.Config", ("engine", text(code(m)))))))  # fmt: skip
_raw("new/with-arguments", lambda m: name(f"{HERE}.Made") + tup(text(code(m))) + NEWOBJ)
_raw("del/by-an-attribute", lambda m: _layer(f"{HERE}.Dropped", ("engine", text(code(m)))))
_raw("getattribute/by-an-attribute", lambda m: _layer(f"{HERE}.Watched", ("engine", text(code(m)))))
_GRAPH = "torch.fx.graph_module.reduce_graph_module"
_raw("graph/its-reduce", lambda m: call(
    _GRAPH, mapping((text("_code"), text("pass"))), text(f"{code(m)}\n")))  # fmt: skip

# -- enums -------------------------------------------------------------------------------------------------

_raw("enum/missing", lambda m: call(f"{HERE}.Guesses", text(code(m))))
_raw("enum/that-grows", lambda m: call(
    f"{HERE}.Grows", text("X"), EMPTY_LIST + tup(text("A"), text(code(m))) + b"a"))  # fmt: skip
_raw("enum/of-another-kind", lambda m: call(f"{HERE}.Prompt", text(code(m))))
_raw(
    "enum/changed",
    lambda m: _layer(
        f"{HERE}.UsesMode",
        ("mode", call(f"{HERE}.Mode", text("sum")) + mapping((text("prepare"), text(code(m)))) + BUILD),
    ),
)

# -- names that lead elsewhere -----------------------------------------------------------------------------

_raw("re-export/exec", lambda m: call(f"{HERE}.compute", text(code(m))))
_raw("re-export/system", lambda m: call(f"{HERE}.shell", text(f"touch {m}")))
_raw("call/a-function", lambda m: call(f"{HERE}.load_engine", text(code(m))))
_raw("call/a-layer", lambda m: call(f"{HERE}.Opens", text(code(m))))
