"""Re-estimate the running statistics of every BatchNorm from data, on a copy of the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from bntool.calibrating.moments import Seen
from bntool.calibrating.statistics import store
from bntool.calibrating.sweeping import Sweep, pooled, require_batches, sweep
from bntool.core.errors import NothingToDo, UsageError
from bntool.core.showing import Column, Part, Said, Shown, Table, count
from bntool.core.text import Lines
from bntool.core.verdicts import Check
from bntool.frozen import FrozenNorm, freeze_layer, frozen_class
from bntool.observe.copying import structural_copy
from bntool.observe.modules import is_batch_norm_class, is_decomposed, require_module
from bntool.results.counting import parameter_delta
from bntool.results.results import delta_lines
from bntool.results.tables import text_of
from bntool.runtime.process_group import World
from bntool.surgery.fold_modules import with_own_tensors

Progress = Callable[[str], None]

_SHOWN = 10


@dataclasses.dataclass(frozen=True)
class CalibratedLayer:
    """A BatchNorm with new statistics, from `samples` values of each channel.

    `dead` are the channels whose population variance is below the layer's eps: their input hardly
    varies, and what little there is gets scaled by 1/√(σ² + ε), up to 316 times at eps 1e-5.
    """

    name: str
    channels: int
    samples: int
    dead: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "dead": list(self.dead)}


@dataclasses.dataclass(frozen=True)
class CalibrationResult(Shown):
    """A new model with re-estimated running statistics; the model that was given is untouched.

    `kept` names the BatchNorm layers left as they were, each with the reason. `parameters` holds
    `before`, `after` and `delta`, recounted from the tensors of both models. `warnings` tells of data that
    comes in an order: its batches are not those of training.
    """

    model: nn.Module
    layers: tuple[CalibratedLayer, ...]
    kept: tuple[tuple[str, str], ...]
    batches: int
    frozen: bool
    parameters: dict[str, dict[str, int]]
    samples: int = 0
    warnings: tuple[str, ...] = ()

    @property
    def status(self) -> str:
        return "ok"

    @property
    def plan(self) -> None:
        """Only values changed: there is no plan to replay on a fresh model."""

    @property
    def checks(self) -> tuple[Check, ...]:
        return ()

    @property
    def dead_channels(self) -> int:
        return sum(len(layer.dead) for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """The document that `--json` prints, without paths."""
        return {
            "status": self.status,
            "batches": self.batches,
            "samples": self.samples,
            "warnings": list(self.warnings),
            "frozen": self.frozen,
            "layers": [layer.to_dict() for layer in self.layers],
            "kept": [{"name": name, "detail": why} for name, why in self.kept],
            "dead_channels": self.dead_channels,
            "parameters": self.parameters,
        }

    def __str__(self) -> str:
        return self.render()

    def render(self, width: int | None = None, *, verbose: bool = True) -> Lines:
        """The layers as a table, then the totals and, where there is one, the parameter delta."""
        return text_of(self.parts(verbose=verbose), width)

    def parts(self, *, verbose: bool = True) -> Sequence[Part]:
        columns = (
            Column("BatchNorm", flexible=True),
            Column("Channels", number=True),
            Column("Samples", number=True),
            Column("Dead channels", number=True),
        )
        rows = [
            [layer.name or "(root)", count(layer.channels), count(layer.samples), count(len(layer.dead))]
            for layer in self.layers
        ]
        lines: list[Part] = [Table(columns, rows), ""] if verbose else []
        shown = self.kept if verbose else self.kept[:_SHOWN]
        lines += [Said(f"kept: {name}: {why}", "    ") for name, why in shown]
        if len(shown) < len(self.kept):
            lines.append(f"kept: {len(self.kept) - len(shown)} more")
        if shown:
            lines.append("")
        how = "calibrated and frozen" if self.frozen else "calibrated"
        batches = f"{count(self.batches)} {'batch' if self.batches == 1 else 'batches'}"
        samples = f"{count(self.samples)} {'sample' if self.samples == 1 else 'samples'}"
        norms = f"{len(self.layers)} BatchNorm {'layer' if len(self.layers) == 1 else 'layers'}"
        lines.append(f"{norms} {how} on {batches} of {samples}; {self._dead_text()}")
        lines += [Said(warning, "    ") for warning in self.warnings]
        if any(self.parameters["delta"].values()):
            lines += delta_lines(self.parameters)
        return lines

    def _dead_text(self) -> str:
        if not self.dead_channels:
            return "no dead channel"
        worst = max(self.layers, key=lambda layer: len(layer.dead))
        where = worst.name or "(root)"
        return f"{count(self.dead_channels)} dead channels (variance below eps), most in {where}"


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    reset: bool = True,
    freeze: bool = False,
    progress: Progress | None = None,
) -> CalibrationResult:
    """Recompute the running mean and variance of every BatchNorm from data, without momentum.

    Each layer's statistics are the exact mean and (unbiased) variance of all the values it read over
    all batches. While they are measured, BatchNorm layers normalise by the batch, as in training, and
    every other layer is in eval mode. Layers with `track_running_stats=False` get running statistics.
    With `freeze` the layers stay in eval mode through `model.train()`, and γ and β get no gradient.
    Without `reset` the statistics that the layers hold count too. `batches` is an iterable of tensors
    (N, …), `(input, target)` tuples, mappings of keyword inputs, or `Inputs`.

    Where torch.distributed is initialised, all processes of the default group call this together, each with
    its own share of the batches, which may be empty; what they read is pooled, and each gets the same result.

    Raises:
        NothingToDo: the model has no BatchNorm that can be calibrated, or the data reaches none.
        StateError: the statistics are not finite, or do not fit the layer's type.
        UsageError: no data, data with NaN or Inf, data that the model does not take, or a layer of a
            class that cannot be frozen.
        ProcessError: another process has ended.
    """
    require_module(model, "calibrate")
    names, kept = layers_of(model)
    if not names:
        raise NothingToDo(
            "every BatchNorm is frozen" if kept else "the model has no BatchNorm",
            where=kept[0][0] if kept else type(model).__name__,
            next_step="calibrate before freezing" if kept else "bntool insert puts BatchNorm in",
        )
    if freeze:
        _require_freezable(model, names)
    own = sweep(model, names, batches, batch_statistics=True, progress=progress)
    found = pooled(own, World.current())
    require_batches(found)
    if not found.layers:
        raise NothingToDo("the data reaches no BatchNorm", where=names[0])
    kept += [(name, "the data does not reach it") for name in names if name not in found.layers]
    calibrated = with_own_tensors(structural_copy(model), model)
    layers = _stored(calibrated, names, found, reset)
    if freeze:
        for layer in layers:
            freeze_layer(calibrated.get_submodule(layer.name))
    delta = parameter_delta(model, calibrated)
    warnings = (found.warning,) if found.warning else ()
    return CalibrationResult(
        calibrated, layers, tuple(kept), found.batches, freeze, delta, found.samples, warnings
    )


def layers_of(model: nn.Module) -> tuple[list[str], list[tuple[str, str]]]:
    """The BatchNorm layers to calibrate, and those to leave, with the reason: frozen ones."""
    names: list[str] = []
    kept: list[tuple[str, str]] = []
    for name, module in model.named_modules():
        if not is_batch_norm_class(type(module)):
            continue
        if isinstance(module, FrozenNorm) or is_decomposed(type(module)):
            kept.append((name, "frozen"))
        else:
            names.append(name)
    return names, kept


def untracked_layers(model: nn.Module) -> list[str]:
    """The layers to calibrate that hold no running statistics yet."""
    names, _ = layers_of(model)
    return [name for name in names if getattr(model.get_submodule(name), "running_var", None) is None]


def _stored(model: nn.Module, names: list[str], found: Sweep, reset: bool) -> tuple[CalibratedLayer, ...]:
    layers = []
    for name in names:
        seen: Seen | None = found.layers.get(name)
        if seen is None:
            continue
        module: Any = model.get_submodule(name)
        moments = store(module, name, seen, reset=reset)
        dead = torch.nonzero(moments.variance < module.eps).flatten().tolist()
        layers.append(CalibratedLayer(name, len(moments.mean), moments.count, tuple(dead)))
    return tuple(layers)


def _require_freezable(model: nn.Module, names: list[str]) -> None:
    for name in names:
        cls = type(model.get_submodule(name))
        if frozen_class(cls) is None:
            raise UsageError(
                f"a {cls.__name__} cannot be frozen: it is a class of the model's own",
                where=name,
                next_step="calibrate without freezing, and call eval() on it after every model.train()",
            )
