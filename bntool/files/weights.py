"""Finding the weights in what a file holds, and putting them into a model."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from bntool.core.errors import LoadError, UsageError
from bntool.files.security.pickled_calls import shown

StateDict = dict[str, Any]

_USUAL_KEYS = ("model", "state_dict", "ema", "model_state_dict")
_DEEPEST = 8
_SHOWN = 6


@dataclasses.dataclass(frozen=True)
class Found:
    """Weights (or a whole module) inside what a file holds.

    `container` is the whole of it, `path` the keys that lead to the weights (empty when they are the
    whole), `prefix` what stands before the name of each weight, such as `module.` of `DataParallel`; `beside`
    are the entries between the weights that are none of the model's.
    """

    value: nn.Module | StateDict
    container: Any
    path: tuple[str, ...] = ()
    prefix: str = ""
    notes: tuple[str, ...] = ()
    beside: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def saved(self, weights: StateDict) -> StateDict:
        """New weights under the names that the file has for them, with what stood beside the old ones."""
        return with_prefix(weights, self.prefix, self.beside)


def find_weights(held: Any, key: str | None, where: str) -> Found:
    """The module or state_dict in a loaded object: itself, at `key`, at a usual key, or the only one in it.

    `key` is a path, `a.b.c`, through what is held; its end may be what stands before the names of weights.
    Raises `LoadError` when there is none, `UsageError` for a `key` that is not there.
    """
    prefix = ""
    if key is not None:
        path, prefix = _key_path(held, key, where)
    elif isinstance(held, nn.Module) or is_state_dict(held):
        path = ()
    else:
        path = _usual_path(held, where)
    value = held
    for step in path:
        value = value[step]
    notes: tuple[str, ...] = ()
    if path:
        others = [name for name in places_of_weights(held) if name != ".".join(path)]
        notes += (f"weights taken from {'.'.join(path)!r}",)
        if any("optim" in str(k) for k in held):
            notes += ("its optimizer state belongs to the model as it was before any surgery",)
        if key is None and others:
            notes += (f"it also holds {', '.join(map(shown, others))}; --key takes another",)
    if isinstance(value, nn.Module):
        return Found(value, held, path, notes=notes)
    return Found(without_prefix(value, ""), held, path, prefix, notes)


def is_state_dict(value: Any) -> bool:
    """Whether this maps names to tensors and to nothing else (`get_extra_state` may give anything)."""
    if not isinstance(value, Mapping) or not value:
        return False
    return all(isinstance(k, str) and is_weight(k, v) for k, v in value.items())


def is_weight(name: str, value: Any) -> bool:
    """Whether an entry of a state_dict belongs to a model."""
    return isinstance(value, Tensor) or name.endswith("_extra_state")


def places_of_weights(held: Any, at: tuple[str, ...] = ()) -> list[str]:
    """Where in a nest of mappings there are modules or state_dicts, as `--key` names them; no optimizer's."""
    if isinstance(held, nn.Module) or is_state_dict(held):
        return [".".join(at)]
    if not isinstance(held, Mapping) or len(at) > _DEEPEST:
        return []
    names = [name for name in held if isinstance(name, str) and "optim" not in name]
    return [place for name in names for place in places_of_weights(held[name], (*at, name))]


def without_prefix(state: Mapping[str, Any], prefix: str) -> StateDict:
    """The entries under `prefix`, without it; the metadata too."""
    bare: StateDict = OrderedDict((k[len(prefix) :], v) for k, v in state.items() if k.startswith(prefix))
    metadata = getattr(state, "_metadata", None)
    if isinstance(metadata, dict):
        stem = prefix.rstrip(".")
        kept = {k: v for k, v in metadata.items() if not prefix or k == stem or k.startswith(prefix)}
        bare._metadata = OrderedDict(  # type: ignore[attr-defined]
            (k[len(prefix) :] if k != stem or not prefix else "", v) for k, v in kept.items()
        )
    return bare


def with_prefix(state: Mapping[str, Any], prefix: str, beside: Mapping[str, Any] | None = None) -> StateDict:
    """The state_dict with `prefix` before every key, and what stood `beside` it; its metadata too."""
    if not prefix and not beside:
        return state if isinstance(state, dict) else dict(state)
    out: OrderedDict[str, Any] = OrderedDict((prefix + k, v) for k, v in state.items())
    out.update(beside or {})
    metadata = getattr(state, "_metadata", None)
    if isinstance(metadata, dict):
        stem = prefix.rstrip(".")
        out._metadata = OrderedDict(  # type: ignore[attr-defined]
            (f"{prefix}{k}" if k else stem, v) for k, v in metadata.items()
        )
    return out


def _key_path(held: Any, key: str, where: str) -> tuple[tuple[str, ...], str]:
    """The way to the weights that `key` names, and what stands before their names there."""
    starts: list[tuple[str, ...]] = [(), *((name,) for name in _USUAL_KEYS)]
    for start in starts:
        found = _walked(at(held, start), key)
        if found is not None:
            return (*start, *found[0]), found[1]
    there = [place for place in places_of_weights(held) if place]
    listed = f"--key {shown(there[0])}" if there else "name a file that holds weights"
    if len(there) > 1:
        listed += "".join(f", or --key {shown(place)}" for place in there[1:_SHOWN])
    raise UsageError(f"--key {key}: no weights there; {_contents(held)}", where=where, next_step=listed)


def _walked(held: Any, key: str) -> tuple[tuple[str, ...], str] | None:
    """The longest way along `key` through mappings whose rest, if any, stands before names of weights."""
    if isinstance(held, Mapping):
        parts = key.split(".")
        for end in range(len(parts), 0, -1):
            name, rest = ".".join(parts[:end]), ".".join(parts[end:])
            if name not in held:
                continue
            if not rest and holds_weights(held[name]):
                return (name,), ""
            found = _walked(held[name], rest) if rest else None
            if found is not None:
                return (name, *found[0]), found[1]
        prefix = f"{key}."
        if any(isinstance(k, str) and k.startswith(prefix) and is_weight(k, v) for k, v in held.items()):
            return (), prefix
    return None


def at(held: Any, path: tuple[str, ...]) -> Any:
    """What lies at the end of a way through mappings; None where there is no such way."""
    for step in path:
        held = held.get(step) if isinstance(held, Mapping) else None
    return held


def holds_weights(value: Any) -> bool:
    """Whether this is a module or maps names to tensors, among other things perhaps."""
    if isinstance(value, nn.Module):
        return True
    return isinstance(value, Mapping) and any(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items()
    )


def _is_all_weights(value: Any) -> bool:
    return isinstance(value, nn.Module) or is_state_dict(value)


def _usual_path(held: Any, where: str) -> tuple[str, ...]:
    usual: list[tuple[str, ...]] = [(key,) for key in _USUAL_KEYS]
    usual += [(outer, inner) for outer in _USUAL_KEYS for inner in _USUAL_KEYS]
    for fits in (_is_all_weights, holds_weights):
        for path in usual:
            if fits(at(held, path)):
                return path
    there = places_of_weights(held)
    if len(there) == 1:
        return _key_path(held, there[0], where)[0]
    if not there and isinstance(held, Mapping) and holds_weights(held):
        return ()
    next_step = "torch.save an nn.Module or its state_dict"
    if there:
        next_step = "say which: " + ", ".join(f"--key {shown(place)}" for place in there[:_SHOWN])
    elif isinstance(held, Mapping) and held:
        next_step = "name a file that holds weights"
    what = f"{len(there)} sets of weights found" if there else "no model or weights found"
    raise LoadError(f"{what}: {_contents(held)}", where=where, next_step=next_step)


def _contents(held: Any) -> str:
    if isinstance(held, Mapping):
        keys = [shown(str(k)) for k in list(held)[:8]]
        return f"it holds {', '.join(keys)}" + (" ..." if len(held) > 8 else "") if keys else "it is empty"
    return f"it holds a {type(held).__name__}"
