"""The public functions take the options of the command line: the same names, defaults and kinds.

What differs is listed here with its reason, and nothing stands in the list that does not differ.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import inspect
import types
import typing
from typing import Any

import pytest

import bntool
from bntool.cli.calibrate import CalibrateOptions
from bntool.cli.compare_options import CompareOptions
from bntool.cli.summary import SummaryOptions
from bntool.core.command_options import (
    BenchOptions,
    DataOptions,
    LoadOptions,
    ViewOptions,
    WriteOptions,
)
from bntool.core.option import Options
from bntool.core.options import CheckOptions, ExportOptions, FoldOptions, InsertOptions, PlaceOptions
from bntool.experiment.settings import Settings

_COMMANDS = "is for the command line"
_BATCHES = "the data is an argument of its own, already in batches"
_ONE = "a file of it, or a folder, is the function's own argument"


@dataclasses.dataclass(frozen=True)
class Face:
    """What a function takes of which options.

    `own` are keywords that no option is, `without` the options that are no keywords, `unlike` those that have
    another default or type, each with its reason; `named` are options that have another name.
    """

    options: tuple[type[Options], ...] = ()
    own: dict[str, str] = dataclasses.field(default_factory=dict)
    without: dict[str, str] = dataclasses.field(default_factory=dict)
    unlike: dict[str, str] = dataclasses.field(default_factory=dict)
    named: dict[str, str] = dataclasses.field(default_factory=dict)


_CHECK = dict.fromkeys(("tf32", "atol", "rtol", "repro"), "`verify` takes it, of what the surgery gave")
_FAST = {"check": "who calls a function in a loop waits for it"}
_SHARE = {"share": "there is no file between the two models"}
_WRITE = dict.fromkeys(("output", "dry_run"), _COMMANDS)
_INPUTS = {"example_inputs": "tensors, where a command has `--input` and `--inputs`"}

FACES: dict[str, Face] = {
    "insert": Face(
        (InsertOptions, CheckOptions), {**_SHARE, "data": "an iterable of batches"}, _CHECK, _FAST
    ),
    "fold": Face((FoldOptions, CheckOptions), _SHARE, _CHECK, _FAST),
    "plan_fold": Face((FoldOptions,)),
    "apply": Face((CheckOptions,), _SHARE, _CHECK, _FAST),
    "summary": Face(
        (ViewOptions, SummaryOptions),
        unlike={"columns": "None stands for the usual ones", "baseline": "any model, or its summary"},
    ),
    "export_onnx": Face(
        (ExportOptions, WriteOptions),
        {"dynamic_batch": "the opposite of static_batch"},
        {**_WRITE, "static_batch": "dynamic_batch", "keep_unverified": "nothing is verified"},
        {"dynamic": "a mapping, where a command has text", "dtype": "float32 is model.float()"},
    ),
    "fold_to_onnx": Face(
        (WriteOptions,), dict.fromkeys(("fold", "export", "check"), "its options in one object"), _WRITE
    ),
    "verify": Face(
        (PlaceOptions, CheckOptions),
        without={"providers": _COMMANDS, "tf32": _COMMANDS, "repro": _COMMANDS},
        unlike={"check": "none leaves nothing to verify"},
    ),
    "bench": Face(
        (BenchOptions, PlaceOptions),
        {**_INPUTS, "names": "a command has those of files", "seed": "of LoadOptions"},
        {"providers": _COMMANDS},
        {"device": "models in memory lie on the CPU until somebody moves them"},
    ),
    "load": Face(
        (LoadOptions,),
        {"prepare": "Python's own", "stand_ins": "`summary` always does", "tell": "who is told"},
        {"inputs": "what it is run on is said later", "seed": "nothing is drawn"},
        {"weights": "a Path too"},
    ),
    "open_batches": Face(
        (DataOptions,),
        {"seed": "of LoadOptions", "like": "a command knows its model", "share": "torchrun says it"},
        {"data": _ONE},
        {"mean": "numbers too, where a command has text", "std": "numbers too, where a command has text"},
        {"include": "files"},
    ),
    "calibrate": Face(
        (CalibrateOptions,),
        {"reset": "a command begins anew", "progress": "who is told"},
    ),
    "convert_state_dict": Face(),
}  # fmt: skip


def _of(hint: Any) -> tuple[bool, bool, Any]:
    """Whether None will do, whether there are several, and of what: choices, or a type."""
    none = many = False
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        parts = typing.get_args(hint)
        none = type(None) in parts
        parts = tuple(part for part in parts if part is not type(None))
        hint = parts[0] if len(parts) == 1 else frozenset(parts)
    if typing.get_origin(hint) in (tuple, collections.abc.Sequence, collections.abc.Iterable):
        many, hint = True, typing.get_args(hint)[0]
    if typing.get_origin(hint) is typing.Literal:
        hint = frozenset(typing.get_args(hint))
    return none, many, hint


def _keywords(name: str) -> dict[str, tuple[Any, tuple[bool, bool, Any]]]:
    function = getattr(bntool, name)
    hints = typing.get_type_hints(function, localns={"Decimal": Any})
    parameters = inspect.signature(function).parameters.values()
    return {p.name: (p.default, _of(hints[p.name])) for p in parameters if p.kind is p.KEYWORD_ONLY}


def _options(face: Face) -> dict[str, tuple[Any, tuple[bool, bool, Any]]]:
    found = {}
    for cls in face.options:
        hints = typing.get_type_hints(cls)
        found |= {one.name: (one.default, _of(hints[one.name])) for one in cls.options()}
    return found


@pytest.mark.parametrize("name", FACES)
def test_a_function_takes_the_options_of_its_classes(name: str) -> None:
    face, keywords = FACES[name], _keywords(name)
    options = _options(face)
    taken = {keyword: options[face.named.get(keyword, keyword)] for keyword in keywords.keys() - face.own}
    assert keywords.keys() >= face.own.keys()
    assert options.keys() - {face.named.get(keyword, keyword) for keyword in taken} == face.without.keys()
    differing = {keyword for keyword, one in taken.items() if keywords[keyword] != one}
    assert differing == face.unlike.keys(), [(keywords[k], taken[k]) for k in differing]


def test_every_public_function_has_its_options_listed() -> None:
    functions = {name for name in bntool.__all__ if inspect.isfunction(getattr(bntool, name))}
    assert functions == FACES.keys() | {"compare", "plan_insert", "read_plan"}
    assert _keywords("read_plan") == _keywords("plan_insert") == {}  # the latter: by InsertOptions.of


def test_a_comparison_is_set_as_on_the_command_line() -> None:
    named = {"lrs": "lr"}
    options = _options(Face((InsertOptions, CompareOptions)))
    for field in dataclasses.fields(Settings):
        if field.name not in ("seed", "device"):  # of LoadOptions and PlaceOptions
            default, kind = options[named.get(field.name, field.name)]
            assert _of(typing.get_type_hints(Settings)[field.name]) == kind, field.name
            assert field.default == default or field.name == "epochs", field.name
