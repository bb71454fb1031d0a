"""One door for every model: a file, or a reference to code that makes it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from bntool.core.command_options import LoadOptions
from bntool.core.errors import InvariantError, LoadError, NeedsArchitecture, UsageError
from bntool.core.limits import Limit
from bntool.core.refusals import unknown
from bntool.files.architectures import closest, load_index, take_exact
from bntool.files.atomic import sha256_of
from bntool.files.detect import Kind, detect
from bntool.files.filling import bare_weights, filled
from bntool.files.folders import read_folder
from bntool.files.loaded import Loaded, LoadedKind
from bntool.files.reading import Reading, read_file
from bntool.files.references import build, is_reference, recorded_inputs
from bntool.files.regular import exists
from bntool.files.security.exported import read_exported
from bntool.files.security.missing import missing_names
from bntool.files.security.pickled_calls import shown
from bntool.files.security.scripted import DEPRECATED, read_script
from bntool.files.weights import Found, StateDict

_PLAIN = LoadOptions()
_SAFETENSORS = (Kind.SAFETENSORS, Kind.SAFETENSORS_INDEX)


def load(
    ref: str | os.PathLike[str],
    asked: LoadOptions = _PLAIN,
    *,
    prepare: Callable[[nn.Module], nn.Module] | None = None,
    stand_ins: bool = False,
    tell: Callable[[str], object] | None = None,
) -> Loaded:
    """`bntool.load`, with its options in one object; its inputs and seed are not looked at.

    Raises `LoadError` for what cannot be loaded, `UsageError` for options that do not fit together.
    """
    if not isinstance(ref, str | os.PathLike):
        raise unknown(ref)
    ref = os.fspath(ref)
    arch, weights, pretrained = asked.arch, asked.weights, asked.pretrained
    options = Reading(asked.key, asked.allow, asked.trust_pickle, Limit(asked.max_size), stand_ins, tell)
    path = Path(ref)
    if exists(path) and path.is_dir():
        return _from_folder(path, ref, arch, weights, prepare)
    if exists(path) or not is_reference(ref):
        if weights is not None or pretrained:
            flag = "--weights" if weights is not None else "--pretrained"
            raise UsageError(
                f"{flag} is for a model named by reference; {ref} is a file",
                next_step=f"bntool ... torchvision:NAME {flag}, or {ref} --arch torchvision:NAME",
            )
        if "://" in ref:
            raise LoadError(
                f"{shown(ref)} is an address, and bntool loads no file down",
                next_step="download it, and name the file",
            )
        return _from_file(path, ref, arch, options, prepare)
    if arch is not None:
        raise UsageError(
            f"--arch is for a file of weights; {ref} names its architecture itself",
            next_step=f"bntool ... {ref} --weights FILE",
        )
    return _from_reference(ref, weights, pretrained, options, prepare)


def _from_folder(
    path: Path,
    ref: str,
    arch: str | None,
    weights: str | None,
    prepare: Callable[[nn.Module], nn.Module] | None,
) -> Loaded:
    for flag, given in (("--arch", arch), ("--weights", weights)):
        if given is not None:
            raise UsageError(
                f"{flag} is for a file; {ref} is a folder, which names its model and holds its weights",
                next_step=f"leave {flag} out",
            )
    model = read_folder(path)
    model = prepare(model) if prepare is not None else model
    return Loaded(
        model=model,
        reference=ref,
        kind="reference",
        notes=(f"{type(model).__name__}, loaded by transformers from this folder",),
        example_inputs=recorded_inputs(model),
    )


def _from_file(
    path: Path,
    ref: str,
    arch: str | None,
    options: Reading,
    prepare: Callable[[nn.Module], nn.Module] | None,
) -> Loaded:
    kind_there = detect(path).kind if exists(path) else None
    if kind_there is Kind.PT2:
        return _program(path, ref, arch, options)
    common: dict[str, Any] = {"reference": ref, "path": path, "trust_pickle": options.trust_pickle}
    if kind_there is Kind.TORCHSCRIPT:
        script = read_script(path, trust_pickle=options.trust_pickle, limit=options.limit)
        return Loaded(script, kind="script", source_hash=sha256_of(path), notes=(DEPRECATED,), **common)
    read = read_file(path, options)
    found = read.found
    common |= {
        "source_hash": sha256_of(path),
        "allow": options.allow,
        "key": options.key,
        "wrapped_in": found,
        "metadata": read.metadata,
        "shards": read.shards,
    }
    if isinstance(found.value, nn.Module):
        return _whole(found, found.value, arch, common)
    if arch is None:
        raise _without_architecture(path, found, options)
    arch, found = _chosen(arch, found, found.value, options)
    model = build(arch).model
    if prepare is not None:
        model = prepare(model)
    found = filled(model, found, arch, str(path))
    outer: LoadedKind = "safetensors" if read.kind.kind in _SAFETENSORS else "state_dict"
    return Loaded(
        model=model,
        kind="checkpoint" if found.path else outer,
        arch=arch,
        notes=found.notes,
        example_inputs=recorded_inputs(model),
        state_dict=_weights_of(found),
        **{**common, "wrapped_in": found},
    )


def _whole(found: Found, model: nn.Module, arch: str | None, common: dict[str, Any]) -> Loaded:
    """A file that holds the whole model."""
    notes = found.notes
    missing = missing_names(model)
    if missing:
        notes += (f"not here, so only looked at and not run: {', '.join(map(shown, missing))}",)
    if arch is not None:
        notes += (f"--arch {arch} was not needed: the file holds a whole model",)
    return Loaded(
        model=model,
        kind="checkpoint" if found.path else "module",
        notes=notes,
        example_inputs=recorded_inputs(model),
        **common,
    )


def _chosen(arch: str, found: Found, state: StateDict, options: Reading) -> tuple[str, Found]:
    """The reference to the architecture of weights; for `auto` the one that fits, as the notes say."""
    if arch == "auto":
        arch = take_exact(bare_weights(state), load_index(options.tell))
        found = dataclasses.replace(found, notes=(*found.notes, f"--arch auto: {arch}"))
    if not is_reference(arch):
        raise UsageError(
            f"--arch {shown(arch)} is not a reference to a model",
            next_step="--arch torchvision:resnet50, timm:NAME, pkg.mod:factory or path/file.py:Class",
        )
    return arch, found


def _without_architecture(path: Path, found: Found, options: Reading) -> NeedsArchitecture:
    state = bare_weights(_weights_of(found))
    near, fitting = "", "torchvision:resnet50"
    with contextlib.suppress(LoadError):
        # Those of timm take minutes: only for who asks for them, or has before.
        index = load_index(options.tell, build=("torchvision",))
        near = closest(index.matches(state), index)
        exact = [match.reference for match in index.matches(state) if match.exact]
        if exact:
            near = f"{' and '.join(exact[:3])} fit{'s' if len(exact) == 1 else ''}, which is for you to say"
            fitting = exact[0]
    error = NeedsArchitecture(
        f"{path.name} holds only weights ({len(state)} tensors), not the model they belong to"
        + (f"; {near}" if near else ""),
        where=str(path),
        next_step=f"name its architecture: {path.name} --arch {fitting}, --arch timm:NAME, --arch "
        "path/file.py:Class, or --arch auto to look for one that fits exactly (some minutes, the first time)",
    )
    error.weights = state
    return error


def _program(path: Path, ref: str, arch: str | None, options: Reading) -> Loaded:
    return Loaded(
        model=read_exported(path, trust_pickle=options.trust_pickle, limit=options.limit),
        reference=ref,
        kind="program",
        path=path,
        source_hash=sha256_of(path),
        allow=options.allow,
        trust_pickle=options.trust_pickle,
        notes=(f"--arch {arch} was not needed: the file holds a whole program",) if arch else (),
    )


def _from_reference(
    ref: str,
    weights: str | None,
    pretrained: bool,
    options: Reading,
    prepare: Callable[[nn.Module], nn.Module] | None,
) -> Loaded:
    if pretrained and weights is not None:
        raise UsageError("--pretrained and --weights exclude each other", next_step="drop one of them")
    built = build(ref, pretrained=pretrained)
    model = prepare(built.model) if prepare is not None else built.model
    if weights is None:
        return Loaded(
            model=model,
            reference=ref,
            kind="reference",
            allow=options.allow,
            notes=built.notes,
            example_inputs=recorded_inputs(model),
        )
    path = Path(weights)
    read = read_file(path, options)
    found = read.found
    if isinstance(found.value, nn.Module):
        found = dataclasses.replace(found, value=found.value.state_dict())
    found = filled(model, found, ref, str(path))
    return Loaded(
        model=model,
        reference=ref,
        kind="reference",
        source_hash=sha256_of(path),
        allow=options.allow,
        trust_pickle=options.trust_pickle,
        weights=str(path),
        key=options.key,
        notes=found.notes,
        example_inputs=recorded_inputs(model),
        state_dict=_weights_of(found),
        weight_shards=tuple(read.shards),
    )


def _weights_of(found: Found) -> StateDict:
    if isinstance(found.value, nn.Module):
        raise InvariantError("a whole module was taken for weights")
    return found.value
