"""Little nets for torch.export, each with the verdict that algebra gives every BatchNorm of its program.

A program has no modules, hooks or closures: what those forbid in a module tree, a program allows.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torchvision.ops import FrozenBatchNorm2d

from bntool.core.options import FoldOptions
from bntool.core.plan import Plan
from bntool.core.reasons import Reason
from bntool.observe.exported_program import ProgramObservation
from bntool.subjects.program import ProgramSubject
from tests.fold_zoo import FOLDED, Net, Verdict, bn, conv, enliven, let, straight


def plan_fold_program(program: ExportedProgram) -> tuple[Plan, ProgramObservation]:
    """The plan, and the observation that it was made on."""
    subject = ProgramSubject(program)
    return subject.plan_fold(FoldOptions()), subject.observed


@dataclasses.dataclass(frozen=True)
class ProgramNet:
    name: str
    verdicts: Mapping[str, Verdict]
    """`batch_norm` and `~` stand for the one that bears the name of its node."""
    run: Callable[..., Any]
    parts: Callable[[], Mapping[str, Any]]
    shape: tuple[int, ...] = (2, 4, 8, 8)
    dynamic: Mapping[int, str] | None = None
    """Axes of the input without a fixed size."""

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return enliven(Net(self.run, self.parts()).eval())

    def inputs(self) -> tuple[Tensor, ...]:
        return (torch.randn(self.shape, generator=torch.Generator().manual_seed(1)),)

    def program(self) -> ExportedProgram:
        return exported(self.build(), self.inputs(), self.dynamic)


def exported(
    model: nn.Module, inputs: tuple[Tensor, ...], dynamic: Mapping[int, str] | None = None
) -> ExportedProgram:
    axes = torch.export.ShapesCollection()
    for tensor in inputs:
        axes[tensor] = {
            axis: Dim(name, min=4) if axis > 1 else Dim(name) for axis, name in (dynamic or {}).items()
        }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.export's own, of its own doings
        return torch.export.export(model, inputs, dynamic_shapes=axes if dynamic else None)


def decomposed(program: ExportedProgram) -> ExportedProgram:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return program.run_decompositions()


def functional(m: Any, x: Tensor) -> Tensor:
    return F.batch_norm(m.conv(x), m.mean, m.var, m.gamma, m.beta)


def stored(channels: int = 6) -> dict[str, Any]:
    return {
        "mean": nn.Buffer(torch.randn(channels)),
        "var": nn.Buffer(torch.rand(channels) + 0.5),
        "gamma": nn.Parameter(torch.rand(channels) + 0.5),
        "beta": nn.Parameter(torch.randn(channels)),
    }


def two_weights() -> dict[str, Any]:
    first, second = nn.Parameter(torch.randn(6, 4, 3, 3)), nn.Parameter(torch.randn(6, 6, 1, 1))
    return {"w": first, "v": second, "a": bn(), "b": bn()}


def tied() -> dict[str, Any]:
    parts: dict[str, Any] = {"c": conv(), "d": conv(), "a": bn(), "b": bn()}
    parts["d"].weight = parts["c"].weight
    return parts


def kept_in_train() -> dict[str, Any]:
    return {"conv": conv(), "bn": bn(track_running_stats=False)}


def with_own_bias() -> dict[str, Any]:
    return {"conv": conv(bias=False), "bn": bn(), "extra": nn.ParameterDict({"bias": torch.ones(6)})}


class Owner(nn.Module):
    """A module whose `bias` has another use than its `weight` would suggest."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4, 3, 3))
        self.bias = nn.Parameter(torch.randn(2, 6, 6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight)


class Counting(nn.Module):
    """A factor that the program counts up: no constant, though it is stored."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factor", torch.full((1, 6, 1, 1), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        self.factor.add_(1)
        return x * self.factor


def frozen(channels: int = 6) -> FrozenBatchNorm2d:
    norm = FrozenBatchNorm2d(channels)
    norm.weight.uniform_(0.5, 1.5)
    norm.bias.normal_()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return norm


def written_out(m: Any, x: Tensor) -> Tensor:
    """A BatchNorm as textbooks write it."""
    column = (1, -1, 1, 1)
    spread = (m.var.view(column) + 1e-3).sqrt()
    normal = (x - m.mean.view(column)) / spread
    return normal * m.gamma.view(column) + m.beta.view(column)


def after(m: Any, x: Tensor) -> Tensor:
    return m.conv(m.bn(x))


BATCH = {0: "batch"}
LARGE = {0: "batch", 2: "height", 3: "width"}
ONE = {"bn": FOLDED}

PROGRAM_ZOO = [
    ProgramNet("conv_bn", ONE, straight, lambda: {"conv": conv(), "bn": bn()}),
    ProgramNet("no_bias", ONE, straight, lambda: {"conv": conv(bias=False), "bn": bn()}),
    ProgramNet("dynamic_batch", ONE, straight, lambda: {"conv": conv(bias=False), "bn": bn()}, dynamic=BATCH),
    ProgramNet("dynamic_image", ONE, straight, lambda: {"conv": conv(), "bn": bn()}, dynamic=LARGE),
    ProgramNet("grouped", ONE, straight, lambda: {"conv": conv(groups=2, bias=False), "bn": bn()}),
    ProgramNet("string_padding", ONE, straight, lambda: {"conv": conv(padding="same"), "bn": bn()}),
    ProgramNet(
        "transposed",
        ONE,
        straight,
        lambda: {"conv": nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, bias=False), "bn": bn()},
    ),
    ProgramNet(
        "conv1d",
        ONE,
        straight,
        lambda: {"conv": nn.Conv1d(4, 6, 3), "bn": nn.BatchNorm1d(6)},
        (2, 4, 9),
    ),
    ProgramNet(
        "linear",
        ONE,
        straight,
        lambda: {"conv": nn.Linear(4, 6, bias=False), "bn": nn.BatchNorm1d(6)},
        (3, 4),
        BATCH,
    ),
    ProgramNet(
        "norm_without_affine",
        {"conv": FOLDED, "bn": Reason.NONLINEAR},
        lambda m, x: m.bn(m.conv(x.tanh())).tanh(),
        lambda: {"conv": bn(4, affine=False), "bn": bn(4, affine=False)},
    ),
    ProgramNet(
        "functional", {"batch_norm": FOLDED}, functional, lambda: {"conv": conv(bias=False), **stored()}
    ),
    ProgramNet(
        "weights_of_the_root",
        {"a": FOLDED, "b": FOLDED},
        lambda m, x: m.b(F.conv2d(m.a(F.conv2d(x, m.w)).relu(), m.v)),
        two_weights,
    ),
    ProgramNet(
        "matrix_of_the_root",
        ONE,
        lambda m, x: m.bn(x @ m.w),
        lambda: {"w": nn.Parameter(torch.randn(4, 6)), "bn": nn.BatchNorm1d(6)},
        (3, 4),
    ),
    ProgramNet(
        "bias_with_another_use",
        ONE,
        lambda m, x: m.bn(m.owner(x)) + m.owner.bias,
        lambda: {"owner": Owner(), "bn": bn()},
    ),
    ProgramNet("bn_first", ONE, after, lambda: {"bn": bn(4), "conv": conv(bias=False)}),
    ProgramNet(
        "bn_first_padded",
        {"bn": Reason.REACHES_INPUT},
        after,
        lambda: {"bn": bn(4), "conv": conv(padding=1)},
    ),
    ProgramNet(
        "no_affine", ONE, straight, lambda: {"conv": conv(bias=False), "bn": bn(affine=False)}, dynamic=BATCH
    ),
    ProgramNet(
        "average_pool",
        ONE,
        lambda m, x: m.bn(F.adaptive_avg_pool2d(m.conv(x), 1)).flatten(1),
        lambda: {"conv": conv(), "bn": bn()},
        dynamic=BATCH,
    ),
    ProgramNet(
        "number_first",
        {"a": FOLDED, "b": FOLDED},
        lambda m, x: m.c(1 - m.a(x.relu())) + m.b(3 - m.d(x)),
        lambda: {"a": bn(4), "c": conv(), "d": conv(), "b": bn()},
    ),
    ProgramNet(
        "max_pool", ONE, lambda m, x: m.bn(F.max_pool2d(m.conv(x), 2)), lambda: {"conv": conv(), "bn": bn()}
    ),
    ProgramNet(
        "add",
        ONE,
        lambda m, x: m.bn(m.c(x) + m.d(x)),
        lambda: {"c": conv(), "d": conv(bias=False), "bn": bn()},
    ),
    ProgramNet(
        "concat",
        {"bn": FOLDED},
        lambda m, x: m.bn(torch.cat([m.c(x), m.d(x)], 1)),
        lambda: {"c": conv(), "d": conv(), "bn": bn(12)},
        dynamic=BATCH,
    ),
    ProgramNet(
        "channel_shuffle_by_views",
        ONE,
        lambda m, x: shuffled(m, m.conv(x)),
        lambda: {"conv": conv(), "bn": bn()},
        dynamic=BATCH,
    ),
    ProgramNet(
        "channels_by_number",
        {"bn": FOLDED, "b": FOLDED},
        lambda m, x: (
            m.c(m.bn(x.relu())[:, [0, 2]]).mean() + m.d(m.b(x.relu())[:, :, torch.tensor([0, 1, 5])])
        ),
        lambda: {"bn": bn(4), "c": conv(2), "b": bn(4), "d": conv()},
        dynamic=BATCH,
    ),
    ProgramNet(
        "padded_with_copies",
        {"a": FOLDED, "b": FOLDED},
        lambda m, x: m.c(m.a(x.relu())) + m.d(m.b(x.relu())),
        lambda: {
            "a": bn(4),
            "b": bn(4),
            "c": conv(padding=1, padding_mode="reflect"),
            "d": conv(padding=1, padding_mode="replicate"),
        },
        dynamic=BATCH,
    ),
    ProgramNet(
        "two_halves",
        {"a": FOLDED, "b": FOLDED},
        lambda m, x: tuple(n(part) for n, part in zip((m.a, m.b), m.conv(x).chunk(2, 1), strict=True)),
        lambda: {"conv": conv(), "a": bn(3), "b": bn(3)},
    ),
    ProgramNet(
        "conv_read_twice",
        {"bn": Reason.OUTPUT_USED_ELSEWHERE},
        lambda m, x: let(lambda y: m.bn(y) + y.sigmoid(), m.conv(x)),
        lambda: {"conv": conv(), "bn": bn()},
    ),
    ProgramNet(
        "conv_returned",
        {"bn": Reason.REACHES_OUTPUT},
        lambda m, x: let(lambda y: (m.bn(y), y), m.conv(x)),
        lambda: {"conv": conv(), "bn": bn()},
    ),
    ProgramNet(
        "conv_called_twice",
        {"bn": Reason.CALLED_MORE_THAN_ONCE},
        lambda m, x: m.bn(m.conv(x)) + m.conv(x + 1).sigmoid(),
        lambda: {"conv": conv(), "bn": bn()},
    ),
    ProgramNet(
        "weight_tied",
        {"a": Reason.CALLED_MORE_THAN_ONCE, "b": Reason.CALLED_MORE_THAN_ONCE},
        lambda m, x: m.a(m.c(x)).relu() + m.b(m.d(x)).relu(),
        tied,
    ),
    ProgramNet(
        "one_pair_for_both",
        ONE,
        lambda m, x: m.bn(m.conv(x)).relu() + m.bn(m.conv(x + 1)).relu(),
        lambda: {"conv": conv(bias=False), "bn": bn()},
    ),
    ProgramNet(
        "weight_returned",
        {"bn": Reason.WEIGHT_SHARED},
        lambda m, x: (m.bn(m.conv(x)), m.conv.weight),
        lambda: {"conv": conv(), "bn": bn()},
    ),
    ProgramNet(
        "behind_relu",
        {"bn": Reason.NONLINEAR},
        lambda m, x: m.bn(m.conv(x).relu()),
        lambda: {"conv": conv(), "bn": bn()},
    ),
    ProgramNet("batch_statistics", {"bn": Reason.BATCH_STATISTICS}, straight, kept_in_train),
    ProgramNet(
        "own_constant",
        ONE,
        lambda m, x: m.bn(m.conv(x) * 0.5 + m.extra["bias"].view(1, -1, 1, 1)),
        with_own_bias,
    ),
    ProgramNet(
        "counted_factor",
        {"bn": Reason.NONLINEAR},
        lambda m, x: m.bn(m.count(m.conv(x))),
        lambda: {"conv": conv(), "count": Counting(), "bn": bn()},
    ),
    ProgramNet(
        "in_place_on_the_norm",
        ONE,
        lambda m, x: F.relu(m.bn(m.conv(x)), inplace=True) + 1,
        lambda: {"conv": conv(), "bn": bn()},
    ),
    ProgramNet(
        "channels_mixed_with_the_batch",
        {"bn": Reason.AXIS_MISMATCH},
        lambda m, x: m.bn(m.conv(x).transpose(0, 1).reshape(x.shape[0], 6, 6, 6)),
        lambda: {"conv": conv(), "bn": bn()},
    ),
    ProgramNet("frozen", ONE, straight, lambda: {"conv": conv(bias=False), "bn": frozen()}, dynamic=LARGE),
    ProgramNet(
        "frozen_behind_max_pool",
        ONE,
        lambda m, x: m.bn(F.max_pool2d(m.conv(x), 2)),
        lambda: {"conv": conv(), "bn": frozen()},
    ),
    ProgramNet(
        "frozen_first", ONE, after, lambda: {"bn": frozen(4), "conv": conv(bias=False)}, dynamic=BATCH
    ),
    ProgramNet(
        "frozen_behind_relu",
        {"bn": Reason.NONLINEAR},
        lambda m, x: m.bn(m.conv(x).relu()),
        lambda: {"conv": conv(), "bn": frozen()},
    ),
    ProgramNet(
        "frozen_called_twice",
        {"~": FOLDED, "bn": FOLDED},
        lambda m, x: m.bn(m.c(x)).relu() + m.bn(m.d(x)).relu(),
        lambda: {"c": conv(), "d": conv(), "bn": frozen()},
    ),
    ProgramNet(
        "frozen_that_stays_takes_the_one_before",
        {"bn": FOLDED, "stays": Reason.NONLINEAR},
        lambda m, x: m.stays(m.bn(x.sigmoid())).sigmoid(),
        lambda: {"bn": bn(4), "stays": frozen(4)},
    ),
    ProgramNet(
        "written_out",
        {"~": FOLDED},
        lambda m, x: written_out(m, m.conv(x)),
        lambda: {"conv": conv(bias=False), **stored()},
        dynamic=LARGE,
    ),
    ProgramNet(
        "written_out_and_read_within",
        {},
        lambda m, x: let(lambda y: y + m.beta.view(-1, 1, 1) + y, m.conv(x) * m.gamma.view(-1, 1, 1)),
        lambda: {"conv": conv(), **stored()},
    ),
    ProgramNet(
        "layer_scale_is_none",
        {},
        lambda m, x: m.conv(x) * m.gamma.view(-1, 1, 1),
        lambda: {"conv": conv(), **stored()},
    ),
    ProgramNet(
        "layer_norm_is_none",
        {},
        lambda m, x: m.norm(m.conv(x)),
        lambda: {"conv": nn.Linear(8, 6), "norm": nn.LayerNorm(6)},
    ),
    ProgramNet(
        "group_norm_is_none",
        {},
        lambda m, x: m.norm(m.conv(x)),
        lambda: {"conv": conv(), "norm": nn.GroupNorm(2, 6)},
        dynamic=BATCH,
    ),
    ProgramNet(
        "instance_norm_is_none",
        {},
        lambda m, x: m.norm(m.conv(x)),
        lambda: {"conv": conv(), "norm": nn.InstanceNorm2d(6, affine=True)},
    ),
]


def shuffled(m: Any, y: Tensor) -> Tensor:
    n, c, h, w = y.shape
    out: Tensor = m.bn(y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))
    return out
