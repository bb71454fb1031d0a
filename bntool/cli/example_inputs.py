"""Example inputs from `--input` shapes."""

from __future__ import annotations

import inspect
import math
import re
from typing import TYPE_CHECKING, Any

from bntool.core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import nn

    from bntool.graph.inputs import Inputs

_SHAPE = re.compile(r"(?:(?P<name>.+):)?(?P<dims>\d+(?:[x,]\d+)*)")
# The names under which positional inputs are reported.
_POSITIONAL = re.compile(r"input(_\d+)?")
_MOST_VALUES = 1 << 31


def parse_inputs(texts: tuple[str, ...], model: nn.Module, seed: int) -> Inputs:
    """`[NAME:]1x3x224x224` for each input: seeded values of the model's type, N(0, 1).

    Raises `UsageError` for a text that is no shape, a name the model does not take, or a size that
    cannot be held.
    """
    import torch

    from bntool.graph.inputs import Inputs

    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    embeds = _first_reads_tokens(model)
    generator = torch.Generator().manual_seed(seed)
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for text in texts:
        name, shape = read_shape(text)
        try:
            if embeds:
                value = torch.randint(embeds, shape, generator=generator)
            else:
                value = torch.randn(shape, generator=generator).to(weight)
        except (RuntimeError, MemoryError) as error:
            raise _too_large(text) from error
        if name in kwargs:
            raise UsageError(f"--input {text}: {name} is given twice", next_step="give each input once")
        if name and _takes(model, name):
            kwargs[name] = value
        elif not name or _POSITIONAL.fullmatch(name):
            args.append(value)
        else:
            raise _unknown(text, name, model)
    return Inputs(tuple(args), kwargs, origin="--input " + " --input ".join(texts))


def read_shape(text: str) -> tuple[str, list[int]]:
    match = _SHAPE.fullmatch(text.strip())
    if match is None:
        raise UsageError(
            f"--input {text} is not a shape", next_step="write it as 1x3x224x224 or NAME:1x3x224x224"
        )
    shape = [int(n) for n in re.split("[x,]", match["dims"])]
    if 0 in shape:
        raise UsageError(f"--input {text} has an axis of size 0", next_step="every axis needs at least one")
    if math.prod(shape) > _MOST_VALUES:
        raise _too_large(text)
    return match["name"] or "", shape


def shapes_by_name(path: Path, texts: Sequence[str], names: Sequence[str]) -> dict[str, list[int]]:
    """`--input` by the names of a file's inputs, those without a name in order. Raises `UsageError`."""
    found: dict[str, list[int]] = {}
    for text in texts:
        given, shape = read_shape(text)
        name = given or next((n for n in names if n not in found), "")
        if name not in names:
            raise UsageError(
                f"--input {text}: the file takes no such input",
                where=str(path),
                next_step=f"its inputs are {', '.join(names)}",
            )
        found[name] = shape
    return found


def _takes(model: nn.Module, name: str) -> bool:
    parameters = inspect.signature(model.forward).parameters
    if name in parameters:
        return parameters[name].kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    any_keyword = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return any_keyword and not _POSITIONAL.fullmatch(name)


def _unknown(text: str, name: str, model: nn.Module) -> UsageError:
    return UsageError(
        f"--input {text}: the model takes no input named {name}",
        where=f"{type(model).__name__}.forward",
        next_step=f"its inputs are {', '.join(inspect.signature(model.forward).parameters)}",
    )


def _too_large(text: str) -> UsageError:
    return UsageError(f"--input {text} is too large for this machine", next_step="give a smaller shape")


def _first_reads_tokens(model: nn.Module) -> int:
    """The vocabulary of an embedding that comes first; 0 where the model reads numbers."""
    from torch import nn

    for module in model.modules():
        if isinstance(module, nn.Embedding):
            return module.num_embeddings
        if isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
            return 0
    return 0
