"""Example inputs where nobody gave any: from what the model records, else from its first layer."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bntool.core.errors import ObserveError
from bntool.graph.drawing import Draw
from bntool.graph.inputs import Inputs
from bntool.observe.eager import Observation, observe
from bntool.observe.first_layer import SMALL_SIDE, TELLING, first_layer, shapes_for
from bntool.observe.modules import class_name

Seen = TypeVar("Seen")


def observe_inferred(model: nn.Module, *, small: bool = False) -> Observation:
    """Observe the model on the first guessed input that it accepts; `inputs.origin` says which.

    Raises `ObserveError` as `first_that_runs` does.
    """
    return first_that_runs(model, lambda inputs: observe(model, inputs), small=small)


def first_that_runs(model: nn.Module, run: Callable[[Inputs], Seen], *, small: bool = False) -> Seen:
    """What `run` gives on the first guessed input that it does not refuse with an `ObserveError`.

    With `small`, try a 64-pixel image first, unless the model says that its size is fixed: the graph is the
    same and costs a fraction.

    Raises:
        ObserveError: no guess fits, or there is nothing to guess from.
    """
    failures: list[ObserveError] = []
    for inputs in guesses(model, small=small):
        try:
            with _warning_when_it_runs():
                return run(inputs.named_for(model.forward))
        except ObserveError as error:
            failures.append(error)
    for inputs in _of_the_layer_that_failed(model, failures, small):
        with contextlib.suppress(ObserveError), _warning_when_it_runs():
            return run(inputs.named_for(model.forward))
    if not failures:
        raise ObserveError(
            "cannot infer an example input: the model has no layer that tells its input's shape",
            where=class_name(type(model)),
            next_step="give one with --input 1x3x224x224 (example_inputs= in Python)",
        )
    raise failures[0]


@contextlib.contextmanager
def _warning_when_it_runs() -> Iterator[None]:
    """Warnings are passed on where nothing is raised: those over a wrong guess are not the user's."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")  # the filters are asked when they are passed on
        yield
    for one in heard:
        warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)


def _of_the_layer_that_failed(
    model: nn.Module, failures: list[ObserveError], small: bool
) -> Iterator[Inputs]:
    """The first layer in a model's `__init__` need not be the first in its forward, which may be the one that
    did not take the guess.
    """
    modules, first = dict(model.named_modules()), first_layer(model)
    for name in dict.fromkeys(failure.where for failure in failures):
        layer = modules.get(name)
        if isinstance(layer, TELLING) and first is not None and layer is not first[1]:
            yield from _for_layer(name, layer, small)


def guesses(model: nn.Module, *, small: bool = False) -> Iterator[Inputs]:
    """Inputs worth trying, the likeliest first. All are seeded."""
    package = type(model).__module__
    if package.startswith("torchvision.models.detection"):
        yield Inputs(
            ([_random(3, 320, 320)],), origin="inferred: one 3x320x320 image (torchvision detection)"
        )
        return
    if package.startswith("torchvision.models.optical_flow"):
        pair = (_random(1, 3, 128, 128), _random(1, 3, 128, 128))
        yield Inputs(pair, origin="inferred: two 1x3x128x128 images (torchvision optical flow)")
        return
    recorded = _recorded_size(model)
    if recorded is not None:
        sides = recorded[1:]
        if small and len(sides) == 2 and min(sides) > SMALL_SIDE and not has_fixed_size(model):
            image = _random(1, recorded[0], SMALL_SIDE, SMALL_SIDE)
            yield Inputs((image,), origin="smaller than in the model's own configuration")
        yield Inputs((_random(1, *recorded),), origin="from the model's own configuration")
    first = first_layer(model)
    if first is None:
        return
    yield from _for_layer(*first, small)


def _for_layer(name: str, layer: nn.Module, small: bool) -> Iterator[Inputs]:
    """Inputs that this layer takes; those of a model that begins with it."""
    for shape in shapes_for(layer, small):
        text = "x".join(map(str, shape))
        origin = f"inferred {text} from the first layer, {name or type(layer).__name__}"
        if isinstance(layer, nn.Embedding):
            tokens = Draw().numbers(shape, torch.int64, below=layer.num_embeddings)
            yield Inputs((tokens,), origin=origin)
        else:
            yield Inputs((_random(*shape, like=layer),), origin=origin)


def has_fixed_size(model: nn.Module) -> bool:
    """Whether the model's own configuration says that it takes images of one size only."""
    config: Any = getattr(model, "pretrained_cfg", None)
    return isinstance(config, dict) and bool(config.get("fixed_input_size"))


def _random(*shape: int, like: nn.Module | None = None) -> Tensor:
    drawn = Draw().numbers(shape, torch.float32)
    weight = getattr(like, "weight", None)
    return drawn.to(weight) if isinstance(weight, Tensor) and weight.is_floating_point() else drawn


def _recorded_size(model: nn.Module) -> tuple[int, ...] | None:
    for name in ("pretrained_cfg", "default_cfg"):
        config: Any = getattr(model, name, None)
        size = config.get("input_size") if isinstance(config, dict) else None
        if isinstance(size, tuple | list) and all(isinstance(n, int) for n in size):
            return tuple(size)
    side = getattr(model, "image_size", None)
    return (3, side, side) if isinstance(side, int) else None
