"""What a report reads of a document, and of which type it must be. The rest of a document is let pass."""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from bntool.core.schema import Count, Damaged, Index, Positive, Shape, Text, fitted

Figure = float | None
"""None where it was not finite."""


class _Folded(Struct):
    bn: Text
    into: tuple[Text, ...]
    laws: tuple[Text, ...]


class _Inserted(Struct):
    conv: Text
    bn: Text
    channels: Count
    activation: Text | None = None
    activation_kind: Text | None = None
    calls: Positive | None = None


class _Kept(Struct):
    reason: Text
    bn: Text | None = None
    name: Text | None = None
    detail: Text | None = None


class _Surgery(Struct):
    sites: tuple[dict[str, Any], ...] | None = None
    skips: tuple[_Kept, ...] | None = None
    key_map: dict[Text, Text] | None = None


class _Check(Struct):
    stage: Text
    passed: bool
    relative: Figure
    noise_floor: Figure
    limit: Figure
    max_abs: Figure = None
    ratio: Figure = None
    device: Text = ""
    provider: Text = ""
    precision: Text | None = None
    detail: Text | None = None
    undecided: Text = ""


class _Layer(Struct, rename={"reads": "from"}):
    name: Text
    kind: Text
    reads: tuple[Index, ...]
    parameters: Count
    op: bool
    shape: Shape = ()


class _Side(Struct):
    layers: tuple[_Layer, ...]
    modules: dict[Text, Text]
    left_out: Count
    count: Count | None = None


class _Norm(Struct):
    name: Text
    channels: Count | None
    dead: Count | None
    scale: tuple[Figure, ...] | None = None
    shift: tuple[Figure, ...] | None = None
    variance: tuple[Figure, ...] | None = None


class _Model(Struct):
    reference: Text | None = None
    before: _Side | None = None
    after: _Side | None = None
    norms: tuple[_Norm, ...] | None = None


class _Row(Struct):
    name: Text
    median_seconds: float
    quartiles_seconds: tuple[float, float]
    samples_per_second: float
    device: Text = ""
    provider: Text = ""


class _Verdict(Struct):
    verdict: Text


class _Latency(Struct):
    rows: tuple[_Row, ...] = ()
    comparisons: tuple[_Verdict, ...] = ()


class _Spread(Struct):
    mean: Figure
    spread: Figure


class _Rate(Struct):
    lr: float
    train_loss: _Spread | None = None
    train_accuracy: _Spread | None = None
    test_loss: _Spread | None = None
    test_accuracy: _Spread | None = None


class _Arm(Struct):
    rates: tuple[_Rate, ...]
    best_rate: Figure


class _Epoch(Struct):
    epoch: Count
    train_loss: Figure = None
    train_accuracy: Figure = None
    test_loss: Figure = None
    test_accuracy: Figure = None


class _Run(Struct):
    arm: Text
    lr: float
    history: tuple[_Epoch, ...]


class _Values(Struct):
    quantiles: tuple[Figure, ...]


class _Record(Struct):
    step: Count
    values: dict[Text, _Values]


class _Watched(Struct):
    plain: tuple[_Record, ...] | None = None
    batchnorm: tuple[_Record, ...] | None = None


class _Blame(Struct):
    name: Text


class _Failure(Struct):
    what: Text = ""
    where: Text = ""
    next: Text = ""


class _Reported(_Surgery):
    status: Text | None = None
    plan: _Surgery | None = None
    check: _Check | None = None
    checks: tuple[_Check, ...] | None = None
    parameters: dict[Text, Index | dict[Text, Index]] | None = None
    totals: dict[Text, Index | None] | None = None
    model: _Model | None = None
    latency: _Latency | None = None
    arms: dict[Text, _Arm | None] | None = None
    runs: tuple[_Run, ...] | None = None
    watched: _Watched | None = None
    blame: _Blame | None = None
    error: _Failure | None = None
    notes: tuple[Text | dict[Text, Any], ...] | None = None


def require_report(command: str, data: dict[str, Any]) -> None:
    """`Damaged`, with the place, where a part of a document is not what its name promises."""
    found = fitted(data, _Reported)
    for place, held in (("plan.sites", found.plan), ("sites", found)):
        sites = (held and held.sites) or ()
        is_fold = command == "fold" or any("into" in site for site in sites)
        try:
            fitted(sites, tuple[_Folded, ...] if is_fold else tuple[_Inserted, ...])
        except Damaged as error:
            raise Damaged(error.why, place + error.place) from None
