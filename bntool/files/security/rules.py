"""What a model file may refer to: the layers and models of PyTorch, and a few reviewed names.

A name is looked up only when it passes these rules, so a file cannot make an arbitrary module be imported.
The same rules judge what the user allows. Reasons are phrases that follow "X is".
"""

from __future__ import annotations

import contextlib
import enum
import functools
import importlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from bntool.files.security.pickled_calls import PARTIAL

_LAYER_PACKAGES = ("torch.nn.modules", "torchvision.models", "torchvision.ops", "timm.models", "timm.layers")
_OWN_LAYERS = ("bntool.layers", "bntool.frozen")
_ACTIVATIONS = """relu relu6 elu selu celu leaky_relu rrelu gelu silu mish hardtanh hardswish hardsigmoid
softshrink tanhshrink softplus softsign softmin softmax log_softmax logsigmoid sigmoid tanh glu
_threshold"""
_TIMM_ACTIVATIONS = """swish mish sigmoid tanh hard_swish hard_sigmoid hard_mish gelu gelu_tanh quick_gelu"""
# Reviewed one by one: they compute a tensor from tensors and numbers, and do nothing else.
_FUNCTIONS = frozenset(
    {
        *(f"torch.nn.functional.{name}" for name in _ACTIVATIONS.split()),
        *(f"timm.layers.activations.{name}" for name in _TIMM_ACTIVATIONS.split()),
        # What functions of torch.nn.functional that are written in C call themselves.
        *(f"torch._C._nn.{name}" for name in ("gelu", "softplus", "softshrink", "log_sigmoid")),
        "torchvision.ops.boxes.box_iou",
        "torchvision.models.optical_flow.raft._pass_through_h",
    }
)
# Reviewed too: holders of plain data that are restored by their attributes alone.
_DATA = frozenset(
    {
        "argparse.Namespace",
        "bntool.layers.StartOfForward",
        "timm.layers.format.Format",
        "timm.models._features.FeatureInfo",
        "torchvision.models.detection._utils.BoxCoder",
        "torchvision.models.detection._utils.BoxLinearCoder",
        "torchvision.models.detection._utils.Matcher",
        "torchvision.models.detection._utils.SSDMatcher",
        "torchvision.models.detection._utils.BalancedPositiveNegativeSampler",
    }
)
# What torchvision's quantizable models hold before anything is quantized.
_OTHER_LAYERS = frozenset(
    {
        "torch.ao.nn.quantized.modules.functional_modules.FloatFunctional",
        "torch.ao.quantization.stubs.DeQuantStub",
        "torch.ao.quantization.stubs.QuantStub",
    }
)
# A layer may keep these classes to make layers of them: their constructors make tensors, and nothing else.
_MADE_LATER = (
    "torch.nn.modules", "torchvision.ops.misc", "torchvision.models.convnext.LayerNorm2d",
    "timm.layers.activations", "timm.layers.norm", "timm.layers.norm_act",
    "timm.models.nextvit.NextConvBlock", "timm.models.nextvit.NextTransformerBlock",
)  # fmt: skip
# Libraries that run or load code; whatever is built on them is refused as well.
_CODE = (
    "torch.fx", "torch.jit", "torch.hub", "torch._dynamo", "torch.package", "torch.export", "numpy.f2py",
    "numpy.testing", "dill", "cloudpickle", "joblib", "jsonpickle", "yaml", "pip", "setuptools",
    # Its classes make Python source of the names of layers when they are called.
    "timm.models._features_fx",
    # They rewrite their own class.
    "torch.nn.modules.lazy",
)  # fmt: skip
_TORCH_LAYERS = ("torch.nn", "torch.ao.nn", "torch.ao.quantization")
# Methods that Python or torch runs while an object is made, restored or dropped: before anything is checked.
RUN_UNASKED = ("__new__", "__setstate__", "__getattribute__", "__del__", "_missing_")
_REVIEWED = ("builtins", "typing", "torch.nn.modules", "timm.layers.ml_decoder")
NO_LAYER = "neither a layer (nn.Module) nor an enum"
FUNCTION = "a function, which could run, read or write anything"


def runs_unasked(method: str) -> str:
    """The reason against a class with a method of `RUN_UNASKED` that nobody reviewed."""
    return f"restored by a {method} of its own, which runs with whatever the file holds"


def builtin_allowance(name: str) -> Any | None:
    """The class or function behind `name` if bntool's own rules allow it, else None."""
    if name == PARTIAL:
        return functools.partial
    module, _, attribute = name.rpartition(".")
    if name in _FUNCTIONS | _DATA | _OTHER_LAYERS:
        return _find(module, attribute)
    if module not in _OWN_LAYERS and not _within(name, _LAYER_PACKAGES):
        return None
    found = _find(module, attribute)
    layer = isinstance(found, type) and issubclass(found, nn.Module) and why_not(found) is None
    # A re-export could name what lives elsewhere.
    return found if layer and home_of(found) == name else None


def home_of(found: Any) -> str:
    """Where a class is defined, whatever name it was found by."""
    return f"{found.__module__}.{found.__qualname__}"


def why_never(name: str) -> str | None:
    """What no flag but --trust-pickle lets in, judged by the name alone; None where it may be looked at."""
    top = name.partition(".")[0]
    if name in _FUNCTIONS | _DATA | _OTHER_LAYERS:
        return None
    if top in sys.stdlib_module_names:
        return "part of Python's standard library"
    if top == "bntool":
        return "part of bntool itself"
    if _within(name, _CODE):
        return "part of what makes, loads or changes code"
    if top == "torch" and not _within(name, _TORCH_LAYERS):
        return "part of torch, and none of its layers"
    return None


def why_not(found: Any) -> str | None:
    """What a class is that no file may be given; None for a layer or an enum that runs nothing unasked."""
    if not isinstance(found, type):
        return FUNCTION if callable(found) else NO_LAYER
    if issubclass(found, enum.Enum):
        return _why_no_enum(found)
    if not issubclass(found, nn.Module):
        return NO_LAYER
    for base in found.__mro__:
        if why := why_no_base(home_of(base)):
            return why
        for method in RUN_UNASKED:
            if method in vars(base) and not _within(base.__module__, _REVIEWED):
                return runs_unasked(method)
    return None


def why_no_base(home: str) -> str | None:
    """Why nothing may be built on the class of this name."""
    return f"a kind of {home}, which makes, loads or changes code" if _within(home, _CODE) else None


def may_be_called(found: Any) -> bool:
    """Whether a file may keep a class or function itself, which the model may call with the file's values.

    Reviewed functions, the classes of plain layers, and enums, which only look a member up.
    """
    if isinstance(found, type):
        return issubclass(found, enum.Enum) or _within(home_of(found), _MADE_LATER)
    names = (name.rpartition(".") for name in _FUNCTIONS)
    return any(getattr(sys.modules.get(module), name, None) is found for module, _, name in names)


def _why_no_enum(found: type[enum.Enum]) -> str | None:
    if type(found) is not enum.EnumMeta or not found.__members__:
        return "an enum that makes members of what it is called with"
    if next(base for base in found.__mro__ if "_missing_" in vars(base)).__module__ != "enum":
        return runs_unasked("_missing_")
    return None


def _within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


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
