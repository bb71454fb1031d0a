"""A model that was read, and where it came from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import nn
from torch.export import ExportedProgram

from bntool.core.errors import UsageError
from bntool.files.weights import Found, StateDict
from bntool.graph.inputs import Inputs

LoadedKind = Literal["module", "state_dict", "checkpoint", "safetensors", "program", "script", "reference"]


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model and where it came from.

    `kind` says what the input was and so what an output is saved as: a whole `module`, a bare
    `state_dict`, a `checkpoint` with either inside, `safetensors`, an exported `program` (then the model
    is an `ExportedProgram`), a TorchScript module (`script`), or a `reference` to code.
    `source_hash` is the sha256 of the file that was read (MODEL, or `weights`), empty for none.
    `wrapped_in` is what the file held around the weights, to save the same way; `metadata` and `shards` are
    what safetensors files held beside their tensors, and the tensors of each file of several; `weight_shards`
    are those of `weights`.
    """

    model: nn.Module | ExportedProgram
    reference: str
    kind: LoadedKind
    path: Path | None = None
    source_hash: str = ""
    allow: tuple[str, ...] = ()
    trust_pickle: bool = False
    arch: str | None = None
    weights: str | None = None
    key: str | None = None
    notes: tuple[str, ...] = ()
    example_inputs: Inputs | None = None
    state_dict: StateDict | None = None
    wrapped_in: Found | None = None
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    shards: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    weight_shards: tuple[str, ...] = ()

    @property
    def module(self) -> nn.Module:
        """The model where it is an `nn.Module`; `UsageError` for an exported program."""
        if isinstance(self.model, nn.Module):
            return self.model
        raise UsageError(
            f"{self.reference} is an exported program (.pt2); bntool does not do this to one yet",
            next_step="bntool fold (with --export onnx), summary and verify take it; for the rest torch.save "
            "the nn.Module that it was exported from",
        )

    @property
    def files(self) -> tuple[Path, ...]:
        """Every model file that was read; none may be overwritten."""
        named = [p for p in (self.path, Path(self.weights) if self.weights else None) if p]
        shards = (*self.shards, *self.weight_shards)
        return (*named, *(named[0].with_name(shard) for shard in shards))
