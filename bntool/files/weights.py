"""Finding the weights in what a file holds, and putting them into a model."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from bntool.core.errors import LoadError, UsageError
from bntool.files.security.pickled_calls import shown

StateDict = dict[str, Any]

_USUAL_KEYS = ("model", "state_dict", "ema", "model_state_dict")
_WRAPPERS = ("module.", "_orig_mod.")


@dataclasses.dataclass(frozen=True)
class Found:
    """Weights (or a whole module) inside what a file holds.

    `container` is the whole of it, `path` the keys that lead to the weights (empty when they are the
    whole), `prefix` what `DataParallel` or `torch.compile` had put before every key.
    """

    value: nn.Module | StateDict
    container: Any
    path: tuple[str, ...] = ()
    prefix: str = ""
    notes: tuple[str, ...] = ()


def find_weights(held: Any, key: str | None, where: str) -> Found:
    """The module or state_dict in a loaded object: itself, under `key` (`a.b` for nested), or a usual key.

    Raises `LoadError` when there is none, `UsageError` for a `key` that is not there.
    """
    if key is not None:
        path = _key_path(held, key, where)
    elif isinstance(held, nn.Module) or is_state_dict(held):
        path = ()
    else:
        path = _usual_path(held, where)
    value = held
    for step in path:
        value = value[step]
    notes: tuple[str, ...] = ()
    if path and any("optim" in str(k) for k in held):
        notes += ("its optimizer state belongs to the model as it was before any surgery",)
    if path:
        others = [
            str(k) for k, v in held.items() if k != path[0] and _is_weights(v) and "optim" not in str(k)
        ]
        notes = (f"weights taken from {'.'.join(path)!r}", *notes)
        if key is None and others:
            notes += (f"it also holds {', '.join(map(shown, others))}; --key takes another",)
    if isinstance(value, nn.Module):
        return Found(value, held, path, notes=notes)
    bare, prefix, inner = strip_wrappers(value)
    if inner:
        notes += ("'_orig_mod.' of torch.compile was taken out of the keys",)
    return Found(bare, held, path, prefix, notes)


def is_state_dict(value: Any) -> bool:
    """Whether this maps names to tensors (entries of `get_extra_state` may be anything)."""
    if not isinstance(value, Mapping) or not value:
        return False
    return all(isinstance(k, str) for k in value) and all(
        isinstance(v, Tensor) or k.endswith("_extra_state") for k, v in value.items()
    )


def strip_wrappers(state: Mapping[str, Any]) -> tuple[StateDict, str, bool]:
    """The state_dict without wrapper prefixes, the prefix all keys had, and whether one stood inside keys."""
    bare = without_prefix(state, "")
    prefix = ""
    while (wrapper := next((w for w in _WRAPPERS if all(k.startswith(w) for k in bare)), None)) and bare:
        # `module.` may be the model's own only child; then every key says so, and the model decides (fill).
        consume_prefix_in_state_dict_if_present(bare, wrapper)
        prefix += wrapper
    inner = any("._orig_mod." in k for k in bare)
    if inner:
        bare = OrderedDict((k.replace("._orig_mod.", "."), v) for k, v in bare.items())
    return bare, prefix, inner


def prefix_over(own: Iterable[str], state: Iterable[str]) -> str:
    """What a module around the model, as training frameworks have one, put before every key of `state`.

    Empty unless the keys without it are exactly the model's `own`.
    """
    names, keys = set(own), set(state)
    first = min(names, default="")
    for key in keys:
        prefix = key.removesuffix(first)
        if prefix.endswith(".") and key != prefix and {prefix + name for name in names} == keys:
            return prefix
    return ""


def without_prefix(state: Mapping[str, Any], prefix: str) -> StateDict:
    """The state_dict without `prefix`, with which each of its keys begins, its metadata too."""
    bare: OrderedDict[str, Any] = OrderedDict(state)
    metadata = getattr(state, "_metadata", None)
    if isinstance(metadata, dict):
        bare._metadata = OrderedDict(metadata)  # type: ignore[attr-defined]
    if prefix:
        consume_prefix_in_state_dict_if_present(bare, prefix)
    return bare


def with_prefix(state: Mapping[str, Any], prefix: str) -> StateDict:
    """The state_dict with `prefix` before every key, its metadata too."""
    if not prefix:
        return state if isinstance(state, dict) else dict(state)
    out: OrderedDict[str, Any] = OrderedDict((prefix + k, v) for k, v in state.items())
    metadata = getattr(state, "_metadata", None)
    if isinstance(metadata, dict):
        stem = prefix.rstrip(".")
        out._metadata = OrderedDict(  # type: ignore[attr-defined]
            (f"{prefix}{k}" if k else stem, v) for k, v in metadata.items()
        )
    return out


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


def _is_weights(value: Any) -> bool:
    return isinstance(value, nn.Module) or is_state_dict(value)


def _key_path(held: Any, key: str, where: str) -> tuple[str, ...]:
    for path in ((key,), tuple(key.split("."))):
        value = held
        for step in path:
            value = value.get(step) if isinstance(value, Mapping) else None
        if _is_weights(value):
            return path
    raise UsageError(
        f"--key {key}: no weights there; {_contents(held)}", where=where, next_step="name another --key"
    )


def _usual_path(held: Any, where: str) -> tuple[str, ...]:
    if isinstance(held, Mapping):
        for key in _USUAL_KEYS:
            value = held.get(key)
            if _is_weights(value):
                return (key,)
        for outer in _USUAL_KEYS:
            inner = held.get(outer)
            if isinstance(inner, Mapping):
                for key in _USUAL_KEYS:
                    if _is_weights(inner.get(key)):
                        return (outer, key)
    raise LoadError(
        f"no model or weights found: {_contents(held)}",
        where=where,
        next_step="name the entry that holds them: --key NAME" if isinstance(held, Mapping) and held
        else "torch.save an nn.Module or its state_dict",
    )  # fmt: skip


def _contents(held: Any) -> str:
    if isinstance(held, Mapping):
        keys = [shown(str(k)) for k in list(held)[:8]]
        return f"it holds {', '.join(keys)}" + (" ..." if len(held) > 8 else "") if keys else "it is empty"
    return f"it holds a {type(held).__name__}"
