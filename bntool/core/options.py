"""What can be asked of bntool: every option once.

The command line, `--help`, the man page and the refusals are made from these classes; the public functions
take the same names with the same defaults.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
from collections.abc import Mapping
from typing import Literal

from bntool.core.activations import ACTIVATIONS, ANY, kinds_of
from bntool.core.errors import UsageError
from bntool.core.option import Options, option
from bntool.core.tolerances import Tolerance

_LARGEST = sys.float_info.max
TOLERANCE = "no element may lie further off than atol + rtol · peak, the largest absolute value of its output"
"""What `atol` and `rtol` mean, in the words of the help, the man page, the docs and the code."""


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise UsageError(f"{text!r} holds an empty name")
    return tuple(dict.fromkeys(names))


def _device(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
        raise UsageError(f"{text!r} is not auto, cpu or cuda")
    return text


@dataclasses.dataclass(frozen=True)
class FoldOptions(Options):
    """Which BatchNorms may go, and at what price.

    `include` and `exclude` are patterns for names of layers. `merge` lets parallel branches that are one
    convolution become one, and blocks merge theirs by their own method. `unshare` clones a shared layer for
    each call site that needs it changed; where it is None, in ONNX files alone. `bake` first stores weights
    that layers compute from their parameters.
    """

    include: tuple[str, ...] = option(("*",), "Only layers with these names.", metavar="GLOB")
    exclude: tuple[str, ...] = option((), "Leave out layers with these names.", metavar="GLOB")
    merge: bool = option(True, "Leave parallel branches as they are.")
    unshare: bool | None = option(
        None,
        "Clone a shared layer for each call that needs it changed (default: in ONNX files alone).",
        "--unshare/--no-unshare",
    )
    bake: bool = option(
        False,
        "Store the weights that layers compute from parameters (weight_norm, spectral_norm, pruning, weight "
        "standardisation); training no longer goes through what computed them.",
    )


@dataclasses.dataclass(frozen=True)
class InsertOptions(Options):
    """What to insert and where.

    `activations` are kinds (`relu`, `silu`, …) or `any`. `pooling` lets a pooling layer stand between a
    layer and its activation. Of the sites found, `skip_last` leaves out the last, then `every` keeps each
    N-th, the first included. `per_call` gives a layer that runs several times a BatchNorm for each call.
    `drop_bias` moves a bias that a BatchNorm follows into its running mean. `portable` puts no class of
    bntool's own into the model. `banned` maps a layer to the forms that broke this model when tried.
    """

    activations: tuple[str, ...] = option(
        ("relu",),
        "Activations that count: relu (default), silu, ReLU6, …; any.",
        "--activation",
        metavar="KIND[,KIND]",
    )
    position: Literal["before", "after"] = option("before", "Which side of the activation.")
    init: Literal["identity", "calibrate", "default"] = option(
        "identity",
        "identity keeps the eval output to the last bit; calibrate measures --data and keeps the first "
        "training step close too; default is PyTorch's own, to train from scratch.",
    )
    affine: bool = option(True, "BatchNorm without γ and β.")
    eps: float = option(1e-5, "ε of the new layers.")
    momentum: float = option(0.1, "Momentum of the new layers.", least=0, most=1)
    drop_bias: bool = option(False, "Move a bias that a BatchNorm follows into its running mean.")
    linear: bool = option(False, "After linear layers too.")
    pooling: bool = option(False, "Where a pooling layer stands before the activation too.")
    per_call: bool = option(False, "A layer that runs several times gets one for each call.")
    every: int = option(1, "Only every N-th site, the first included.", metavar="N", least=1)
    skip_last: bool = option(False, "Leave the last site out.")
    sync: bool = option(False, "SyncBatchNorm, for training on several GPUs.")
    keep_keys: bool = option(False, "Name newcomers 0_bn, so that no old key moves.")
    portable: bool = option(False, "No class of bntool's own in the model.")
    include: tuple[str, ...] = option(("*",), "Only layers with these names.", metavar="GLOB")
    exclude: tuple[str, ...] = option((), "Leave out layers with these names.", metavar="GLOB")
    banned: Mapping[str, frozenset[str]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Take activations by the names that people have for them."""
        given: object = self.activations
        if not isinstance(given, str):  # which `validate` refuses
            object.__setattr__(self, "activations", kinds_of(self.activations))

    def validate(self) -> None:
        """Raise `UsageError` for an unknown activation, a bad number, or two that exclude each other."""
        super().validate()
        for name in self.activations:
            if name != ANY and name not in ACTIVATIONS:
                close = difflib.get_close_matches(name.lower(), sorted(ACTIVATIONS), n=3)
                meant = f"did you mean {', '.join(close)}? " if close else ""
                raise UsageError(
                    f"unknown activation {name!r}",
                    next_step=f"{meant}there are {', '.join(sorted(ACTIVATIONS))}; or {ANY}",
                )
        if not 0 < self.eps < 1:
            raise UsageError(f"eps must lie between 0 and 1, not {self.eps}")
        if self.portable and self.per_call:
            raise UsageError(
                "a BatchNorm for each call needs a class of bntool's own, which portable rules out",
                next_step="give one of the two",
            )
        if self.drop_bias and self.position == "after":
            raise UsageError(
                "behind the activation a BatchNorm cannot take the bias in",
                next_step='use position "before", or keep the biases',
            )


@dataclasses.dataclass(frozen=True)
class ExportOptions(Options):
    """What an ONNX file is to be like.

    `dynamic` names axes of an input that stay open besides the batch. `dtype` casts the weights and with
    them, unless `keep_io`, inputs and outputs; `float32` casts the model before anything is done.
    """

    opset: int | None = option(None, "ONNX opset (default: the lowest that works).", least=1)
    ir_version: int | None = option(None, "IR version (default: the lowest for the opset).", least=1)
    static_batch: bool = option(False, "Fix the batch size in the ONNX file.")
    dynamic: tuple[str, ...] = option(
        (),
        "Axes of an input to leave open besides the batch; repeat for several inputs.",
        metavar="NAME:0,2,3",
    )
    external_data: Literal["auto", "always", "never"] = option(
        "auto", "Weights in one file beside the model; auto: above 1.8 GiB."
    )
    dtype: Literal["float32", "fp16", "bf16"] | None = option(
        None,
        "fp16, bf16: cast the ONNX file's numbers. float32: cast the model first, where float16 cannot hold "
        "the folded weights.",
    )
    keep_io: bool = option(False, "With --dtype: inputs and outputs stay float32.")
    exporter: Literal["dynamo", "legacy"] = option(
        "dynamo", "torch's exporter; legacy traces, for what torch.export cannot take."
    )
    keep_unverified: bool = option(False, "Keep a file that fails its check as NAME.unverified.onnx.")

    def axes(self) -> dict[str, list[int]]:
        """`dynamic` by input; without a name it is the only input's. `UsageError` for what is none."""
        found: dict[str, list[int]] = {}
        for text in self.dynamic:
            match = re.fullmatch(r"(?:(?P<name>[^:]+):)?(?P<axes>\d+(?:,\d+)*)", text.strip())
            if match is None:
                raise UsageError(f"--dynamic {text!r} is not like input:0,2,3")
            found.setdefault(match["name"] or "input", []).extend(int(n) for n in match["axes"].split(","))
        return found

    @property
    def narrow(self) -> Literal["", "fp16", "bf16"]:
        """What the file's numbers are cast to; empty for the model's own."""
        return self.dtype if self.dtype in ("fp16", "bf16") else ""

    def validate(self) -> None:
        """Raise `UsageError` for a number out of bounds, or axes that are not written like any."""
        super().validate()
        self.axes()

    def require_together(self) -> None:
        """Raise `UsageError` for `keep_io` with no cast."""
        if self.keep_io and not self.narrow:
            raise UsageError(
                "--keep-io goes with --dtype", next_step="add --dtype fp16, or leave --keep-io out"
            )


@dataclasses.dataclass(frozen=True)
class PlaceOptions(Options):
    """Where things run."""

    device: str = option(
        "auto",
        "Where to verify. cuda that cannot run is an error.",
        metavar="auto|cpu|cuda",
        parse=_device,
    )
    providers: tuple[str, ...] = option(
        (),
        "Where ONNX Runtime runs, by its own names: CUDAExecutionProvider, …; the first is proved.",
        metavar="NAME,NAME",
        parse=_names,
    )


@dataclasses.dataclass(frozen=True)
class CheckOptions(Options):
    """How much is verified, and by what limit."""

    check: Literal["full", "fast", "none"] = option(
        "full", "How much to verify: batches 1, 2, 3; one; or nothing."
    )
    tf32: Literal["off", "both"] = option(
        "off", "both: one row more with TF32 on, for information. It needs an NVIDIA GPU."
    )
    atol: float | None = option(
        None, f"Absolute tolerance, instead of the noise floor: {TOLERANCE}.", least=0, most=_LARGEST
    )
    rtol: float | None = option(
        None, f"Relative tolerance, instead of the noise floor: {TOLERANCE}.", least=0, most=_LARGEST
    )
    repro: str | None = option(
        None,
        "On a mismatch: write what shows it by itself into a new folder.",
        metavar="DIR",
        names="folder",
        written=True,
    )

    @property
    def tolerance(self) -> Tolerance:
        return Tolerance(self.atol, self.rtol)
