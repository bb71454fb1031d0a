"""Which architecture of torchvision or timm a file of weights belongs to, by keys and shapes.

The index holds, for every model of the registries, a number for each tensor's name and shape. It is built on
the meta device, where no weight takes memory, and kept for the versions that it was built from.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import inspect
import os
import time
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bntool.core.errors import BntoolError, LoadError
from bntool.files.atomic import write_atomically
from bntool.files.filling import fill
from bntool.files.references import build as build_model
from bntool.files.references import recorded_inputs
from bntool.files.weights import StateDict
from bntool.graph.drawing import Draw

Marks = npt.NDArray[np.uint64]
Tell = Callable[[str], object]

_REGISTRIES = ("torchvision", "timm")
BUILD_SECONDS = 600.0
_FORMAT = 1
_ENOUGH = 0.25
_COUNTERS = "num_batches_tracked"


@dataclasses.dataclass(frozen=True)
class Match:
    """An architecture and how much of it fits: the share of tensors with the same name and shape."""

    reference: str
    score: float

    @property
    def exact(self) -> bool:
        return self.score == 1.0

    def __str__(self) -> str:
        # Never 100 % for what is not all of it.
        return f"{self.reference} ({'100' if self.exact else f'{min(self.score * 100, 99.9):.1f}'} %)"


@dataclasses.dataclass(frozen=True)
class Index:
    """Reference -> the marks of its tensors; `missing` are references that are not in it yet."""

    marks: Mapping[str, Marks]
    missing: tuple[str, ...] = ()

    def matches(self, state: Mapping[str, Any]) -> list[Match]:
        """Every architecture that shares at least a quarter of its tensors with `state`, the best first."""
        wanted = marks_of(state)
        found = []
        for reference, marks in self.marks.items():
            union = len(np.union1d(wanted, marks))
            score = (len(wanted) + len(marks) - union) / union if union else 0.0
            if score >= _ENOUGH:
                found.append(Match(reference, score))
        return sorted(found, key=lambda m: (-m.score, not m.reference.startswith("torchvision"), m.reference))


def marks_of(state: Mapping[str, Any]) -> Marks:
    """A number for the name and shape of each tensor, sorted, each once.

    The counters of BatchNorm are left out: files of PyTorch before 0.4.1 have none.
    """
    names = (
        f"{name}:{tuple(tensor.shape)}"
        for name, tensor in state.items()
        if isinstance(tensor, Tensor) and not name.endswith(_COUNTERS)
    )
    numbers = [int.from_bytes(hashlib.blake2b(n.encode(), digest_size=8).digest(), "little") for n in names]
    return np.unique(np.array(numbers, dtype=np.uint64))


def load_index(
    tell: Tell | None = None, seconds: float = BUILD_SECONDS, build: Sequence[str] = _REGISTRIES
) -> Index:
    """The index for the torchvision and timm that are installed, built as far as it is not there yet.

    Models of the registries in `build` are looked at, others only where that was done before. `tell` takes a
    line on how far that is. Building stops after `seconds`, keeps what it has, and goes on the next time.
    Raises `LoadError` where neither registry is installed.
    """
    references = _references()
    if not references:
        raise LoadError("neither torchvision nor timm is installed", next_step="pip install 'bntool[zoo]'")
    path = _cache_path()
    marks = _read(path)
    absent = [reference for reference in references if reference not in marks]
    waiting = [reference for reference in absent if reference.partition(":")[0] in build]
    if not waiting:
        return Index(marks, tuple(absent))
    ends = time.monotonic() + seconds
    for number, reference in enumerate(waiting, start=1):
        if time.monotonic() > ends:
            break
        marks[reference] = _marks_of_model(reference)
        if tell is not None:
            tell(f"looking at architectures, once: {number} of {len(waiting)}")
    with contextlib.suppress(OSError, BntoolError):
        # Without a place to keep it, it is built again.
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda temporary: _write(temporary, marks), force=True)
    return Index(marks, tuple(reference for reference in references if reference not in marks))


def take_exact(state: StateDict, index: Index) -> str:
    """The architecture that all of `state` fits and that fits all of it, for `--arch auto`.

    Several architectures can have the same tensors and compute different things; then none is taken.
    Raises `LoadError` with the best matches where there is no single one.
    """
    matches = index.matches(state)
    exact = [match.reference for match in matches if match.exact]
    if not exact:
        raise LoadError(
            f"no architecture of torchvision or timm fits these weights exactly; {closest(matches, index)}",
            next_step="name it yourself: --arch torchvision:NAME, timm:NAME or path/file.py:make_model",
        )
    outputs = [_output(reference, state) for reference in exact[:_COMPARED]]
    same = len(exact) <= _COMPARED and all(
        o is not None and outputs[0] is not None and _agree(o, outputs[0]) for o in outputs[1:]
    )
    if not same:
        raise LoadError(
            f"these weights fit {len(exact)} architectures, which do not compute the same: "
            f"{', '.join(exact[:6])}{' ...' if len(exact) > 6 else ''}",
            next_step=f"name the one that they were trained as, such as --arch {exact[0]}",
        )
    return exact[0]


def closest(matches: Sequence[Match], index: Index) -> str:
    """The best matches in words."""
    rest = f"; {len(index.missing)} architectures were not looked at yet" if index.missing else ""
    if not matches:
        return f"none is near{rest}"
    return f"the nearest: {', '.join(map(str, matches[:3]))}{rest}"


_COMPARED = 6
"""Architectures with the same tensors that are run beside each other."""


def _output(reference: str, state: StateDict) -> Any:
    """What an architecture computes with these weights, on the one input; None where it cannot be run."""
    try:
        model = build_model(reference).model
        fill(model, state, reference, "")
        inputs = recorded_inputs(model)
        size = inputs.args[0].shape if inputs is not None else (1, 3, 224, 224)
        with torch.no_grad():
            for module in model.modules():  # not eval(), which may be the model's own
                module.training = False
            return model.float()(Draw().numbers(size, torch.float32))
    except Exception:  # noqa: BLE001  another library's code, run to compare
        return None


def _agree(a: Any, b: Any) -> bool:
    """Equal but for rounding: the same operations in another order are within 1e-4 of the peak in float32."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.shape != b.shape:
        return False
    return bool((a - b).abs().max() <= 1e-4 * b.abs().max())


def _references() -> list[str]:
    names: list[str] = []
    with contextlib.suppress(ImportError):
        from torchvision import models

        names += [f"torchvision:{name}" for name in models.list_models() if not name.startswith("quantized")]
    with contextlib.suppress(ImportError):
        import timm

        names += [f"timm:{name}" for name in timm.list_models()]
    return names


def _marks_of_model(reference: str) -> Marks:
    """The marks of a registry's model; none where it cannot be made without memory."""
    for mode in (torch.device("meta"), _WeightsOnMeta()):
        try:
            with mode, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return marks_of(_made(reference).state_dict())
        except Exception:  # noqa: BLE001, S112  another library's code; the next mode, or none
            continue
    return marks_of({})


def _made(reference: str) -> nn.Module:
    registry, _, name = reference.partition(":")
    model: nn.Module
    if registry == "timm":
        import timm

        model = timm.create_model(name)
        return model
    from torchvision import models

    builder = models.get_model_builder(name)
    known = inspect.signature(builder).parameters
    options: dict[str, Any] = {"weights": None}
    options |= {"weights_backbone": None} if "weights_backbone" in known else {}
    # GoogLeNet and Inception draw their weights by scipy's slow method.
    options |= {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = builder(**options)
    return model


class _WeightsOnMeta(TorchFunctionMode):
    """Tensors that are made to be filled go to the meta device; those that are counted with stay real."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.empty, torch.ones, torch.zeros, torch.rand, torch.randn) and not kwargs.get(
            "device"
        ):
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _cache_path() -> Path:
    chosen = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification has a relative one ignored.
    folder = chosen if chosen.is_absolute() else Path("~").expanduser() / ".cache"
    versions = "-".join(f"{package}-{_version(package)}" for package in ("torchvision", "timm"))
    return folder / "bntool" / f"architectures-{_FORMAT}-{versions}.npz"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _read(path: Path) -> dict[str, Marks]:
    """What is kept; nothing where it is damaged, so that it is built again."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as kept:
            names, ends, marks = kept["names"], kept["ends"], kept["marks"]
        starts = [0, *ends[:-1]]
        if marks.dtype != np.uint64 or len(names) != len(ends) or [*starts, *ends][-1] != len(marks):
            return {}
        return {str(n): marks[a:b] for n, a, b in zip(names, starts, ends, strict=True)}
    except (OSError, ValueError, KeyError, IndexError, EOFError, TypeError, zipfile.BadZipFile):
        return {}


def _write(path: Path, marks: Mapping[str, Marks]) -> None:
    ends = np.cumsum([len(m) for m in marks.values()])
    joined = np.concatenate([marks_of({}), *marks.values()])
    with path.open("wb") as file:
        np.savez(file, names=np.array(list(marks)), ends=ends, marks=joined)
