"""Code as a user may have it and may want to allow: most of it would do what a file tells it to."""

from __future__ import annotations

import enum
from builtins import exec as compute
from os import system as shell
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["F", "compute", "shell"]


class Plain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


class Calls(nn.Module):
    """An honest layer: what it calls, and with what, are attributes, and so are the file's choice."""

    def __init__(self, make: Any = F.relu, value: Any = None) -> None:
        super().__init__()
        self.make, self.value = make, value

    def forward(self, x: Tensor) -> Any:
        return self.make(x if self.value is None else self.value)


class CallsWithout(Calls):
    def forward(self, _: Tensor) -> Any:
        return self.make()


class Mode(enum.Enum):
    SUM = "sum"
    MEAN = "mean"


class UsesMode(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        exec(getattr(self.mode, "prepare", ""))
        return x


class Opens(nn.Module):
    """As layers that load an engine do: its constructor takes what the engine is."""

    def __init__(self, engine: str, *_: Any, **__: Any) -> None:
        super().__init__()
        exec(engine)


class Restores(nn.Module):
    def __setstate__(self, state: dict[str, Any]) -> None:
        exec(state["engine"])


class RestoresByItsBase(Restores):
    pass


class Mixin:
    def __setstate__(self, state: dict[str, Any]) -> None:
        exec(state["engine"])


class RestoresByAMixin(Mixin, nn.Module):
    pass


class Made(nn.Module):
    def __new__(cls, engine: str = "") -> Made:
        exec(engine)
        return super().__new__(cls)


class Dropped(nn.Module):
    def __del__(self) -> None:
        exec(self.__dict__.get("engine", ""))


class Watched(nn.Module):
    def __getattribute__(self, name: str) -> Any:
        exec(object.__getattribute__(self, "__dict__").pop("engine", ""))
        return super().__getattribute__(name)


class Traced(torch.fx.GraphModule):
    pass


class Guesses(enum.Enum):
    ONE = 1

    @classmethod
    def _missing_(cls, value: object) -> Any:
        exec(str(value))
        return cls.ONE


class Grows(enum.Enum):
    """Without members, it makes them of what it is called with."""

    def __init__(self, engine: str) -> None:
        exec(engine)


class _Eager(enum.EnumMeta):
    def __call__(cls, value: Any, *_: Any, **__: Any) -> Any:
        exec(value)
        return next(iter(cls))


class Prompt(enum.Enum, metaclass=_Eager):
    ONE = 1


class Config:
    """Plain data, as training scripts keep it beside a model."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        exec(state.get("engine", ""))


class Outer:
    class Inner(nn.Module):
        pass

    @staticmethod
    def start(engine: str) -> None:
        exec(engine)


def load_engine(engine: str, *_: Any, **__: Any) -> str:
    exec(engine)
    return engine
