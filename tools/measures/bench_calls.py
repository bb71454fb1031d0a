"""What `make bench` times: bntool's calls, and beside them other tools on the same nets."""

from __future__ import annotations

import contextlib
import importlib
import io
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx.experimental.optimization import fuse

import bntool

CALLS = ("unchecked", "proved", "full", "insert", "summary", "calibrate", "verify", "export")
"""bntool's own; `insert` is into the folded model, `verify` compares the folded one with the original."""
PEERS = ("fx fuse", "jit.freeze", "OpenVINO", "onnxsim", "onnxslim")
SLOW = frozenset({"full", "verify", "export", "jit.freeze", "OpenVINO", "onnxsim", "onnxslim"})
"""Calls of which one round tells enough."""
NOT_INSTALLED, FAILS = "not installed", "fails"

Call = Callable[[], Any]


def own_calls(model: nn.Module, given: tuple[Any, ...], folder: Path) -> dict[str, Call]:
    """Each of bntool's calls on a model, ready to be timed."""
    folded = bntool.fold(model, given).model
    batch = given[0] if len(given) == 1 else given
    return {
        "unchecked": lambda: bntool.fold(model, given, check="none"),
        "proved": lambda: bntool.fold(model, given),
        "full": lambda: bntool.fold(model, given, check="full"),
        "insert": lambda: bntool.insert(folded, given, activations=("any",)),
        "summary": lambda: bntool.summary(model, given),
        "calibrate": lambda: bntool.calibrate(model, [batch]),
        "verify": lambda: bntool.verify(model, folded, given),
        "export": lambda: bntool.export_onnx(folded, given, folder / "own.onnx", force=True),
    }


def peer_calls(model: nn.Module, given: tuple[Any, ...], folder: Path) -> dict[str, Call | str]:
    """Each of the others, or in a word why it is not there. ONNX's get the unfolded file, written before."""
    plain = folder / "plain.onnx"
    calls: dict[str, Call | str] = {
        "fx fuse": lambda: fuse(model),
        "jit.freeze": lambda: torch.jit.freeze(torch.jit.trace(model, given)),
    }
    makers = {
        "OpenVINO": ("openvino", _openvino),
        "onnxsim": ("onnxsim", _onnxsim),
        "onnxslim": ("onnxslim", _onnxslim),
    }
    for name, (module, make) in makers.items():
        try:
            library = importlib.import_module(module)
        except ImportError:
            calls[name] = NOT_INSTALLED
            continue
        if not plain.exists():
            with contextlib.suppress(Exception):
                bntool.export_onnx(model, given, plain, dynamic_batch=False)
        calls[name] = make(library, plain) if plain.exists() else FAILS
    return calls


def _openvino(library: Any, plain: Path) -> Call:
    core = library.Core()
    return lambda: core.compile_model(library.convert_model(plain), "CPU")


def _onnxsim(library: Any, plain: Path) -> Call:
    import onnx

    stored = onnx.load(plain)
    return lambda: library.simplify(stored)


def _onnxslim(library: Any, plain: Path) -> Call:
    import onnx

    stored = onnx.load(plain)
    return lambda: library.slim(stored)


def tried(call: Call | str) -> Call | str:
    """The call where it runs, else in a word that it fails."""
    if isinstance(call, str):
        return call
    try:
        with quiet():
            call()
    except Exception:  # noqa: BLE001  whatever another tool raises
        return FAILS
    return call


@contextlib.contextmanager
def quiet() -> Any:
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def scratch() -> Any:
    with tempfile.TemporaryDirectory(prefix="bntool.bench.") as name:
        yield Path(name)
