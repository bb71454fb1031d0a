"""What a reader of a summary should know about single layers, beyond their sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bntool.results.counting import Owned
from bntool.results.walking import Call

_NAMED = 3


@dataclasses.dataclass(frozen=True)
class Note:
    """One remark and the layers it is about."""

    text: str
    layers: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.layers:
            return self.text
        named = ", ".join(self.layers[:_NAMED])
        rest = len(self.layers) - _NAMED
        return f"{self.text}: {named}" + (f" and {rest} more" if rest > 0 else "")

    def to_dict(self) -> dict[str, Any]:
        return {"text": self.text, "layers": list(self.layers)}


def notes_on_state(model: nn.Module, owned: Mapping[str, Owned]) -> list[Note]:
    """Remarks that need no forward pass: bad or unused statistics, sharing."""
    modules = list(model.named_modules())
    bad = [name for name, module in modules if _statistics_are_bad(module)]
    unused = [name for name, module in modules if _saw_no_batch(module)]
    tied = [
        f"{name}.{local} is {first}" if name else f"{local} is {first}"
        for name, own in owned.items()
        for local, first in own.tied
    ]
    return _present(
        ("running statistics are not finite or negative", bad),
        ("statistics have seen no batch yet (num_batches_tracked is 0)", unused),
        ("tied, counted at the first place", tied),
        ("shared module, counted at the first place", list(_shared_modules(model))),
        ("parameters not initialised yet", [name for name, own in owned.items() if own.uninitialized]),
    )


def note_on_biases(layers: Sequence[str]) -> list[Note]:
    """The remark on layers whose bias the BatchNorm that follows takes out again."""
    text = "bias without effect, the BatchNorm that follows takes it out (insert --drop-bias moves it)"
    return _present((text, list(layers)))


def notes_on_calls(modules: Mapping[str, nn.Module], calls: Mapping[str, Call]) -> list[Note]:
    """Remarks from the forward pass about these modules: not called, called again, or out of sight."""
    scripted = [name for name, module in modules.items() if isinstance(module, torch.jit.ScriptModule)]
    unseen = [name for name in modules if name not in calls]
    counts = {name: calls[name].count for name in modules if name in calls}
    said = [Note("inside TorchScript shapes are seen of layers that hold tensors alone")]
    return said * bool(scripted) + _present(
        ("not called as a module on this input", [name for name in unseen if name not in scripted]),
        (
            "runs more than once, shapes of the first call",
            [f"{n} ({count}x)" for n, count in counts.items() if count > 1],
        ),
        ("TorchScript, shapes not seen", [name for name in unseen if name in scripted]),
    )


def _present(*candidates: tuple[str, list[str]]) -> list[Note]:
    return [Note(text, tuple(layers)) for text, layers in candidates if layers]


def _statistics(module: nn.Module) -> tuple[Tensor, Tensor] | None:
    mean, variance = getattr(module, "running_mean", None), getattr(module, "running_var", None)
    if not isinstance(mean, Tensor) or not isinstance(variance, Tensor):
        return None
    # Nothing can be read from tensors that hold no values (lazy layers, the meta device).
    return None if mean.is_meta or is_lazy(mean) else (mean, variance)


def _statistics_are_bad(module: nn.Module) -> bool:
    statistics = _statistics(module)
    if statistics is None:
        return False
    mean, variance = (tensor.double() for tensor in statistics)  # float8 has no such tests of its own
    return not bool(torch.isfinite(mean).all() & torch.isfinite(variance).all() & (variance >= 0).all())


def _saw_no_batch(module: nn.Module) -> bool:
    tracked = getattr(module, "num_batches_tracked", None)
    return _statistics(module) is not None and isinstance(tracked, Tensor) and int(tracked) == 0


def _shared_modules(model: nn.Module) -> Iterator[str]:
    """Second places of modules that hold tensors, outermost only; sharing the rest costs nothing."""
    first = {module: name for name, module in model.named_modules()}
    seen: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        inside = any(name.startswith(f"{outer}.") for outer in seen)
        if first[module] == name or inside or not any(True for _ in module.parameters()):
            continue
        seen.append(name)
        yield f"{name} is {first[module]}"
