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

    from bntool.graph.drawing import Draw
    from bntool.graph.inputs import Inputs

_SHAPE = re.compile(r"(?:(?P<name>.+?):)?(?P<dims>\d+(?:[x,]\d+)*)(?::(?P<type>[A-Za-z]\w*))?")
# The names under which positional inputs are reported.
_POSITIONAL = re.compile(r"input(_\d+)?")
_MOST_VALUES = 1 << 31


def parse_inputs(texts: tuple[str, ...], model: nn.Module, seed: int) -> Inputs:
    """`[NAME:]1x3x224x224[:TYPE]` for each input: seeded values of the model's type, N(0, 1).

    Of an integer type they are drawn below the size of the smallest embedding. What is neither a name of
    forward's own nor positional is an entry of the dict that forward takes, where its code reads such a one.

    Raises `UsageError` for a text that is no shape, a name the model does not take, or a size that
    cannot be held.
    """
    from bntool.graph.drawing import Draw
    from bntool.graph.inputs import Inputs

    drawn = _Drawn(model, Draw(seed))
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    entries: dict[str, Any] = {}
    for text in texts:
        name, shape, dtype = _read(text)
        try:
            value = drawn.numbers(shape, dtype)
        except (RuntimeError, MemoryError) as error:
            raise _too_large(text) from error
        if name in kwargs or name in entries:
            raise UsageError(f"--input {text}: {name} is given twice", next_step="give each input once")
        if name and _takes(model, name):
            kwargs[name] = value
        elif not name or _POSITIONAL.fullmatch(name):
            args.append(value)
        elif _reads_entry(model, name.removeprefix("input.")):
            entries[name.removeprefix("input.")] = value
        else:
            raise _unknown(text, name, model)
    positional = [entries, *args] if entries else args
    origin = "--input " + " --input ".join(texts)
    return Inputs(tuple(positional), kwargs, origin).named_for(model.forward)


def texts_of(inputs: Inputs) -> tuple[str, ...]:
    """The inputs as `--input` takes them; none where it cannot."""
    import torch

    texts: list[str] = []
    for name, value in (*(("", arg) for arg in inputs.args), *inputs.kwargs.items()):
        entries = value.items() if isinstance(value, dict) and not texts else [(name, value)]
        for key, tensor in entries:
            if not isinstance(tensor, torch.Tensor) or not tensor.dim():
                return ()
            of_type = "" if tensor.is_floating_point() else f":{str(tensor.dtype).removeprefix('torch.')}"
            texts.append(f"{key}:" * bool(key) + "x".join(map(str, tensor.shape)) + of_type)
    return tuple(texts)


class _Drawn:
    """Seeded numbers for inputs of one model."""

    def __init__(self, model: nn.Module, draw: Draw) -> None:
        self.model, self.draw = model, draw
        self.embeds = first_reads_tokens(model)

    def numbers(self, shape: list[int], dtype: Any) -> Any:
        import torch

        if dtype is None and self.embeds:
            return self.draw.numbers(shape, torch.int64, below=self.embeds)
        if dtype is None:
            weight = next((p for p in self.model.parameters() if p.is_floating_point()), torch.zeros(()))
            return self.draw.numbers(shape, torch.float32).to(weight)
        rows = (m.num_embeddings for m in self.model.modules() if isinstance(m, torch.nn.Embedding))
        return self.draw.numbers(shape, dtype, below=2 if dtype is torch.bool else min(rows, default=2))


def read_shape(text: str) -> tuple[str, list[int]]:
    """The name and the shape in `[NAME:]1x3x224x224[:TYPE]`."""
    return _read(text)[:2]


def _read(text: str) -> tuple[str, list[int], Any]:
    import torch

    match = _SHAPE.fullmatch(text.strip())
    if match is None:
        raise UsageError(
            f"--input {text} is not a shape",
            next_step="write it as 1x3x224x224, NAME:1x3x224x224 or NAME:1x16:int64",
        )
    dtype = getattr(torch, match["type"], None) if match["type"] else None
    if match["type"] and not isinstance(dtype, torch.dtype):
        raise UsageError(
            f"--input {text}: {match['type']} is no type of tensor",
            next_step="int64, int32, bool, float32, …",
        )
    shape = [int(n) for n in re.split("[x,]", match["dims"])]
    if 0 in shape:
        raise UsageError(f"--input {text} has an axis of size 0", next_step="every axis needs at least one")
    if math.prod(shape) > _MOST_VALUES:
        raise _too_large(text)
    return match["name"] or "", shape, dtype


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


def _reads_entry(model: nn.Module, name: str) -> bool:
    """Whether forward takes one thing, and code of the model's classes names such an entry."""
    parameters = inspect.signature(model.forward).parameters.values()
    needed = [p for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    if len(needed) != 1 or needed[0].kind is needed[0].KEYWORD_ONLY:
        return False
    classes = {cls for module in model.modules() for cls in type(module).__mro__}
    own = (vars(cls).values() for cls in classes if not cls.__module__.startswith("torch."))
    codes = [code for members in own for m in members if (code := getattr(m, "__code__", None)) is not None]
    while codes:
        code = codes.pop()
        if name in code.co_consts:
            return True
        codes += [inner for inner in code.co_consts if inspect.iscode(inner)]
    return False


def _unknown(text: str, name: str, model: nn.Module) -> UsageError:
    return UsageError(
        f"--input {text}: the model takes no input named {name}",
        where=f"{type(model).__name__}.forward",
        next_step=f"its inputs are {', '.join(inspect.signature(model.forward).parameters)}",
    )


def _too_large(text: str) -> UsageError:
    return UsageError(f"--input {text} is too large for this machine", next_step="give a smaller shape")


def first_reads_tokens(model: nn.Module) -> int:
    """The vocabulary of an embedding that comes first; 0 where the model reads numbers."""
    from torch import nn

    for module in model.modules():
        if isinstance(module, nn.Embedding):
            return module.num_embeddings
        if isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
            return 0
    return 0
