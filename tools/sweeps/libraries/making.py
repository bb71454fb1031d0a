"""How a model of the tables is made, and inputs that fit it.

Shapes are those of images or signals, `("n<1000", …)` for whole numbers below 1000, or a dict by name.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

Make = Callable[[], Any]
Shapes = Any
Entry = tuple[str, Make, Shapes]
"""The name, what makes the model, and what its inputs look like; None where they are inferred."""

IMAGE = ((1, 3, 64, 64),)


def made(module: str, name: str, *words: Any, **options: Any) -> Make:
    """What calls `name` of a module, found when it is called."""

    def make() -> Any:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
        return found(*words, **options)

    return make


def inputs_like(shapes: Shapes) -> Any:
    """Inputs of these shapes, drawn from a seed."""
    import torch

    from bntool.graph.inputs import Inputs

    generator = torch.Generator().manual_seed(0)

    def drawn(shape: Any) -> Any:
        if callable(shape):
            return shape()
        if isinstance(shape, dict):
            return {name: drawn(part) for name, part in shape.items()}
        if isinstance(shape, list):
            return [drawn(part) for part in shape]
        if shape and isinstance(shape[0], str):
            return torch.randint(int(shape[0].removeprefix("n<")), shape[1:], generator=generator)
        return torch.randn(shape, generator=generator)

    if isinstance(shapes, dict):
        return Inputs((), drawn(shapes))
    return Inputs(tuple(map(drawn, shapes)))
