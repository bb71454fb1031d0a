"""Why a place is not cut: stable codes, each with an explanation that `bntool explain CODE` prints."""

from __future__ import annotations

import enum


class Reason(str, enum.Enum):
    """A stable reason code. The value is what reports, JSON and `bntool explain` use."""

    # insertion
    ALREADY_NORMALISED = "already-normalised"
    NO_ACTIVATION = "no-activation"
    OTHER_ACTIVATION = "other-activation"
    OUTPUT_USED_ELSEWHERE = "output-used-elsewhere"
    CALLED_MORE_THAN_ONCE = "called-more-than-once"
    NOT_OBSERVED = "not-observed"
    OUTPUT_ESCAPES = "output-escapes"
    NOT_A_MODULE = "not-a-module"
    FORM_BROKE_MODEL = "form-broke-model"
    EXCLUDED = "excluded"
    # folding: the BN itself
    BATCH_STATISTICS = "batch-statistics"
    BAD_STATISTICS = "bad-statistics"
    CUSTOM_FORWARD = "custom-forward"
    FUNCTIONAL = "functional"
    SCRIPTED = "scripted"
    # folding: the way
    NONLINEAR = "nonlinear"
    NEGATIVE_SCALE = "negative-scale"
    ZERO_SCALE = "zero-scale"
    SHIFT_AT_PADDING = "shift-at-padding"
    SHIFT_BLOCKED = "shift-blocked"
    AXIS_MISMATCH = "axis-mismatch"
    REACHES_INPUT = "reaches-input"
    REACHES_OUTPUT = "reaches-output"
    MIXED_BRANCHES = "mixed-branches"
    UNKNOWN_OP = "unknown-op"
    HOOKED = "hooked"
    # folding: the layer that would take it in
    WEIGHT_SHARED = "weight-shared"
    WEIGHT_COMPUTED = "weight-computed"
    QUANTIZED = "quantized"
    OVERFLOW = "overflow"
    # folding: the proof
    NOT_PROVED = "not-proved"

    def __str__(self) -> str:
        return self.value
