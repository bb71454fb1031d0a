"""Running statistics: measured from data, and stored in BatchNorm layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bntool.calibrating.moments import Moments, Seen
from bntool.calibrating.sweeping import Sweep, require_batches, sweep
from bntool.core.errors import StateError, UsageError
from bntool.runtime.process_group import World

_SHOWN_CHANNELS = 5


def swept(model: nn.Module, layers: Sequence[str | nn.Module], batches: Iterable[Any]) -> Sweep:
    """What BatchNorm layers read in one eval-mode pass, and whether its batches are as chance makes them.

    `layers` are qualified names or modules of `model`. One that the data does not reach is not in the result.

    Raises what `sweep` raises, and `UsageError` for no data, for a layer that the model does not have, and
    in one of several processes.
    """
    _require_one_process()
    names = [_name_of(model, layer) for layer in layers]
    found = sweep(model, names, batches, batch_statistics=False)
    require_batches(found)
    return found


def of_population(found: Sweep) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and population variance by layer."""
    return {name: (seen.moments.mean, seen.moments.variance) for name, seen in found.layers.items()}


def set_preserving(layer: nn.Module, mean: Tensor, variance: Tensor) -> None:
    """Give a BatchNorm these statistics, and the γ and β with which it hands its input on unchanged.

    μ and σ² are stored, γ = √(σ² + ε) from the stored σ², β = the stored μ, and what the layer added to
    its input before (β − μ, a bias it took over) it still adds. In eval mode y = x up to
    rounding. In train mode y = x too on a batch that has these statistics, which needs the population
    variance (`measure` gives it). In place. Raises `UsageError` for a layer without γ, β or running
    statistics, `StateError` for statistics that are not finite or negative.
    """
    norm: Any = layer
    for name in ("running_mean", "running_var", "weight", "bias"):
        if getattr(norm, name, None) is None:
            raise UsageError(
                f"a BatchNorm without {name} cannot keep its input as it is",
                next_step="use affine=True and track_running_stats=True, or init='identity'",
            )
    _require_good(type(layer).__name__, mean, variance, norm.running_var.dtype)
    with torch.no_grad():
        added = norm.bias.double() - norm.running_mean.double()
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        norm.weight.copy_((norm.running_var.double() + norm.eps).sqrt())
        norm.bias.copy_(norm.running_mean.double() + added)


def store(layer: nn.Module, name: str, seen: Seen, *, reset: bool = True) -> Moments:
    """Write what a BatchNorm read into its running statistics, in place; returns what was stored.

    As PyTorch does, `running_var` is the unbiased variance and `num_batches_tracked` the number of calls.
    A layer without running statistics gets them, and tracks from now on. Without `reset` what it holds
    counts too, each batch it has tracked as one call of the mean size seen here. Raises `StateError` for
    statistics that do not fit the layer's type.
    """
    norm: Any = layer
    moments, calls = seen.moments, seen.calls
    if not reset:
        earlier, tracked = _held(norm, name, seen)
        if earlier is not None:
            moments, calls = earlier.merged(moments), calls + tracked
    had = norm.running_mean is not None and norm.running_var is not None
    like = norm.running_var if had else getattr(norm, "weight", None)
    dtype = seen.dtype if like is None else like.dtype
    device = moments.mean.device if like is None else like.device
    _require_good(name, moments.mean, moments.unbiased_variance, dtype)
    _put(norm, "running_mean", moments.mean.to(device, norm.running_mean.dtype if had else dtype))
    _put(norm, "running_var", moments.unbiased_variance.to(device, dtype))
    if not had:
        norm.track_running_stats = True
    if not had or norm.num_batches_tracked is not None:
        _put(norm, "num_batches_tracked", torch.tensor(calls, dtype=torch.long, device=device))
    return moments


def _require_one_process() -> None:
    if World.current().size > 1:
        raise UsageError(
            "statistics are measured in one process, and this is one of several",
            next_step="measure before torch.distributed.init_process_group; bntool.calibrate pools processes",
        )


def _held(norm: Any, name: str, seen: Seen) -> tuple[Moments | None, int]:
    """The statistics a layer holds as moments, and how many batches they stand for."""
    if norm.running_mean is None or norm.running_var is None:
        return None, 0
    if norm.num_batches_tracked is None:
        raise UsageError(
            "the layer does not count its batches, so its old statistics have no weight",
            where=name,
            next_step="calibrate with reset=True",
        )
    tracked = int(norm.num_batches_tracked)
    if not tracked:
        return None, 0
    _require_good(name, norm.running_mean, norm.running_var, norm.running_var.dtype)
    count = round(tracked * seen.moments.count / seen.calls)
    variance = norm.running_var.to(seen.moments.m2)
    return Moments(count, norm.running_mean.to(seen.moments.mean), variance * (count - 1)), tracked


def _put(norm: Any, name: str, tensor: Tensor) -> None:
    if norm._buffers.get(name) is not None:
        norm._buffers[name] = tensor
        return
    norm.__dict__.pop(name, None)
    norm.register_buffer(name, tensor)


def _require_good(name: str, mean: Tensor, variance: Tensor, dtype: torch.dtype) -> None:
    # Some types can be stored and not compared.
    kept, middle = variance.to(dtype).double(), mean.to(dtype).double()
    bad = ~(torch.isfinite(middle) & torch.isfinite(kept) & (kept >= 0))
    if not bad.any():
        return
    channels = bad.nonzero().flatten().tolist()
    shown = ", ".join(map(str, channels[:_SHOWN_CHANNELS]))
    shown += ", …" if len(channels) > _SHOWN_CHANNELS else ""
    narrow = bool(torch.isfinite(variance).all()) and not bool((variance < 0).any())
    kind = str(dtype).removeprefix("torch.")
    trouble = f"do not fit {kind}" if narrow else "are negative or not finite"
    raise StateError(
        f"the statistics {trouble}, channel {shown}",
        where=name,
        next_step="convert the model to float32 first" if narrow else "calibrate with reset=True",
    )


def _name_of(model: nn.Module, layer: str | nn.Module) -> str:
    for name, module in model.named_modules(remove_duplicate=False):
        if module is layer or (isinstance(layer, str) and name == layer):
            return str(name)
    shown = layer if isinstance(layer, str) else type(layer).__name__
    raise UsageError(f"the model has no layer {shown}", next_step="name a layer of model.named_modules()")
