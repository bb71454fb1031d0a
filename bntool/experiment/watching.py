"""What goes on inside a network while it trains: the inputs of activations, gradients, dead units."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bntool.core.plan import Plan

QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99)
_SAMPLE = 4096
"""Values of one activation that are looked at: the median of so many is good to 2 % of their spread."""


@dataclasses.dataclass(frozen=True)
class Place:
    """A value to watch: the output of `module`; `dead` says what a unit that is silent looks like there."""

    layer: str
    module: str
    dead: Callable[[Tensor, Tensor], Tensor] | None


@dataclasses.dataclass(frozen=True)
class Places:
    """The values and the weights that are watched in one arm, by the layers' names in the model as it was."""

    values: tuple[Place, ...]
    weights: Mapping[str, str]


def places_in_both(model: nn.Module, plan: Plan) -> tuple[Places, Places]:
    """What to watch without and with BatchNorm: the value where each BatchNorm stands, and every weight.

    With BatchNorm before the activation that value is the activation's input: without it the layer's output,
    with it the BatchNorm's. Behind the activation it is what the next layer reads.
    """
    after = plan.options.get("position") == "after"
    plain, normed = [], []
    for site in plan.insert_sites:
        dead = None
        if site.activation_kind in ("relu", "relu6"):
            dead = _constant if after else _never_positive
        plain.append(Place(site.conv, site.activation if after else site.conv, dead))
        normed.append(Place(site.conv, site.bn, dead))
    layers = {
        name.rpartition(".")[0]: name
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1 and parameter.requires_grad and name.rpartition(".")[2] == "weight"
    }
    moved = {layer: plan.key_map.get(name, name) for layer, name in layers.items()}
    return Places(tuple(plain), layers), Places(tuple(normed), moved)


def _never_positive(_: Tensor, most: Tensor) -> Tensor:
    return most <= 0


def _constant(least: Tensor, most: Tensor) -> Tensor:
    return least == most


class Watcher:
    """Looks into one training run at every `every`-th step; on the steps between it costs nothing.

    `records` holds for each of those steps its number, by layer the `mean`, `std`, `quantiles` (1, 25, 50,
    75, 99 %) of a sample of the values and the share of `dead` channels (no value above 0 in the batch; None
    where the activation is no ReLU), and by layer the norm of the weight's gradient.
    """

    def __init__(self, model: nn.Module, places: Places, every: int) -> None:
        self.every = every
        self.records: list[dict[str, Any]] = []
        self._modules = [(place, model.get_submodule(place.module)) for place in places.values]
        named = dict(model.named_parameters(remove_duplicate=False))
        self._weights = {layer: named[name] for layer, name in places.weights.items() if name in named}
        self._picked: dict[int, Tensor] = {}

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around the forward and backward of step `number`, before the optimizer's."""
        if not self.every or number % self.every:
            yield
            return
        seen: dict[str, dict[str, Any]] = {}
        handles = [module.register_forward_hook(self._hook(place, seen)) for place, module in self._modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        gradients = {
            layer: _finite(float(torch.linalg.vector_norm(weight.grad)))
            for layer, weight in self._weights.items()
            if weight.grad is not None
        }
        self.records.append({"step": number, "values": seen, "gradients": gradients})

    def _hook(self, place: Place, seen: dict[str, dict[str, Any]]) -> Callable[..., None]:
        def look(_module: nn.Module, _args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.numel():
                seen[place.layer] = self._figures(output.detach(), place)

        return look

    def _figures(self, values: Tensor, place: Place) -> dict[str, Any]:
        sample = self._sample(values)
        quantiles = torch.quantile(sample, torch.tensor(QUANTILES, device=sample.device))
        std, mean = torch.std_mean(sample, correction=0)
        figures = torch.cat([mean.reshape(1), std.reshape(1), quantiles]).tolist()
        dead = None
        if place.dead is not None and values.dim() > 1:
            least, most = torch.aminmax(values.transpose(0, 1).flatten(1), dim=1)
            dead = float(place.dead(least, most).float().mean())
        return {
            "mean": _finite(figures[0]),
            "std": _finite(figures[1]),
            "quantiles": [_finite(value) for value in figures[2:]],
            "dead": dead,
        }

    def _sample(self, values: Tensor) -> Tensor:
        """At most `_SAMPLE` values, drawn once for each size: a stride would follow rows and columns."""
        flat = values.flatten()
        if len(flat) > _SAMPLE:
            if len(flat) not in self._picked:
                generator = torch.Generator().manual_seed(0)
                drawn = torch.randint(len(flat), (_SAMPLE,), generator=generator)
                self._picked[len(flat)] = drawn.sort().values.to(flat.device)
            flat = flat[self._picked[len(flat)]]
        return flat.float()


def _finite(value: float) -> float | None:
    """Six digits, which is more than a sample says; None for NaN and infinity, which JSON does not know."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
