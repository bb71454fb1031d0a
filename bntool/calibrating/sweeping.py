"""One pass over the data: what each BatchNorm layer reads, with the model left as it was."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from bntool.calibrating.drift import Grouping
from bntool.calibrating.moments import Moments, Seen
from bntool.core.errors import BntoolError, StateError, UsageError
from bntool.data.loaders import inputs_of, samples_of
from bntool.graph.inputs import Inputs, outputs_of
from bntool.observe.isolation import Isolation, fresh
from bntool.observe.side_effects import require_materialised
from bntool.precision.casting import is_finite
from bntool.runtime.process_group import World
from bntool.runtime.torch_runner import float32_products
from bntool.verifying.differences import difference

Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What one pass over the data saw: layers by qualified name (only those that ran), batches and samples.

    `first` is the layer that ran first, and `grouping` what it read batch by batch.
    """

    layers: Mapping[str, Seen]
    batches: int
    samples: int = 0
    first: str = ""
    grouping: Grouping = dataclasses.field(default_factory=Grouping)

    @property
    def warning(self) -> str:
        """That batches differ more than chance allows, or are single samples; empty where they are not."""
        alone = self.samples and self.samples == self.batches and len(self.layers) > 1
        return self.grouping.told(self.first) or (ALONE if alone else "")


ALONE = (
    "warning: each batch is one sample, which every BatchNorm normalises by itself, as no training does: the "
    "statistics of all but the first are not those of the model. Use the batch size of the training"
)


def sweep(
    model: nn.Module,
    names: Sequence[str],
    batches: Iterable[Any],
    *,
    batch_statistics: bool,
    progress: Progress | None = None,
) -> Sweep:
    """Run every batch once and collect what the named BatchNorm layers read.

    With `batch_statistics` those layers normalise each batch by its own statistics, as in training;
    without, by what they hold. Every other layer is in eval mode either way. The batches run in isolation,
    on one stand-in: the model, the random state and the TF32 flags stay as they were.

    Raises:
        UsageError: data with NaN or Inf, or data that the model does not take.
        StateError: finite data became NaN or infinite inside the model.
    """
    require_materialised(model)
    with Isolation(model).run() as run:
        return _swept(run, names, batches, batch_statistics, progress)


def _swept(
    run: nn.Module,
    names: Sequence[str],
    batches: Iterable[Any],
    batch_statistics: bool,
    progress: Progress | None,
) -> Sweep:
    layers = {name: run.get_submodule(name) for name in names}
    for layer in layers.values():
        layer.training = batch_statistics
        if batch_statistics and isinstance(layer, nn.SyncBatchNorm):
            _normalise_alone(layer)
    device = next((t.device for t in (*run.parameters(), *run.buffers())), torch.device("cpu"))
    watch = _Watch({id(layer): name for name, layer in layers.items()}, batch_statistics)
    with float32_products(tf32=False), torch.no_grad(), watch.hooks():
        for inputs in inputs_of(run, batches):
            watch.batch += 1
            watch.size = samples_of(inputs)
            watch.samples += watch.size
            watch.heard_first = False
            if progress:
                progress(f"batch {watch.batch}")
            _require_finite(inputs, watch.batch)
            _run_batch(run, fresh(inputs.to(device=device)), watch)
    return Sweep(watch.seen, watch.batch, watch.samples, watch.first, watch.grouping)


def difference_in_training(
    original: nn.Module, modified: nn.Module, names: Sequence[str], batches: Iterable[Any]
) -> float | None:
    """How far the outputs move when the named new layers normalise by the batch, of their peak; the largest.

    Every other layer is in eval mode, so that no dropout is counted. None where a batch has one value per
    channel, which no layer can normalise.
    """
    with Isolation(modified).run() as run, Isolation(original).run() as reference:
        return _difference(run, reference, names, batches)


def _difference(
    run: nn.Module, reference: nn.Module, names: Sequence[str], batches: Iterable[Any]
) -> float | None:
    for name in names:
        layer = run.get_submodule(name)
        layer.training = True
        if isinstance(layer, nn.SyncBatchNorm):
            _normalise_alone(layer)
    device = next((t.device for t in (*run.parameters(), *run.buffers())), torch.device("cpu"))
    worst = 0.0
    with float32_products(tf32=False), torch.no_grad():
        for inputs in inputs_of(run, batches):
            before, after = (fresh(inputs.to(device=device)) for _ in range(2))
            try:
                moved = outputs_of(run(*after.args, **after.kwargs))
            except ValueError:  # torch: more than one value per channel expected
                return None
            kept = outputs_of(reference(*before.args, **before.kwargs))
            worst = max(worst, *(difference(kept[name], moved.get(name)).relative for name in kept))
    return worst


def pooled(found: Sweep, world: World) -> Sweep:
    """What all processes saw together, merged in the order of their ranks, the same on each. Collective."""
    if world.size == 1:
        return found
    own = dataclasses.replace(found, layers={name: seen.to("cpu") for name, seen in found.layers.items()})
    parts = world.gather(own)
    layers: dict[str, Seen] = {}
    for part in parts:
        for name, seen in part.layers.items():
            layers[name] = layers[name].merged(seen) if name in layers else seen
    batches, samples = sum(part.batches for part in parts), sum(part.samples for part in parts)
    # One layer's view of all batches: of processes that saw another one first, none.
    first = next((part.first for part in parts if part.batches), "")
    groups = [part.grouping for part in parts if part.first == first]
    return Sweep(layers, batches, samples, first, functools.reduce(Grouping.merged, groups, Grouping()))


def require_batches(found: Sweep) -> None:
    """Raise `UsageError` where there was no data."""
    if not found.batches:
        raise UsageError("the data holds no batch", next_step="pass at least one batch")


class _Watch(TorchFunctionMode):
    """Sees every call of batch_norm, and which of the watched layers makes it.

    The call and not the layer's own input is what counts: a subclass may permute or cast before it.
    """

    def __init__(self, names: dict[int, str], batch_statistics: bool) -> None:
        super().__init__()
        self.names = names
        self.batch_statistics = batch_statistics
        self.seen: dict[str, Seen] = {}
        self.inside: list[str] = []
        self.heard: set[str] = set()
        self.batch = self.size = self.samples = 0
        self.first = ""
        self.grouping = Grouping()
        self.heard_first = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.inside and func in (nn.functional.batch_norm, torch.batch_norm):
            self.heard.add(self.inside[-1])
            self.collect(self.inside[-1], args[0] if args else kwargs["input"])
        return func(*args, **(kwargs or {}))

    def collect(self, name: str, values: Tensor) -> None:
        where = f"{name or 'the model'}, batch {self.batch}"
        if self.batch_statistics and values.dim() > 1 and values.numel() <= values.shape[1]:
            raise UsageError(
                "a batch gives the layer only one value for each channel, so it has no variance",
                where=where,
                next_step="use larger batches (--batch-size 2 or more)",
            )
        if not bool(torch.isfinite(values).all()):
            raise StateError(
                "the layer reads NaN or infinite values though the data is finite",
                where=where,
                next_step="look at the weights of the layers before it, or run the model in float32",
            )
        self.compare(name, values)
        if name in self.seen:
            self.seen[name].add(values)
        else:
            self.seen[name] = Seen(Moments.of(values), dtype=values.dtype)

    def compare(self, name: str, values: Tensor) -> None:
        """Add what the first layer reads: nothing before it was normalised by the batch.

        A layer that reads rows of another kind than samples, such as tokens, tells nothing here: those of
        one sample are alike.
        """
        if self.heard_first or (self.grouping.counts and name != self.first):
            return
        self.heard_first = True
        if len(values) == self.size and values.dim() > 1:
            self.first = name
            self.grouping.add(values)

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        before = register_module_forward_pre_hook(self.enter)
        after = register_module_forward_hook(self.leave)
        try:
            yield
        finally:
            before.remove()
            after.remove()

    def enter(self, module: nn.Module, _: Any) -> None:
        if id(module) in self.names:
            self.inside.append(self.names[id(module)])
            self.heard.discard(self.names[id(module)])

    def leave(self, module: nn.Module, *_: Any) -> None:
        if id(module) not in self.names:
            return
        name = self.inside.pop()
        if name not in self.heard:
            raise UsageError(
                f"the layer ({type(module).__name__}) is a BatchNorm that normalises in a way of its own",
                where=name,
                next_step="its statistics can only be had by training it",
            )


def _run_batch(run: nn.Module, inputs: Inputs, watch: _Watch) -> None:
    try:
        with watch:
            run(*inputs.args, **dict(inputs.kwargs))
    except BntoolError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UsageError(
            f"the model failed on a batch of {inputs.shapes()}: {lines[0]}",
            where=f"batch {watch.batch}" + (f", {watch.inside[-1]}" if watch.inside else ""),
            next_step="give data of the shape and type that the model takes",
        ) from error


def _require_finite(inputs: Inputs, batch: int) -> None:
    tensors = inputs.tensors()
    if not any(t.numel() for t in tensors.values()):
        raise UsageError("a batch holds no data", where=f"batch {batch}", next_step="leave empty batches out")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not is_finite(tensor):
            raise UsageError(
                "the data holds NaN or infinite values",
                where=f"batch {batch}, {name}",
                next_step="clean the data: one such value spoils every statistic",
            )


def _normalise_alone(layer: nn.SyncBatchNorm) -> None:
    """Have it normalise by the batch of this process: it asks the others in train mode only.

    The batches of the processes are batches of their own, and one process may have more of them.
    """
    layer.training = False
    layer._buffers["running_mean"] = layer._buffers["running_var"] = None
