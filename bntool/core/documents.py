"""The documents that `--json` prints: one for each command, the same keys whatever the kind of model.

A key that has nothing to say is there, and null or empty: for a dry run, where there was nothing to do, and
for an error. `docs/reference/schema.json` is made from these classes.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

SCHEMA_VERSION = 2
"""1 left keys out where a kind had nothing to say; `bntool report` reads both."""
Figure = float | None
"""None is one that is not finite."""
Kind = Literal["module", "program", "onnx", "script", "weights"]


class Error(msgspec.Struct, forbid_unknown_fields=True):
    """What failed, where, and what to do next."""

    what: str
    where: str
    next: str


class Place(msgspec.Struct, forbid_unknown_fields=True):
    """An output, and an index into it."""

    output: str
    index: list[int]


class Check(msgspec.Struct, forbid_unknown_fields=True):
    """One row of a verification; `relative`, `noise_floor` and `limit` share a scale, the peak's.

    `limit_by` is what set the limit: a tolerance as it was given, or noise. A row that proves nothing has not
    `passed`, and `undecided` tells why. `inputs` are the shapes of what both models ran on, a batch each.
    """

    stage: str
    device: str
    provider: str
    passed: bool
    max_abs: Figure
    relative: Figure
    rms: Figure
    cosine: Figure
    top1: Figure
    noise_floor: Figure
    ratio: Figure
    limit: Figure
    batches: int
    detail: str
    worst: Place
    precision: str
    tolerance: str
    undecided: str = ""
    limit_by: str = ""
    inputs: list[str] = []


class Counts(msgspec.Struct, forbid_unknown_fields=True):
    """Numbers of a model, and their bytes; `conv_bias` is of a difference alone."""

    trainable: int
    frozen: int
    buffers: int
    bytes: int
    conv_bias: int | None = None


class Parameters(msgspec.Struct, forbid_unknown_fields=True):
    """The counts before and after, and after less before."""

    before: Counts
    after: Counts
    delta: Counts


class Document(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What every document has."""

    schema_version: int = SCHEMA_VERSION
    command: str = ""
    status: str = "ok"
    error: Error | None = None
    notes: list[str] = []
    model: dict[str, Any] | None = None


class _Surgery(Document, kw_only=True):
    kind: Kind | None = None
    output: str | None = None
    onnx: str | None = None
    dry_run: bool = False
    parameters: Parameters | None = None
    sites: list[dict[str, Any]] = []
    skips: list[dict[str, Any]] = []
    checks: list[Check] = []
    export: dict[str, Any] | None = None


class Fold(_Surgery, kw_only=True):
    """`bntool fold`."""

    bn_total: int = 0
    bn_folded: int = 0
    unshared: dict[str, Any] | None = None
    merges: list[dict[str, Any]] = []
    latency: dict[str, Any] | None = None
    blame: dict[str, Any] | None = None
    repro: str | None = None


class Insert(_Surgery, kw_only=True):
    """`bntool insert`."""

    key_map: dict[str, str] = {}
    dropped_biases: list[dict[str, Any]] = []
    check: Check | None = None
    source: dict[str, Any] | None = None


class Export(Document, kw_only=True):
    """`bntool export`."""

    kind: Kind | None = None
    onnx: str | None = None
    export: dict[str, Any] | None = None
    checks: list[Check] = []


class Summary(Document, kw_only=True):
    """`bntool summary`: `layers` of every kind, and the `tensors` of what is no module.

    A figure of `totals` that takes a forward pass is null where there was none.
    """

    kind: Kind | None = None
    model_class: str | None = None
    layers: list[dict[str, Any]] = []
    tensors: list[dict[str, Any]] = []
    totals: dict[str, int | None] | None = None
    batch_norms: int | None = None
    delta: dict[str, Any] | None = None


class Verify(Document, kw_only=True):
    """`bntool verify`."""

    checks: list[Check] = []
    blame: dict[str, Any] | None = None
    repro: str | None = None


class Bench(Document, kw_only=True):
    """`bntool bench`."""

    latency: dict[str, Any] | None = None


class Calibrate(Document, kw_only=True):
    """`bntool calibrate`."""

    output: str | None = None
    dry_run: bool = False
    data: str | None = None
    batches: int | None = None
    samples: int | None = None
    warnings: list[str] = []
    frozen: bool = False
    layers: list[dict[str, Any]] = []
    kept: list[dict[str, Any]] = []
    dead_channels: int | None = None
    parameters: Parameters | None = None


class Compare(Document, kw_only=True):
    """`bntool compare`."""

    folder: str | None = None
    files: list[str] = []
    data: str | None = None
    warnings: list[str] = []
    settings: dict[str, Any] | None = None
    init: str | None = None
    torch: str | None = None
    processes: int | None = None
    steps_per_epoch: int | None = None
    sites: list[dict[str, Any]] = []
    key_map: dict[str, str] = {}
    parameters: Parameters | None = None
    arms: dict[str, Any] | None = None
    runs: list[dict[str, Any]] = []
    watched: dict[str, Any] | None = None


class Inspect(Document, kw_only=True):
    """`bntool inspect`; here `kind` is of the file."""

    file: str | None = None
    bytes: int | None = None
    kind: str | None = None
    description: str | None = None
    detail: str | None = None
    facts: dict[str, Any] | None = None
    classes: list[dict[str, Any]] = []
    tensors: list[dict[str, Any]] = []
    tensor_bytes: int | None = None
    groups: list[dict[str, Any]] = []
    suspicious: list[str] = []


class Report(Document, kw_only=True):
    """`bntool report`."""

    output: str | None = None
    format: str | None = None


class Explain(Document, kw_only=True):
    """`bntool explain`."""

    reasons: dict[str, Any] | None = None


class Doctor(Document, kw_only=True):
    """`bntool doctor`."""

    ok: bool | None = None
    rows: list[dict[str, Any]] = []


DOCUMENTS: dict[str, type[Document]] = {
    "fold": Fold,
    "insert": Insert,
    "export": Export,
    "summary": Summary,
    "verify": Verify,
    "bench": Bench,
    "calibrate": Calibrate,
    "compare": Compare,
    "inspect": Inspect,
    "report": Report,
    "explain": Explain,
    "doctor": Doctor,
}


def whole(command: str, document: dict[str, Any]) -> dict[str, Any]:
    """The document of a command with all its keys."""
    blank: dict[str, Any] = msgspec.to_builtins(DOCUMENTS.get(command, Document)(command=command))
    return {**blank, **document}


def schema() -> dict[str, Any]:
    """JSON Schema of all documents, by command."""
    schemas, components = msgspec.json.schema_components(
        list(DOCUMENTS.values()), ref_template="#/$defs/{name}"
    )
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Documents of bntool --json",
        "schema_version": SCHEMA_VERSION,
        "commands": dict(zip(DOCUMENTS, schemas, strict=True)),
        "$defs": components,
    }
