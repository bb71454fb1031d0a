"""What a kind of model cannot do: one table, and one sentence for every option."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from bntool.core.errors import UsageError
from bntool.core.option import Options
from bntool.core.options import ExportOptions

KINDS = {
    "module": "a PyTorch module",
    "program": "an exported program",
    "onnx": "an ONNX file",
    "script": "TorchScript",
    "weights": "a file of weights without its model",
}
"""Every kind, in words."""


@dataclasses.dataclass(frozen=True)
class _Refusal:
    """Options that a kind does not know, why, and what to do instead."""

    options: frozenset[str]
    why: str
    instead: str


def _no(options: str, why: str, instead: str = "leave it out") -> _Refusal:
    return _Refusal(frozenset(options.split()), why, instead)


_CODE = "arch weights key allow trust_pickle pretrained"
_SOURCE = "plan_file source in_place"
_FORM = "opset ir_version static_batch dynamic external_data keep_io exporter keep_unverified"
_FILE = _no("freeze_inputs run", "it is about how an ONNX file is read")
_MODULE = "use the nn.Module that it was made from"

_REFUSED: Mapping[str, Sequence[_Refusal]] = {
    "module": [_FILE],
    "program": [
        _FILE,
        _no("arch weights key allow pretrained", "it holds its own graph and weights"),
        _no("inputs", "it holds its own shapes"),
        _no("bake", "its graph computes them, and no layer is left that could store them", _MODULE),
        _no(
            "dynamic static_batch keep_io exporter dtype",
            "it brings its axes and its types, and was captured already",
            "export the program anew with torch.export, in the form that you want",
        ),
        _no(f"{_SOURCE} data", "there is no Python and no training in it", _MODULE),
    ],
    "onnx": [
        _no(_CODE, "it holds its own graph and weights"),
        _no(
            f"{_FORM} export_to",
            "it is one already, and stays as it is",
            "leave it out; bntool verify A B compares two files",
        ),
        _no("bake", "its weights are stored already"),
        _no("dtype", "it keeps its types", "fold the PyTorch model with --dtype, and --export onnx"),
        _no("tf32", "a fold of it is checked without", "bntool verify A B --tf32 both compares two files"),
        _no(
            f"{_SOURCE} data init",
            "it takes identity nodes only",
            "insert into the PyTorch model, and export that",
        ),
    ],
    "script": [
        _FILE,
        _no("arch weights key allow pretrained", "it holds its own code and weights"),
        _no(
            "include exclude merge unshare bake dtype bench repro",
            "torch's own pass folds it, which folds what it can",
            _MODULE,
        ),
        _no("device providers tf32 atol rtol", "its fold is checked in float64 on the CPU"),
        _no(f"{_FORM} export_to", "it is folded as it is", "bntool export writes it as ONNX"),
    ],
    "weights": [
        _FILE,
        _no("inputs inputs_file", "it does not run", "leave it out, or name its model with --arch"),
        _no(
            f"{_CODE} include exclude merge unshare bake dtype bench repro require_all "
            f"tf32 atol rtol check device providers {_FORM} export_to",
            "--plan folds it layer by layer, and that needs the model",
            "leave out --plan, or the other",
        ),
    ],
}
"""For each kind, what it does not know wherever it is asked."""
_BUT = {
    ("summary", "weights"): "key allow trust_pickle",
    ("export", "script"): f"{_FORM} dtype device providers tf32 atol rtol",
    ("export", "onnx"): "opset ir_version external_data",
}
"""What a command makes work all the same: it converts TorchScript, and a file to another opset."""


def require_known(kind: str, *asked: Options, name: str = "", command: str = "") -> None:
    """Raise `UsageError` for the first option that `kind` has not, or that does not go with another.

    One counts as asked for where it has another value than its default.

    Args:
        kind: one of `KINDS`.
        asked: options as they were given.
        name: of the model, for the error.
        command: that asks, where it makes more of the options work.
    """
    known = set(_BUT.get((command, kind), "").split())
    for options in asked:
        for option_name, one in options.chosen().items():
            for refusal in _REFUSED.get(kind, ()):
                if option_name in refusal.options - known:
                    raise UsageError(
                        f"{one.flag} is not for {KINDS[kind]}: {refusal.why}",
                        where=name,
                        next_step=refusal.instead,
                    )
        options.require_together()


def unknown(model: object) -> UsageError:
    """What is no model of any kind."""
    return UsageError(
        f"the model is of type {type(model).__name__}, of which bntool knows no kind of model",
        next_step="pass an nn.Module, an ExportedProgram, TorchScript, or the path or reference of one or of "
        "an ONNX file; of what bntool.load gave, its .model",
    )


def refused(kind: str, what: str, name: str) -> UsageError:
    """Why bntool does not do `what` with a model of a kind."""
    told = KINDS.get(kind, f"of the kind {kind!r}")
    return UsageError(f"{name} is {told}, and bntool does not {what} it", next_step=_MODULE)


def require_module(kind: str, what: str, name: str) -> None:
    """Raise `UsageError` for a kind of which bntool does not do `what`: it takes a module's own layers."""
    if kind != "module":
        raise refused(kind, what, name)


def require_export(exports: bool, *asked: Options) -> None:
    """Raise `UsageError` for an option that is about the ONNX file, where none is written."""
    if exports:
        return
    about_the_file = set(f"{_FORM} tf32 providers".split())
    for options in asked:
        for option_name, one in options.chosen().items():
            if option_name in about_the_file:
                raise UsageError(f"{one.flag} is for the ONNX file", next_step="add --export onnx")
        if isinstance(options, ExportOptions) and options.narrow:
            raise UsageError("--dtype fp16 and bf16 are for the ONNX file", next_step="add --export onnx")
