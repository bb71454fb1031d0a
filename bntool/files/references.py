"""Models named, not saved: `torchvision:NAME`, `timm:NAME`, `pkg.mod:factory`, `path/file.py:Class`."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bntool.core.errors import LoadError, UsageError
from bntool.files.scripts import import_path, import_script, running_user_code, seeded
from bntool.files.security.pickled_calls import shown
from bntool.graph.drawing import Draw
from bntool.graph.inputs import Inputs

_REGISTRIES = ("torchvision", "timm")
_IDENTIFIER = r"[A-Za-z_]\w*"
_FACTORY = re.compile(rf"{_IDENTIFIER}(\.{_IDENTIFIER})*:{_IDENTIFIER}(\.{_IDENTIFIER})*")
_MAX_INPUT_VALUES = 1 << 26


@dataclasses.dataclass(frozen=True)
class Built:
    """A model made by code, with what there is to say about it."""

    model: nn.Module
    notes: tuple[str, ...] = ()


def is_reference(ref: str) -> bool:
    """Whether `ref` has the form of a named model rather than of a file."""
    head, colon, tail = ref.rpartition(":")
    if not colon or not tail:
        return False
    return head.endswith(".py") or ref.partition(":")[0] in _REGISTRIES or bool(_FACTORY.fullmatch(ref))


def build(ref: str, *, pretrained: bool = False) -> Built:
    """Make the model that `ref` names, its random weights the same every time; the RNG is left as it was.

    Raises `LoadError` for a name that is not there, code that fails, or a download that does.
    """
    registry, _, name = ref.partition(":")
    with seeded():
        if registry == "torchvision":
            return _torchvision(name, pretrained)
        if registry == "timm":
            return _timm(name, pretrained)
        if pretrained:
            raise UsageError(
                f"--pretrained is for torchvision:NAME and timm:NAME, not {shown(ref)}",
                next_step="pass its weights with --weights FILE",
            )
        return _factory(ref)


def full_names(name: str) -> list[str]:
    """The references that a bare name such as `resnet18` may stand for; none where torchvision has none."""
    try:
        from torchvision import models
    except Exception:  # noqa: BLE001 - one that does not fit this torch fails in ways of its own
        return []
    return [f"torchvision:{name}"] if name in models.list_models() else []


def recorded_inputs(model: nn.Module) -> Inputs | None:
    """Example inputs (1, C, H, W) of the size a timm model records for itself, seeded; else None."""
    for attribute in ("pretrained_cfg", "default_cfg"):
        config = getattr(model, attribute, None)
        size = config.get("input_size") if isinstance(config, dict) else getattr(config, "input_size", None)
        if not isinstance(size, tuple | list) or not 1 <= len(size) <= 4:
            continue
        if not all(isinstance(n, int) and 0 < n <= 1 << 16 for n in size):
            continue
        if torch.Size(size).numel() > _MAX_INPUT_VALUES:
            continue
        dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        return Inputs((Draw().numbers((1, *size), dtype),), origin=f"the model's own {attribute}")
    return None


def _torchvision(name: str, pretrained: bool) -> Built:
    try:
        from torchvision import models
    except ImportError as error:
        raise _not_installed("torchvision") from error
    if name not in models.list_models():
        raise _unknown("torchvision", name, models.list_models())
    builder = models.get_model_builder(name)
    options: dict[str, Any] = {"weights": "DEFAULT" if pretrained else None}
    if "weights_backbone" in inspect.signature(builder).parameters:
        options["weights_backbone"] = None
    return _make(f"torchvision:{name}", pretrained, lambda: builder(**options))


def _timm(name: str, pretrained: bool) -> Built:
    try:
        import timm
    except ImportError as error:
        raise _not_installed("timm") from error
    if not timm.is_model(name):
        raise _unknown("timm", name, timm.list_models())
    return _make(f"timm:{name}", pretrained, lambda: timm.create_model(name, pretrained=pretrained))


def _make(ref: str, pretrained: bool, make: Any) -> Built:
    try:
        with warnings.catch_warnings():
            # About defaults of the library's own builders, which the user did not choose.
            warnings.simplefilter("ignore")
            model = make()
    except Exception as error:
        text = shown(f"{type(error).__name__}: {error}".split("\n")[0])
        if pretrained:
            raise LoadError(
                f"the pretrained weights of {ref} could not be fetched ({text})",
                next_step="check the network, or download them elsewhere and pass --weights FILE",
            ) from error
        raise LoadError(f"{ref} could not be made ({text})", next_step="name another model") from error
    notes = () if pretrained else ("random weights (seed 0)",)
    return Built(_checked(model, ref), notes)


def _factory(ref: str) -> Built:
    where, _, attribute = ref.rpartition(":")
    script = where.endswith(".py")
    module = import_script(Path(where)) if script else import_path(where)
    found: Any = module
    for step in attribute.split("."):
        found = getattr(found, step, None)
    if found is None:
        raise LoadError(
            f"{where} has no {shown(attribute)}{_suggest(attribute, vars(module))}",
            next_step="name a class or function that makes the model",
        )
    if isinstance(found, nn.Module):
        return Built(found)
    if not callable(found):
        raise LoadError(f"{ref} is a {type(found).__name__}", next_step="name a class or a function")
    folder = Path(where).resolve().parent if script else Path.cwd()
    try:
        with running_user_code(folder, first=script):
            model = found()
    except Exception as error:
        raise LoadError(
            f"calling {ref} raised {type(error).__name__}: {shown(str(error))}",
            next_step="name a class or function that needs no arguments",
        ) from error
    notes = (f"no weights were loaded: {attribute} has what its code gives it (random numbers: seed 0)",)
    return Built(_checked(model, ref), notes)


def _checked(model: Any, ref: str) -> nn.Module:
    if isinstance(model, nn.Module):
        return model
    raise LoadError(
        f"{ref} gave a {type(model).__name__}, not an nn.Module",
        next_step="name a class or function that makes the model",
    )


def _unknown(registry: str, name: str, names: Iterable[str]) -> LoadError:
    return LoadError(
        f"{registry} has no model {shown(name)!r}{_suggest(name, names)}",
        next_step=f"list them: python -c 'import {registry}; print({_LISTING[registry]})'",
    )


_LISTING = {"torchvision": "torchvision.models.list_models()", "timm": "timm.list_models()"}


def _suggest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=3)
    return f"; did you mean {', '.join(close)}?" if close else ""


def _not_installed(package: str) -> LoadError:
    return LoadError(f"{package} is not installed", next_step=f"pip install {package}")
