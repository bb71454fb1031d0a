"""Which names a model file may refer to: PyTorch's own layers and models, and what the user allows.

A name is looked up only when it passes these rules, so a file cannot make an arbitrary module be imported.
"""

from __future__ import annotations

import contextlib
import enum
import importlib
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bntool.errors import LoadError, UsageError
from bntool.files.scripts import import_path, import_script, script_of
from bntool.files.security.pickled_calls import PARTIAL, shown

_LAYER_PACKAGES = ("torch.nn.modules", "torchvision.models", "torchvision.ops", "timm.models", "timm.layers")
_OWN_LAYERS = ("bntool.layers", "bntool.frozen")
# Reviewed one by one: plain holders of data and pure functions that honest model files refer to.
_HELPERS = frozenset(
    {
        "torchvision.models.detection._utils.BoxCoder",
        "torchvision.models.detection._utils.BoxLinearCoder",
        "torchvision.models.detection._utils.Matcher",
        "torchvision.models.detection._utils.SSDMatcher",
        "torchvision.models.detection._utils.BalancedPositiveNegativeSampler",
        "torchvision.ops.boxes.box_iou",
        "torchvision.models.optical_flow.raft._pass_through_h",
        "timm.layers.format.Format",
        "timm.models._features.FeatureInfo",
        "torch.nn.functional.relu",
        "torch.nn.functional.gelu",
        "torch._C._nn.gelu",
        "bntool.layers.StartOfForward",
        # What torchvision's quantizable models hold before anything is quantized.
        "torch.ao.nn.quantized.modules.functional_modules.FloatFunctional",
        "torch.ao.quantization.stubs.DeQuantStub",
        "torch.ao.quantization.stubs.QuantStub",
    }
)
_STANDARD_DATA = frozenset({"argparse.Namespace"})
# Its classes make Python source of the names of layers when they are called.
_TRACING = ("timm.models._features_fx",)
# Names that no flag but --trust-pickle lets through although their package is not the standard library's.
_NEVER = (
    "torch.fx", "torch.jit", "torch.hub", "torch._dynamo", "torch.package", "numpy.f2py", "numpy.testing",
    "dill", "cloudpickle", "joblib", "jsonpickle", "yaml", "pip",
)  # fmt: skip


def builtin_allowance(name: str) -> Any | None:
    """The class or function behind `name` if bntool's own rules allow it, else None."""
    if name == PARTIAL:
        import functools

        return functools.partial
    module, _, attribute = name.rpartition(".")
    if name in _HELPERS:
        return _find(module, attribute)
    own = module in _OWN_LAYERS
    if not own and not any(module == p or module.startswith(p + ".") for p in _LAYER_PACKAGES):
        return None
    found = _find(module, attribute)
    if not isinstance(found, type) or not issubclass(found, nn.Module):
        return None
    # A lazy layer rewrites its own class, and a re-export could name what lives elsewhere.
    if issubclass(found, nn.modules.lazy.LazyModuleMixin | torch.fx.GraphModule) or module in _TRACING:
        return None
    return found if f"{found.__module__}.{found.__qualname__}" == name else None


def user_allowance(entries: Iterable[str]) -> dict[str, Any]:
    """Name in a file -> class, for entries `pkg.mod.Class`, `script:Class` and `path/script.py:Class`.

    The last two also stand for `__main__.Class`. Raises `UsageError` for an entry that may never be
    allowed, `LoadError` for one that cannot be imported.
    """
    allowed: dict[str, Any] = {}
    for entry in entries:
        allowed.update(_entry(entry))
    return allowed


def can_be_allowed(name: str) -> bool:
    """Whether `--allow` may ever name it: not the standard library's functions, nor code loaders."""
    top = name.partition(".")[0]
    if name in _STANDARD_DATA or top == "__main__":
        return True
    if top in sys.stdlib_module_names or any(name == n or name.startswith(n + ".") for n in _NEVER):
        return False
    # Of torch, its classes and pure functions: what it loads, compiles or downloads with are functions too.
    function = top == "torch" and name.rpartition(".")[2][:1].islower()
    return not name.startswith("torch._") and (not function or name.startswith("torch.nn.functional."))


def allow_entries_for(names: Iterable[str]) -> tuple[str, ...]:
    """The `--allow` entries under which these names load again; a script's classes by its path."""
    entries = []
    for name in sorted(names):
        module, _, attribute = name.rpartition(".")
        script = script_of(module)
        entries.append(f"{script}:{attribute}" if script else name)
    return tuple(entries)


def _entry(entry: str) -> Mapping[str, Any]:
    module, colon, attribute = entry.rpartition(":")
    if not colon:
        module, _, attribute = entry.rpartition(".")
    if not module or not attribute.isidentifier() or (attribute == "py" and Path(entry).is_file()):
        raise UsageError(
            f"--allow {shown(entry)} names no class",
            next_step="write --allow pkg.mod.Class, or --allow script.py:Class for a class of a script",
        )
    name = f"{module}.{attribute}"
    if not module.endswith(".py") and not can_be_allowed(name):
        raise _never(entry)
    found_in = import_script(Path(module)) if module.endswith(".py") else import_path(module)
    found = getattr(found_in, attribute, None)
    if found is None:
        raise LoadError(
            f"--allow {shown(entry)}: {found_in.__name__} has no {attribute}",
            where=getattr(found_in, "__file__", None) or "",
            next_step="check the name of the class",
        )
    if not _is_harmless_kind(found):
        raise _never(entry)
    names = {f"{found_in.__name__}.{attribute}", f"{found.__module__}.{found.__qualname__}"}
    if colon:
        names.add(f"__main__.{attribute}")
    return dict.fromkeys(names, found)


def _is_harmless_kind(found: Any) -> bool:
    """A class or a Python function whose real home may be allowed too (not `from os import system`)."""
    if not isinstance(found, type | types.FunctionType):
        return False
    home = f"{found.__module__}.{found.__qualname__}"
    if isinstance(found, type) and issubclass(found, nn.Module | enum.Enum):
        return not any(home.startswith(n + ".") for n in _NEVER)
    if found.__module__.partition(".")[0] == "torch":
        return found.__module__ == "torch.nn.functional"
    return can_be_allowed(home)


def _never(entry: str) -> UsageError:
    return UsageError(
        f"--allow {shown(entry)} is refused: a file could run code through it",
        next_step="allow model classes only; --trust-pickle runs whatever a file holds",
    )


def _find(module: str, attribute: str) -> Any | None:
    try:
        return getattr(importlib.import_module(module), attribute, None)
    except Exception:  # noqa: BLE001  an optional library may fail to import in any way
        return None


@contextlib.contextmanager
def only_these(allowed: Mapping[str, Any]) -> Iterator[None]:
    """Let torch's unpickler know `allowed`; afterwards its process-wide list is as it was."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        torch.serialization.add_safe_globals([(found, name) for name, found in allowed.items()])
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)
