"""What goes wrong in a training, in words: a batch that a model does not take, and where NaN began."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bntool.core.errors import BntoolError, UsageError
from bntool.experiment.randomness import random_state_kept
from bntool.graph.inputs import named_tensors
from bntool.runtime.process_group import lost_process


def where_it_began(model: nn.Module, inputs: Tensor) -> tuple[str, str]:
    """The first layer to run that puts out NaN or infinity, and whether its own weights are at fault.

    Runs the model once more, as it is.
    """
    found: list[tuple[str, str]] = []

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, _args: Any, output: Any) -> None:
            tensors = [tensor for _, tensor in named_tensors(output)]
            if found or all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
                return
            bad = [n for n, p in module.named_parameters() if not bool(torch.isfinite(p).all())]
            found.append((name, f"its {bad[0]} is not finite" if bad else "its output is not finite"))

        return hook

    layers = [(n, m) for n, m in model.named_modules() if not any(m.children()) or m._parameters]
    handles = [module.register_forward_hook(look(name)) for name, module in layers]
    try:
        with torch.no_grad(), random_state_kept():
            model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else ("", "the loss itself: every layer's output is finite")


_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


@contextlib.contextmanager
def explained(inputs: Tensor) -> Iterator[None]:
    """What a model raises on a batch, in words: too little memory, or a batch that it does not take."""
    try:
        yield
    except BntoolError:
        raise
    except Exception as error:
        lost = lost_process(error)
        if lost is not None:
            raise lost from error
        lines = str(error).strip().splitlines() or [type(error).__name__]
        shape = "x".join(map(str, inputs.shape))
        if isinstance(error, MemoryError) or any(words in str(error) for words in _NO_MEMORY):
            raise UsageError(
                f"there is too little memory to train on a batch of {shape}",
                where=lines[0],
                next_step="give a smaller --batch-size; what was trained before is kept",
            ) from error
        raise UsageError(
            f"the model fails on a batch of {shape}: {lines[0]}",
            next_step="give data of the shape and type that the model takes in training",
        ) from error
