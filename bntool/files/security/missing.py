"""Stand-ins for classes that are not here: they take the place of a class, hold its state and run nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

from torch import nn

from bntool.core.errors import LoadError
from bntool.files.security.rules import why_never

_DATA = frozenset(
    {
        "argparse.Namespace", "datetime.date", "datetime.datetime", "datetime.time", "datetime.timedelta",
        "datetime.timezone", "decimal.Decimal", "fractions.Fraction", "pathlib.Path", "pathlib.PosixPath",
        "pathlib.PurePosixPath", "pathlib.PureWindowsPath", "pathlib.WindowsPath", "types.SimpleNamespace",
        "uuid.UUID",
    }
)  # fmt: skip
"""Plain data of the standard library that checkpoints carry beside their weights."""
_NAME = "_bntool_stands_for"


class Opaque:
    """Something that is not read: it can be made, given state and items, and nothing else."""

    def __new__(cls, *args: Any, **keywords: Any) -> Any:  # noqa: ARG004  what it is made of is let go
        return object.__new__(cls)

    def __init__(self, *args: Any, **keywords: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        attributes = state[0] if isinstance(state, tuple) and state else state
        if not isinstance(attributes, dict):
            return
        if {"_parameters", "_buffers", "_modules"} <= attributes.keys():
            namespace = {_NAME: getattr(type(self), _NAME)}
            self.__class__ = type(type(self).__name__, (MissingModule,), namespace)
            nn.Module.__init__(self)  # type: ignore[arg-type]
            nn.Module.__setstate__(self, attributes)  # type: ignore[arg-type]
            return
        vars(self).update({k: v for k, v in attributes.items() if isinstance(k, str)})


class MissingModule(nn.Module):
    """An `nn.Module` whose class is not here: its layers and tensors are, its forward is not."""

    def forward(self, *_: Any, **__: Any) -> NoReturn:
        raise LoadError(
            f"the class {getattr(type(self), _NAME)} is not here, so its forward cannot run",
            next_step="make it importable and allow it: --allow pkg.mod.Class",
        )


def may_be_missing(name: str) -> bool:
    """Whether a stand-in may take the place of this name: a class of a library, or plain data.

    Names through which a file can run code are refused, with or without a stand-in.
    """
    return name in _DATA or why_never(name) is None


def inert_classes(names: Iterable[str]) -> dict[str, type]:
    """Name -> a class of that name which holds state and runs nothing."""
    return {name: type(name.rpartition(".")[2], (Opaque,), {_NAME: name}) for name in names}


def missing_names(value: Any) -> tuple[str, ...]:
    """The classes that stand-ins took the place of in a model, sorted."""
    modules = value.modules() if isinstance(value, nn.Module) else ()
    return tuple(sorted({getattr(type(m), _NAME) for m in modules if isinstance(m, MissingModule)}))
