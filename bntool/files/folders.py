"""A folder that a library saved a model into: a Hugging Face layout is loaded by the library's own loading.

Nothing is downloaded, no code that lies in the folder is run, and weights are read from safetensors alone.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from bntool.core.errors import LoadError
from bntool.files.security.pickled_calls import shown

CONFIG = "config.json"
_MOST = 1 << 24
_OTHERS = {
    "model_index.json": "a diffusers pipeline",
    "modules.json": "a sentence-transformers model",
    "adapter_config.json": "an adapter of PEFT, without the model that it adapts",
    "open_clip_config.json": "an open_clip model",
    "saved_model.pb": "a TensorFlow SavedModel",
    "hyperparams.yaml": "a SpeechBrain model",
    "model_config.yaml": "a NeMo model",
    "flax_model.msgpack": "a Flax model",
    "tf_model.h5": "a TensorFlow model",
}
"""The file by which another library's layout is told."""


def read_folder(folder: Path) -> nn.Module:
    """The model that transformers saved in a folder (`config.json` and safetensors), in eval mode.

    Raises:
        LoadError: it is no such folder, and what it is; transformers is not installed, or does not load it;
            its model needs code of its own.
    """
    config = _config_of(folder)
    if not list(folder.glob("*.safetensors")):
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        held = f"{pickles[0]}, a pickle," if pickles else "no weights"
        raise LoadError(
            f"{folder} holds {held} and no safetensors",
            where=str(folder),
            next_step="save it again with save_pretrained, which writes safetensors",
        )
    cls = _class_of(folder, config)
    try:
        with _offline():
            options = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
            found = cls.from_pretrained(str(folder), **options)
    except Exception as error:
        why = shown(f"{type(error).__name__}: {error}".split("\n")[0])
        raise LoadError(
            f"transformers does not load {cls.__name__} from {folder} ({why})",
            where=str(folder),
            next_step="mend what it names; its version is the one that is installed here",
        ) from error
    model: nn.Module = found
    return model.eval()


def _config_of(folder: Path) -> Mapping[str, Any]:
    """What `config.json` says, where it is one of transformers; else `LoadError` with what the folder is."""
    path = folder / CONFIG
    config: Any = None
    if path.is_file() and path.stat().st_size <= _MOST:
        with contextlib.suppress(ValueError, RecursionError):
            config = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    if isinstance(config, dict) and isinstance(config.get("model_type"), str):
        return config
    what, step = _told(folder, config)
    raise LoadError(f"{folder} is {what}", where=str(folder), next_step=step)


def _told(folder: Path, config: Any) -> tuple[str, str]:
    """What a folder of another layout is, and what to name instead."""
    weights = sorted(path.name for path in folder.glob("*.safetensors"))
    if isinstance(config, dict) and isinstance(config.get("architecture"), str) and weights:
        name = shown(config["architecture"])
        return f"a timm model ({name})", f"bntool ... {folder / weights[0]} --arch timm:{name}"
    if isinstance(config, dict) and isinstance(config.get("_class_name"), str):
        return f"a diffusers model ({shown(config['_class_name'])})", _MODULE
    for name, what in _OTHERS.items():
        if (folder / name).exists():
            return f"{what} ({name})", _MODULE
    inside = sorted(path.name for path in folder.iterdir())
    listed = ", ".join(map(shown, inside[:4])) + (", …" if len(inside) > 4 else "")
    held = f"it holds {listed}" if inside else "it is empty"
    return f"a folder with no model that bntool knows: {held}", "name a model file in it"


_MODULE = "load it with its own library, and torch.save the nn.Module that has the BatchNorms"


def _class_of(folder: Path, config: Mapping[str, Any]) -> Any:
    """The class of transformers that the configuration names."""
    if config.get("auto_map"):
        raise LoadError(
            f"{folder} holds a model with code of its own (auto_map), which bntool does not run",
            where=str(folder),
            next_step="load it in Python with trust_remote_code=True, and bntool.fold(model)",
        )
    try:
        with _offline():
            library = importlib.import_module("transformers")
    except ImportError as error:
        raise LoadError(
            f"{folder} is a transformers model, and transformers is not installed",
            where=str(folder),
            next_step="pip install transformers",
        ) from error
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else "AutoModel"
    found = getattr(library, name, None)
    known = name == "AutoModel" or (isinstance(found, type) and issubclass(found, library.PreTrainedModel))
    if found is None or not known:
        raise LoadError(
            f"transformers {library.__version__} has no model {shown(name)!r}",
            where=str(folder / CONFIG),
            next_step="install the version that saved it",
        )
    return found


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """No library asks the network: neither by its environment, nor by what it read of it before."""
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    constants: Any = None
    with contextlib.suppress(ImportError):
        constants = importlib.import_module("huggingface_hub.constants")
    was = getattr(constants, "HF_HUB_OFFLINE", None)
    if constants is not None:
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        if constants is not None:
            constants.HF_HUB_OFFLINE = was
        os.environ.pop("HF_HUB_OFFLINE")
        if before is not None:
            os.environ["HF_HUB_OFFLINE"] = before
