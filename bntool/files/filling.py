"""Putting the weights of a file into a model: which of its entries are the model's, under what prefix."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from bntool.core.errors import LoadError
from bntool.files.security.pickled_calls import shown
from bntool.files.weights import Found, StateDict, at, is_weight, places_of_weights, without_prefix

_WRAPPER = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod)\.")
_OUTER = re.compile(r"(?:(?:module|_orig_mod)\.)*")
_AVERAGED = re.compile(r"ema|averag|swa|shadow|teacher", re.IGNORECASE)
_NO_LAYER = re.compile(
    r"(?:criterion|n_averaged|\w*loss\w*|\w*metrics?)(?:\.|$)|(?:.*\.)?total_(?:ops|params)$", re.IGNORECASE
)
"""What training code keeps between weights: losses, metrics, the counters of AveragedModel and of thop."""


def filled(model: nn.Module, found: Found, arch: str, where: str) -> Found:
    """Put weights into `model` in place; what was found, as the model names it, and what was left beside.

    The weights are those under the prefix under which most of the model's names and shapes are, whatever a
    training framework calls it. Entries without that prefix are none of the model's; so is what is no tensor,
    and what training code keeps between weights.

    Raises:
        LoadError: a weight is missing, unexpected or of another shape, or several copies of them fit.
    """
    assert not isinstance(found.value, nn.Module)
    own = model.state_dict()
    keys = {key: key for key, value in found.value.items() if is_weight(key, value)}
    counts = _counted(own, found.value, keys, found.prefix)
    inner = {_without_inner(key): key for key in keys}
    if max(counts.values(), default=0) < len(own) and len(inner) == len(keys):
        without = _counted(own, found.value, inner, found.prefix)
        if max(without.values(), default=0) > max(counts.values(), default=0):
            keys, counts = inner, without
    prefix = _chosen(counts, found, len(own), where)
    names = {name[len(prefix) :]: key for name, key in keys.items() if name.startswith(prefix)}
    names = {name: key for name, key in names.items() if name in own or not _NO_LAYER.match(name)}
    state = _taken(found.value, names, prefix)
    beside = {key: value for key, value in found.value.items() if key not in set(names.values())}
    told = _told(prefix, names, beside)
    try:
        fill(model, state, arch, where)
    except LoadError as error:
        raise _with_way_out(error, own, found, told) from error
    return dataclasses.replace(found, value=state, prefix=prefix, notes=(*found.notes, *told), beside=beside)


def bare_weights(state: Mapping[str, Any]) -> StateDict:
    """The weights by the names that a model may have for them, where there is no model to ask.

    Without what wrappers put into them, and without the one child that a training module has around all but
    what training code keeps.
    """
    weights = {_WRAPPER.sub("", key): value for key, value in state.items() if is_weight(key, value)}
    net = {name: value for name, value in weights.items() if not _NO_LAYER.match(name)}
    children = {name.partition(".")[0] for name in net}
    child = f"{children.pop()}." if len(children) == 1 else ""
    if not child or child[:-1].isdigit() or not all(name.startswith(child) for name in net):
        return net
    return {name[len(child) :]: value for name, value in net.items()}


def _without_inner(key: str) -> str:
    """A key without the wrappers that stand inside it; those before all of it are a prefix."""
    outer = _OUTER.match(key)
    start = outer.end() if outer else 0
    return key[:start] + _WRAPPER.sub("", key[start:])


def _counted(
    own: Mapping[str, Any], state: Mapping[str, Any], keys: Mapping[str, str], within: str
) -> Counter[str]:
    """How many of the model's names and shapes there are under each prefix that begins with `within`."""
    shapes = {name: getattr(value, "shape", None) for name, value in own.items()}
    counts: Counter[str] = Counter()
    for name, key in keys.items():
        if not name.startswith(within):
            continue
        shape = getattr(state[key], "shape", None)
        starts = [0, *(i + 1 for i, letter in enumerate(name) if letter == ".")]
        for start in starts:
            tail = name[start:]
            if start >= len(within) and tail in shapes and shapes[tail] == shape:
                counts[name[:start]] += 1
    return counts


def _chosen(counts: Counter[str], found: Found, wanted: int, where: str) -> str:
    """The prefix with most of the names; a running average gives way to the weights themselves."""
    most = max(counts.values(), default=0)
    if 2 * most < wanted or counts[found.prefix] == most:
        return found.prefix
    best = sorted(prefix for prefix, count in counts.items() if count == most)
    best = [prefix for prefix in best if not _AVERAGED.search(prefix)] or best
    if len(best) > 1:
        keys = [".".join((*found.path, prefix[:-1])) for prefix in best]
        raise LoadError(
            f"the weights fit under {' and under '.join(map(repr, best))}",
            where=where,
            next_step=f"say which: {', or '.join(f'--key {shown(key)}' for key in keys)}",
        )
    return best[0]


def _taken(state: Mapping[str, Any], names: Mapping[str, str], prefix: str) -> StateDict:
    """The entries under the model's names for them, in their order; the metadata too."""
    taken: StateDict = OrderedDict((name, state[key]) for name, key in names.items())
    metadata = getattr(without_prefix(state, prefix), "_metadata", None)
    if isinstance(metadata, dict):
        inner = any(prefix + name != key for name, key in names.items())
        renamed = {_WRAPPER.sub("", f"{k}.")[:-1]: v for k, v in metadata.items()} if inner else metadata
        taken._metadata = OrderedDict(renamed)  # type: ignore[attr-defined]
    return taken


def _told(prefix: str, names: Mapping[str, str], beside: Mapping[str, Any]) -> tuple[str, ...]:
    """What was taken and what was left, in words."""
    notes = []
    if prefix and not beside:
        notes.append(f"{prefix!r} was taken off every key")
    elif prefix:
        notes.append(f"{len(names)} weights taken from under {prefix!r}")
    if any(prefix + name != key for name, key in names.items()):
        notes.append("'_orig_mod.' of torch.compile or 'module.' was taken out of the keys")
    if beside:
        others = "1 other" if len(beside) == 1 else f"{len(beside)} others"
        notes.append(f"{others} left, and saved as they are: {_some(list(beside))}")
    return tuple(notes)


def _with_way_out(error: LoadError, own: Mapping[str, Any], found: Found, told: tuple[str, ...]) -> LoadError:
    """The error with what was taken and left, and the entry of the file that does fit, where there is one."""
    here = ".".join(found.path)
    for place in places_of_weights(found.container):
        there = at(found.container, tuple(place.split(".")))
        if place != here and isinstance(there, Mapping) and own.keys() <= bare_weights(there).keys():
            error.next_step = f"--key {shown(place)} has all of its names"
            break
    return LoadError("; ".join((error.what, *told)), where=error.where, next_step=error.next_step)


def fill(model: nn.Module, state: Mapping[str, Any], what: str, where: str) -> None:
    """Load `state` into `model` in place, every key and shape; the tensors keep the file's types.

    A missing key is let pass only when its tensor is tied to one that is there. Raises `LoadError` with
    the missing and unexpected keys, and those whose tensors differ in shape or are complex where the model's
    are real.
    """
    own = model.state_dict()
    unlike = [
        f"{shown(k)} is {difference}"
        for k, v in state.items()
        if isinstance(v, Tensor) and isinstance(own.get(k), Tensor) and (difference := _difference(v, own[k]))
    ]
    missing: list[str] = []
    unexpected: list[str] = []
    if unlike:
        missing, unexpected = [k for k in own if k not in state], [k for k in state if k not in own]
    else:
        _match_dtypes(model, state)
        try:
            result = model.load_state_dict(state, strict=False)
        except (RuntimeError, TypeError, ValueError, AttributeError, KeyError) as error:
            raise _misfit(what, where, [shown(str(error).strip().split("\n")[-1].strip())]) from error
        missing, unexpected = list(result.missing_keys), list(result.unexpected_keys)
    kept = model.state_dict(keep_vars=True)
    given = {id(v) for k, v in kept.items() if k in state}
    missing = [k for k in missing if id(kept[k]) not in given]
    lines = [
        f"{len(keys)} {label} ({_some(keys)})"
        for label, keys in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape or type", unlike),
        )
        if keys
    ]
    if lines:
        raise _misfit(what, where, lines)


def _difference(given: Tensor, own: Tensor) -> str:
    if given.shape != own.shape:
        return f"{list(given.shape)}, the model has {list(own.shape)}"
    # Copied into real numbers, complex ones would lose their other half.
    return f"{given.dtype}, the model has {own.dtype}" if given.is_complex() and not own.is_complex() else ""


def _match_dtypes(model: nn.Module, state: Mapping[str, Any]) -> None:
    # load_state_dict copies into the model's types, which would round or widen what the file holds.
    for name, tensor in model.state_dict(keep_vars=True).items():
        given = state.get(name)
        if not isinstance(given, Tensor) or not isinstance(tensor, Tensor):
            continue
        if given.is_floating_point() and tensor.is_floating_point():
            tensor.data = tensor.data.to(given.dtype)


def _some(names: list[str]) -> str:
    rest = len(names) - 3
    return ", ".join(shown(n) for n in names[:3]) + (f" and {rest} more" if rest > 0 else "")


def _misfit(what: str, where: str, lines: list[str]) -> LoadError:
    return LoadError(
        f"the weights do not fit {what}: " + "; ".join(lines),
        where=where,
        next_step="name the architecture they were saved from; for one with changed layers write a function "
        "that makes it: --arch path/file.py:make_model",
    )
