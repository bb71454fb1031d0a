"""Saving a model the way its input was saved: a whole module, a state_dict, a checkpoint, safetensors."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
import re
import types
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from bntool.core.errors import UsageError
from bntool.files.atomic import sha256_of
from bntool.files.detect import detect
from bntool.files.drafting import Drafts
from bntool.files.loaded import Loaded
from bntool.files.safetensors_files import INDEX_SUFFIX
from bntool.files.security.allowed import allow_entries_for
from bntool.files.security.pickles import unknown_globals
from bntool.files.security.scripted import script_bytes
from bntool.files.shards import shard_of, write_shards
from bntool.files.targets import Target
from bntool.files.weights import StateDict


@dataclasses.dataclass(frozen=True)
class Saved:
    """What was written: its sha256, and why it is a state_dict where it would be a model."""

    digest: str
    as_weights: str = ""


class _Unpicklable(Exception):
    """A model that Python cannot pickle: why."""


def save_model(
    loaded: Loaded, model: nn.Module | ExportedProgram, output: str | Path, *, force: bool = False
) -> str:
    """Write `model` to `output` as the kind of file that `loaded` came from; return its sha256.

    The same model gives the same bytes. The optimizer state of a checkpoint is copied as it was. Of a model
    that cannot be pickled the state_dict is written. Raises `UsageError` for an output that may not be
    written.
    """
    require_fitting_name(loaded, Path(output))
    target = Target(force=force, reads=loaded.files)
    path = target.claim(output)
    with target.drafts() as drafts:
        return save_draft(loaded, model, path, drafts).digest


def save_draft(loaded: Loaded, model: nn.Module | ExportedProgram, path: Path, drafts: Drafts) -> Saved:
    """The same into the drafts of a claimed `path`, to be put into place with the other files."""
    if loaded.shards and not isinstance(model, ExportedProgram):
        return Saved(_save_shards(loaded, model, path, drafts))
    draft = drafts.of(path)
    if isinstance(model, ExportedProgram):
        draft.write_bytes(_program_bytes(model))
    elif isinstance(model, torch.jit.ScriptModule):
        draft.write_bytes(script_bytes(model))
    elif loaded.kind == "safetensors":
        _write_safetensors(_distinct(_stored(loaded, model)), dict(loaded.metadata), draft)
    else:
        try:
            _write_torch(_held(loaded, model), draft)
        except _Unpicklable as error:
            _write_weights(model, draft)
            return Saved(sha256_of(draft), str(error))
    return Saved(sha256_of(draft))


def require_fitting_name(loaded: Loaded, output: Path) -> None:
    """Raise `UsageError` for an output whose ending promises another kind of file than will be written."""
    endings: tuple[str, ...] = (".pt", ".pth")
    if loaded.kind in ("safetensors", "program"):
        endings = (".safetensors",) if loaded.kind == "safetensors" else (".pt2",)
    if loaded.shards:
        endings = (INDEX_SUFFIX,)
        if not output.name.endswith(INDEX_SUFFIX):
            raise UsageError(
                f"{output.name}: a sharded model is saved as one, under the name of its index",
                next_step=f"name it {output.name.partition('.')[0]}{INDEX_SUFFIX}",
            )
    if output.suffix in {".onnx", ".pt2", ".pt", ".pth", ".safetensors"} - set(endings):
        raise UsageError(
            f"{output.name}: the output is saved as the same kind as the input ({loaded.kind})",
            next_step=f"name it {output.stem}{endings[0]}",
        )


def allow_entries_of(output: str | Path) -> tuple[str, ...]:
    """The `--allow` entries that a file just saved by `save_model` needs to load again."""
    path = Path(output)
    kind = detect(path)
    return allow_entries_for(unknown_globals(path, kind)) if kind.kind.startswith("torch-") else ()


def _held(loaded: Loaded, model: nn.Module) -> Any:
    """What the new file holds: the model or its weights in a copy of what the old one held around them."""
    found = loaded.wrapped_in
    if found is None:
        return model
    whole = isinstance(found.value, nn.Module)
    value: Any = model if whole else _stored(loaded, model)
    return _replaced(found.container, found.path, value)


def _replaced(container: Any, path: tuple[str, ...], value: Any) -> Any:
    if not path:
        return value
    changed = copy.copy(container)
    changed[path[0]] = _replaced(container[path[0]], path[1:], value)
    return changed


def _save_shards(loaded: Loaded, model: nn.Module, output: Path, drafts: Drafts) -> str:
    """Every tensor in the file that its layer was in; the index, which makes them a model, goes last."""
    tensors = _distinct(_stored(loaded, model))
    parts = shard_of({n: shard for shard, names in loaded.shards.items() for n in names}, tensors)

    def fill(shard: str, temporary: Path) -> None:
        _write_safetensors(
            {n: t for n, t in tensors.items() if parts[n] == shard}, {"format": "pt"}, temporary
        )

    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    return write_shards(output, parts, sizes, loaded.metadata, fill, drafts)


def _stored(loaded: Loaded, model: nn.Module) -> StateDict:
    """The model's weights as the file names them, with what stood beside the old ones."""
    found, weights = loaded.wrapped_in, _weights(model)
    return found.saved(weights) if found is not None else weights


def _weights(model: nn.Module) -> StateDict:
    state = model.state_dict()
    for name, value in state.items():
        if isinstance(value, Tensor):
            state[name] = value.detach().cpu()
    return state


def _distinct(state: StateDict) -> StateDict:
    """Safetensors holds no tensor twice: of tied ones the first stays. Each is made contiguous."""
    kept: StateDict = {}
    seen: set[tuple[Any, ...]] = set()
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise UsageError(
                f"{name} is a {type(tensor).__name__}, and safetensors holds tensors only",
                next_step="start from a file of torch.save",
            )
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and place in seen:
            continue
        seen.add(place)
        # A copy where a larger storage is shared, which safetensors refuses.
        alone = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
        kept[name] = tensor if alone else tensor.clone(memory_format=torch.contiguous_format)
    return kept


def _program_bytes(program: ExportedProgram) -> bytes:
    # In memory: torch's writer aborts the whole process when a disk is full.
    content = io.BytesIO()
    torch.export.save(program, content)
    return content.getvalue()


def _write_safetensors(tensors: StateDict, metadata: dict[str, str], path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save

    try:
        # safetensors writes its own temporary file and renames it; the bytes go into ours instead.
        path.write_bytes(save(tensors, metadata or None))
    except SafetensorError as error:
        raise UsageError(f"safetensors cannot hold this model: {error}") from error


def _write_torch(held: Any, path: Path) -> None:
    # Through a handle, since torch names the archive's folder after a path.
    with path.open("wb") as file:
        try:
            torch.save(held, file, pickle_module=_ordered)
        except RuntimeError as error:
            # torch's writer reports a full disk, Ctrl-C or the end of a job so, with what happened behind it.
            if error.__context__ is not None and not isinstance(error.__context__, RuntimeError):
                raise error.__context__ from error
            why = (str(error).strip().splitlines() or [type(error).__name__])[0]
            if _WRITER.search(why):
                raise OSError(f"torch.save failed ({why})") from error
            raise _Unpicklable(why.removesuffix(" See:")) from error
        except OSError:
            raise
        except Exception as error:  # a class may refuse in its own way
            raise _Unpicklable((str(error).strip().splitlines() or [type(error).__name__])[0]) from error


def _write_weights(model: nn.Module, path: Path) -> None:
    try:
        _write_torch(_weights(model), path)
    except _Unpicklable as error:
        raise UsageError(
            f"neither the model nor its state_dict can be pickled: {error}",
            next_step="bntool export writes it as ONNX",
        ) from error


_WRITER = re.compile(r"enforce fail|PytorchStreamWriter|unexpected pos|file write failed")
"""What torch's own writer of archives says of a file that it cannot write."""


class _OrderedPickler(pickle._Pickler):
    """Pickles a set in sorted order, since the order of a set of strings differs from run to run."""

    def save_set(self, value: set[Any]) -> None:
        try:
            items = sorted(value)
        except TypeError:
            items = list(value)
        self.save_reduce(set, (items,), obj=value)  # type: ignore[attr-defined]

    dispatch: ClassVar[dict[type, Any]] = {**pickle._Pickler.dispatch, set: save_set}


_ordered = types.ModuleType("bntool_ordered_pickle")
vars(_ordered).update(vars(pickle), Pickler=_OrderedPickler)
