"""Settings of the whole process that a forward may change, put back afterwards."""

from __future__ import annotations

import contextlib
import contextvars
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.nn.modules import module as modules
from torch.utils import _device as default_device

_CUDNN = ("benchmark", "deterministic", "allow_tf32")
_HOOKS = [name for name in vars(modules) if name.startswith("_global_") and "hooks" in name]


def _set_cudnn(flags: dict[str, bool]) -> None:
    for name, flag in flags.items():
        setattr(torch.backends.cudnn, name, flag)


def _set_deterministic(modes: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(modes[0], warn_only=modes[1])


def _set_anomaly(modes: tuple[bool, bool]) -> None:
    torch.autograd.set_detect_anomaly(*modes)


def _set_autocast(modes: dict[str, bool]) -> None:
    for device, enabled in modes.items():
        torch.set_autocast_enabled(device, enabled)


def _set_warnings(filters: list[Any]) -> None:
    warnings.filters[:] = filters  # type: ignore[index]
    warnings._filters_mutated()  # type: ignore[attr-defined]


def _set_hooks(hooks: list[dict[Any, Any]]) -> None:
    for name, held in zip(_HOOKS, hooks, strict=True):
        there = getattr(modules, name)
        there.clear()
        there.update(held)


def _set_environment(variables: dict[str, str]) -> None:
    for name in os.environ.keys() - variables.keys():
        del os.environ[name]
    os.environ.update(variables)


_SETTINGS: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.get_default_dtype, torch.set_default_dtype),
    (lambda: default_device.CURRENT_DEVICE, torch.set_default_device),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (lambda: {name: getattr(torch.backends.cudnn, name) for name in _CUDNN}, _set_cudnn),
    (
        lambda: (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        _set_deterministic,
    ),
    (lambda: (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()), _set_anomaly),
    (lambda: {name: torch.is_autocast_enabled(name) for name in ("cpu", "cuda")}, _set_autocast),
    (lambda: dict(vars(torch._tensor_str.PRINT_OPTS)), vars(torch._tensor_str.PRINT_OPTS).update),
    (lambda: [getattr(modules, name).copy() for name in _HOOKS], _set_hooks),
    (np.geterr, lambda kinds: np.seterr(**kinds)),
    (lambda: list(warnings.filters), _set_warnings),
    (sys.getrecursionlimit, sys.setrecursionlimit),
    (lambda: dict(os.environ), _set_environment),
)
"""How each is read, and how it is put back."""


@contextlib.contextmanager
def settings_kept() -> Iterator[None]:
    """Put back what is set for the whole process: of torch, NumPy, Python and the environment.

    A context variable that has no value before keeps the one that it is given.
    """
    context = contextvars.copy_context()
    before = [read() for read, _ in _SETTINGS]
    try:
        yield
    finally:
        for (read, put_back), value in zip(_SETTINGS, before, strict=True):
            if read() != value:
                put_back(value)
        for variable, held in context.items():
            if variable.get() is not held:
                variable.set(held)
