"""What a forward may leave behind, put back afterwards: written buffers and consumed random numbers."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bntool.core.errors import ObserveError
from bntool.observe.copying import tensors_of

_UNDECLARED = frozenset({"batch_norm", "native_batch_norm", "cudnn_batch_norm", "instance_norm"})
"""Operators that update running statistics although their schema says they write nothing."""


class Kept:
    """The model's own tensors, and copies of those that the forward wrote to."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.by_storage: dict[int, list[Tensor]] = {}
        self.copies: dict[int, tuple[Tensor, Tensor]] = {}
        self._seen: set[int] = set()
        for module in modules:
            self.add(tensors_of(module))

    def add(self, tensors: Iterable[Tensor]) -> None:
        """More tensors to keep, and the gradients that they carry."""
        for tensor in tensors:
            if id(tensor) in self._seen or (storage := storage_of(tensor)) is None:
                continue
            self._seen.add(id(tensor))
            self.by_storage.setdefault(storage, []).append(tensor)
            if tensor.is_leaf and tensor.grad is not None:
                self.add((tensor.grad,))

    def sharing(self, tensor: Tensor) -> list[Tensor]:
        """The model's own tensors in the same memory, the tensor itself included."""
        storage = storage_of(tensor)
        return self.by_storage.get(storage, []) if storage is not None else []

    def before_write(self, target: Tensor) -> None:
        for tensor in self.sharing(target):
            if id(tensor) not in self.copies:
                self.copies[id(tensor)] = (tensor, tensor.clone())

    def restore(self) -> None:
        with torch.inference_mode():
            for tensor, copy in self.copies.values():
                tensor.resize_(copy.shape).copy_(copy)  # what `out=` is given is made to fit


def storage_of(tensor: Tensor) -> int | None:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError, ValueError):  # the last of a lazy parameter
        return None


def undeclared_writes(name: str, bound: dict[str, Any]) -> tuple[str, ...]:
    """The arguments that this call writes to although the operator's schema does not say so."""
    updates = bound.get("training", bound.get("train", bound.get("use_input_stats")))
    return ("running_mean", "running_var") if name in _UNDECLARED and updates else ()


def require_materialised(model: nn.Module) -> None:
    """Refuse a model with a lazy layer: a forward would give it its shape, in the user's own tensors."""
    for module_name, module in model.named_modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and is_lazy(tensor):
                raise ObserveError(
                    "the model has a lazy layer that has not seen an input yet",
                    where=module_name or type(module).__name__,
                    next_step="run the model once on a real input, so that its layers take their shape",
                )


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Put back the random state of PyTorch (CPU, and CUDA where it is in use), Python and NumPy."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  what models use
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
