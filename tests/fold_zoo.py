"""Hard little nets, each with the verdict that algebra gives every one of its BatchNorms.

`FOLDED` means the BatchNorm must go; a `Reason` means it must stay, and why. Nets are built in float64
with random, seeded statistics and positive γ, unless a net says otherwise.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d, StdConv2d
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torchvision.ops import FrozenBatchNorm2d

from bntool.core.reasons import Reason

FOLDED = "folded"
Verdict = str | Reason
Shape = tuple[int, ...]
IMAGE = (2, 4, 8, 8)


class Net(nn.Module):
    """Parts by name, and a forward that is given them as `m`."""

    def __init__(self, run: Callable[..., Any], parts: Mapping[str, Any]) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs: Tensor) -> Any:
        return self.run(self, *inputs)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One net of the zoo: `parts` makes its modules anew, `tweak` has the last word on them."""

    name: str
    verdicts: Mapping[str, Verdict]
    run: Callable[..., Any]
    parts: Callable[[], Mapping[str, Any]]
    shapes: tuple[Shape, ...]
    tweak: Callable[[Any], Any] | None
    dtype: torch.dtype

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        model = enliven(Net(self.run, self.parts()).to(self.dtype).eval())
        if self.tweak is not None:
            with torch.no_grad():
                self.tweak(model)
        return model

    def inputs(self) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(1)
        return tuple(
            torch.randn(s, generator=generator, dtype=torch.float64).to(self.dtype) for s in self.shapes
        )


def enliven(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every BatchNorm statistics of its own: γ in [0.5, 1.5], σ² in [0.5, 2.5], the rest N(0, 1)."""
    generator = torch.Generator().manual_seed(seed)

    def fill(tensor: Tensor | None, low: float = 0.0, width: float = 0.0) -> None:
        if tensor is None:
            return
        draw = torch.rand if width else torch.randn
        numbers = draw(tensor.shape, generator=generator, dtype=torch.float64)
        tensor.data.copy_(low + width * numbers if width else numbers)

    for module in model.modules():
        if getattr(module, "running_var", None) is not None and hasattr(module, "eps"):
            fill(module.running_mean)
            fill(module.running_var, 0.5, 2.0)
            fill(module.weight, 0.5, 1.0)
            fill(module.bias)
    return model


ZOO: list[Entry] = []


def zoo(
    name: str,
    verdicts: Mapping[str, Verdict],
    run: Callable[..., Any],
    parts: Callable[[], Mapping[str, Any]],
    *shapes: Shape,
    tweak: Callable[[Any], Any] | None = None,
    dtype: torch.dtype = torch.float64,
) -> None:
    ZOO.append(Entry(name, verdicts, run, parts, shapes or (IMAGE,), tweak, dtype))


def conv(inputs: int = 4, outputs: int = 6, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, **options)


def bn(channels: int = 6, **options: Any) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, **options)


def let(use: Callable[..., Any], *values: Any) -> Any:
    """Name values inside an expression."""
    return use(*values)


def pair(**options: Any) -> dict[str, Any]:
    return {"conv": conv(**options), "bn": bn()}


def straight(m: Any, x: Tensor) -> Tensor:
    out: Tensor = m.bn(m.conv(x))
    return out


def flip_first(m: Any) -> None:
    m.bn.weight[0] *= -1


# -- a layer and its BatchNorm ------------------------------------------------------------------------

zoo("conv", {"bn": FOLDED}, straight, pair)
zoo("conv_without_bias", {"bn": FOLDED}, straight, lambda: pair(bias=False))
zoo("conv_grouped", {"bn": FOLDED}, straight, lambda: pair(groups=2, padding=1))
zoo("conv_depthwise", {"bn": FOLDED}, straight, lambda: {"conv": conv(4, 4, groups=4), "bn": bn(4)})
zoo("conv_string_padding", {"bn": FOLDED}, straight, lambda: pair(padding="same", padding_mode="reflect"))
zoo("conv_circular", {"bn": FOLDED}, straight, lambda: pair(padding=1, padding_mode="circular"))
zoo(
    "conv1d",
    {"bn": FOLDED},
    straight,
    lambda: {"conv": nn.Conv1d(4, 6, 3), "bn": nn.BatchNorm1d(6)},
    (2, 4, 9),
)
zoo(
    "conv3d",
    {"bn": FOLDED},
    straight,
    lambda: {"conv": nn.Conv3d(4, 6, 2), "bn": nn.BatchNorm3d(6)},
    (2, 4, 4, 4, 4),
)
zoo(
    "transposed_grouped",
    {"bn": FOLDED},
    straight,
    lambda: {"conv": nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, output_padding=1), "bn": bn()},
)
zoo("linear", {"bn": FOLDED}, straight, lambda: {"conv": nn.Linear(5, 6), "bn": nn.BatchNorm1d(6)}, (3, 5))
zoo(
    "linear_on_other_axis",
    {"bn": Reason.AXIS_MISMATCH},
    straight,
    lambda: {"conv": nn.Linear(6, 6), "bn": nn.BatchNorm1d(6)},
    (3, 6, 6),
)
zoo(
    "linear_flatten_bn",
    {"bn": FOLDED},
    lambda m, x: let(lambda y: m.bn(y.flatten(0, 1)).reshape_as(y), m.fc(x)),
    lambda: {"fc": nn.Linear(5, 6), "bn": nn.BatchNorm1d(6)},
    (2, 7, 5),
)
zoo(
    "linear_transposed_to_channels",
    {"bn": FOLDED},
    lambda m, x: m.bn(m.fc(x).transpose(1, 2)),
    lambda: {"fc": nn.Linear(5, 6), "bn": nn.BatchNorm1d(6)},
    (2, 7, 5),
)
zoo(
    "matmul_parameter",
    {"bn": Reason.CUSTOM_FORWARD},
    lambda m, x: m.bn(x @ m.weight + m.bias),
    lambda: {
        "weight": nn.Parameter(torch.randn(5, 6)),
        "bias": nn.Parameter(torch.randn(6)),
        "bn": nn.BatchNorm1d(6),
    },
    (3, 5),
)
zoo(
    "matmul_parameter_scale_only",
    {"bn": FOLDED},
    lambda m, x: m.bn(torch.mm(x, m.weight)),
    lambda: {"weight": nn.Parameter(torch.randn(5, 6)), "bn": nn.BatchNorm1d(6)},
    (3, 5),
    tweak=lambda m: (m.bn.bias.zero_(), m.bn.running_mean.zero_()),
)
zoo(
    "matmul_batch_of_matrices",
    {"bn": Reason.UNKNOWN_OP},
    lambda m, x: m.bn((x @ m.weight).transpose(1, 2)),
    lambda: {"weight": nn.Parameter(torch.randn(3, 5, 6)), "bn": nn.BatchNorm1d(6)},
    (3, 4, 5),
)
zoo(
    "matmul_vector",
    {"bn": Reason.REACHES_INPUT},
    lambda m, x: m.bn(x) @ m.weight,
    lambda: {"weight": nn.Parameter(torch.randn(5)), "bn": nn.BatchNorm1d(5)},
    (3, 5),
)
zoo(
    "matmul_of_data",
    {"bn": Reason.NONLINEAR},
    lambda m, a, b: m.bn(a @ b),
    lambda: {"bn": nn.BatchNorm1d(6)},
    (3, 5),
    (5, 6),
)
zoo(
    "double_norm",
    {"first": FOLDED, "second": FOLDED},
    lambda m, x: m.second(m.first(m.conv(x))),
    lambda: {"conv": conv(bias=False), "first": bn(), "second": bn()},
)
zoo(
    "created_bias_is_scaled_later",
    {"first": FOLDED, "second": FOLDED},
    lambda m, x: m.second(m.first(m.conv(x))),
    lambda: {"conv": conv(bias=False), "first": bn(), "second": bn()},
    tweak=lambda m: (m.second.bias.zero_(), m.second.running_mean.zero_()),
)
zoo(
    "created_bias_is_scaled_at_output",
    {"before": FOLDED, "after": FOLDED},
    lambda m, x: m.after(m.conv(m.before(x))),
    lambda: {"before": bn(4), "conv": conv(bias=False), "after": bn()},
    tweak=lambda m: (m.after.bias.zero_(), m.after.running_mean.zero_()),
)
zoo("zero_gamma", {"bn": FOLDED}, straight, pair, tweak=lambda m: m.bn.weight[:2].zero_())
zoo("negative_gamma", {"bn": FOLDED}, straight, pair, tweak=lambda m: m.bn.weight.neg_())
zoo("zero_variance", {"bn": FOLDED}, straight, pair, tweak=lambda m: m.bn.running_var.zero_())
zoo("affine_false", {"bn": FOLDED}, straight, lambda: {"conv": conv(), "bn": bn(affine=False)})
zoo(
    "gamma_without_beta",
    {"bn": FOLDED},
    straight,
    pair,
    tweak=lambda m: m.bn.register_parameter("bias", None),
)

# -- one thing used twice -----------------------------------------------------------------------------

zoo(
    "conv_twice_one_bn",
    {"bn": Reason.CALLED_MORE_THAN_ONCE},
    lambda m, x: (m.bn(m.conv(x)), m.conv(x + 1)),
    pair,
)
zoo(
    "conv_twice_two_bns",
    {"a": Reason.CALLED_MORE_THAN_ONCE, "b": Reason.CALLED_MORE_THAN_ONCE},
    lambda m, x: m.a(m.conv(x)) + m.b(m.conv(x + 1)),
    lambda: {"conv": conv(), "a": bn(), "b": bn()},
)
zoo(
    "block_twice",
    {"block.1": FOLDED},
    lambda m, x: m.block(m.block(x)),
    lambda: {"block": nn.Sequential(conv(4, 4, padding=1, bias=False), bn(4))},
)
zoo(
    "same_module_in_list",
    {"blocks.0.1": FOLDED},
    lambda m, x: m.blocks[2](m.blocks[1](m.blocks[0](x))),
    lambda: {"blocks": nn.ModuleList([nn.Sequential(conv(4, 4, padding=1), bn(4), nn.ReLU())] * 3)},
)
zoo(
    "registered_under_two_names",
    {"bn": FOLDED},
    lambda m, x: m.other_bn(m.other_conv(x)),
    lambda: let(lambda c, b: {"conv": c, "bn": b, "other_conv": c, "other_bn": b}, conv(), bn()),
)
zoo(
    "conv_two_consumers",
    {"bn": Reason.OUTPUT_USED_ELSEWHERE},
    lambda m, x: let(lambda y: m.bn(y) + y.relu(), m.conv(x)),
    pair,
)
zoo(
    "conv_two_bns",
    {"a": FOLDED, "b": Reason.OUTPUT_USED_ELSEWHERE},  # b takes the inverse in
    lambda m, x: let(lambda y: m.a(y) + m.b(y), m.conv(x)),
    lambda: {"conv": conv(), "a": bn(), "b": bn()},
)
zoo(
    "conv_also_output",
    {"bn": Reason.REACHES_OUTPUT},
    lambda m, x: let(lambda y: (m.bn(y), y), m.conv(x)),
    pair,
)
zoo(
    "conv_kept_on_self",
    {"bn": Reason.OUTPUT_ESCAPES},
    lambda m, x: let(lambda y: (setattr(m, "kept", y), m.bn(y))[1], m.conv(x)),
    pair,
)
zoo(
    "conv_in_dict_output",
    {"bn": Reason.REACHES_OUTPUT},
    lambda m, x: let(lambda y: {"features": [y], "out": m.bn(y)}, m.conv(x)),
    pair,
)
zoo(
    "item_of_conv",
    {"bn": Reason.OUTPUT_USED_ELSEWHERE},
    lambda m, x: let(lambda y: m.bn(y) * (2.0 if y.mean().item() > 0 else 3.0), m.conv(x)),
    pair,
)


def tie_weights(m: Any) -> None:
    m.d.weight = m.c.weight


def equal_norms(m: Any) -> None:
    m.b.load_state_dict(m.a.state_dict())


def two_convs(**options: Any) -> dict[str, Any]:
    return {"c": conv(**options), "d": conv(**options), "a": bn(), "b": bn()}


zoo(
    "weight_tied_one_bn",
    {"a": Reason.WEIGHT_SHARED, "b": Reason.NOT_OBSERVED},
    lambda m, x: m.a(m.c(x)) + m.d(x + 1),
    two_convs,
    tweak=tie_weights,
)
zoo(
    "weight_tied_both_bn",
    {"a": Reason.WEIGHT_SHARED, "b": Reason.WEIGHT_SHARED},
    lambda m, x: m.a(m.c(x)) + m.b(m.d(x + 1)),
    two_convs,
    tweak=tie_weights,
)
zoo(
    "weight_tied_equal_bns",
    {"a": Reason.WEIGHT_SHARED, "b": Reason.WEIGHT_SHARED},
    lambda m, x: m.a(m.c(x)) + m.b(m.d(x + 1)),
    two_convs,
    tweak=lambda m: (tie_weights(m), equal_norms(m)),
)
zoo(
    "weight_tied_same_bn",
    {"a": Reason.WEIGHT_SHARED, "b": Reason.NOT_OBSERVED},
    lambda m, x: m.a(m.c(x)) + m.a(m.d(x + 1)),
    lambda: two_convs(bias=False),
    tweak=tie_weights,
)
zoo(
    "weight_tied_same_bn_with_biases",
    {"a": Reason.WEIGHT_SHARED, "b": Reason.NOT_OBSERVED},
    lambda m, x: m.a(m.c(x)) + m.a(m.d(x + 1)),
    two_convs,
    tweak=tie_weights,
)
zoo(
    "weight_tied_to_idle_layer",
    {"a": Reason.WEIGHT_SHARED, "b": Reason.NOT_OBSERVED},
    lambda m, x: m.a(m.c(x)),
    two_convs,
    tweak=tie_weights,
)
zoo(
    "bias_tied_same_bn",
    {"a": Reason.WEIGHT_SHARED, "b": Reason.NOT_OBSERVED},
    lambda m, x: m.a(m.c(x)) + m.a(m.d(x + 1)),
    two_convs,
    tweak=lambda m: setattr(m.d, "bias", m.c.bias),
)
zoo(
    "bn_shared_by_two_convs",
    {"a": FOLDED, "b": Reason.NOT_OBSERVED},
    lambda m, x: m.a(m.c(x)) + m.a(m.d(x + 1)),
    two_convs,
)
zoo("bn_on_itself", {"bn": Reason.CALLED_MORE_THAN_ONCE}, lambda m, x: m.bn(m.bn(m.conv(x))), pair)
zoo(
    "gamma_tied_to_another_bn",
    {"a": Reason.NONLINEAR, "b": Reason.WEIGHT_SHARED, "c": Reason.NONLINEAR},
    lambda m, x: (m.b(m.a(x.tanh())).tanh(), m.c(x.sin()).tanh()),
    lambda: {"a": bn(4), "b": bn(4), "c": bn(4)},
    tweak=lambda m: (setattr(m.c, "weight", m.a.weight), setattr(m.c, "bias", m.b.bias)),
)
zoo(
    "bn_into_bn_that_stays",
    {"a": FOLDED, "b": Reason.NONLINEAR},
    lambda m, x: m.b(m.a(x.tanh())).tanh(),
    lambda: {"a": bn(4), "b": bn(4)},
)
zoo(
    "bn_into_bn_without_affine",
    {"a": FOLDED, "b": Reason.NONLINEAR},
    lambda m, x: m.b(m.a(x.tanh())).tanh(),
    lambda: {"a": bn(4, affine=False), "b": bn(4, affine=False)},
)
zoo(
    "bn_into_bn_called_twice",
    {"a": Reason.NONLINEAR, "b": Reason.NONLINEAR},
    lambda m, x: (m.b(m.a(x.tanh())).tanh(), m.b(x.sin()).tanh()),
    lambda: {"a": bn(4), "b": bn(4)},
)
zoo(
    "bn_behind_a_functional_one",
    {"a": Reason.FUNCTIONAL, "b": Reason.FUNCTIONAL},
    lambda m, x: m.b(F.batch_norm(x.tanh(), m.a.running_mean, m.a.running_var)).tanh(),
    lambda: {"a": bn(4), "b": bn(4)},
)
zoo(
    "bn_read_by_the_parent_too",
    {"bn": Reason.WEIGHT_SHARED},
    lambda m, x: m.bn(m.conv(x)) * m.bn.weight.view(1, -1, 1, 1),
    pair,
)
zoo(
    "weight_used_by_function",
    {"bn": Reason.CUSTOM_FORWARD},
    lambda m, x: m.bn(F.conv2d(x, m.conv.weight)),
    lambda: pair(bias=False),
)
zoo(
    "weight_and_bias_used_by_function",
    {"bn": FOLDED},
    lambda m, x: m.bn(F.conv2d(x, m.conv.weight, m.conv.bias)),
    pair,
)
zoo(
    "plain_list_of_layers",
    {"bn": FOLDED},
    lambda m, x: m.steps[1](m.steps[0](x)),
    lambda: let(lambda p: {**p, "steps": [p["conv"], p["bn"]]}, pair()),
)

# -- layers that are not what they seem ----------------------------------------------------------------


class Quiet(nn.BatchNorm2d):
    """A subclass without a forward."""


class Loud(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def forward_and_relu(self: nn.BatchNorm2d, x: Tensor) -> Tensor:
    return nn.BatchNorm2d.forward(self, x).relu()


zoo(
    "no_running_statistics",
    {"bn": Reason.BATCH_STATISTICS},
    straight,
    lambda: {"conv": conv(), "bn": bn(track_running_stats=False)},
)
zoo("left_in_train_mode", {"bn": Reason.BATCH_STATISTICS}, straight, pair, tweak=lambda m: m.bn.train())
zoo("subclass_without_forward", {"bn": FOLDED}, straight, lambda: {"conv": conv(), "bn": Quiet(6)})
zoo("subclass_with_forward", {"bn": FOLDED}, straight, lambda: {"conv": conv(), "bn": Loud(6)})
zoo(
    "forward_set_on_instance",
    {"bn": Reason.CUSTOM_FORWARD},
    straight,
    pair,
    tweak=lambda m: setattr(m.bn, "forward", types.MethodType(forward_and_relu, m.bn)),
)
zoo("sync_bn", {"bn": FOLDED}, straight, lambda: {"conv": conv(), "bn": nn.SyncBatchNorm(6)})
zoo("frozen_bn", {"bn": FOLDED}, straight, lambda: {"conv": conv(), "bn": FrozenBatchNorm2d(6)})
zoo("frozen_bn_act", {"bn": FOLDED}, straight, lambda: {"conv": conv(), "bn": FrozenBatchNormAct2d(6)})
zoo(
    "bn_act",
    {"bn": FOLDED},
    straight,
    lambda: {"conv": conv(bias=False), "bn": BatchNormAct2d(6, act_layer=nn.SiLU)},
)
zoo(
    "bn_act_before_conv",
    {"bn": Reason.REACHES_INPUT},
    lambda m, x: m.conv(m.bn(x)),
    lambda: {"conv": conv(), "bn": BatchNormAct2d(4)},
)
zoo(
    "functional_bn",
    {"bn": Reason.FUNCTIONAL},
    lambda m, x: F.batch_norm(m.conv(x), m.bn.running_mean, m.bn.running_var, m.bn.weight, m.bn.bias),
    pair,
)
zoo("instance_norm", {}, straight, lambda: {"conv": conv(), "bn": nn.InstanceNorm2d(6, affine=True)})
zoo(
    "weight_norm_old",
    {"bn": Reason.WEIGHT_COMPUTED},
    straight,
    lambda: {"conv": quietly(nn.utils.weight_norm, conv()), "bn": bn()},
)
zoo(
    "weight_norm",
    {"bn": Reason.WEIGHT_COMPUTED},
    straight,
    lambda: {"conv": parametrizations.weight_norm(conv()), "bn": bn()},
)
zoo(
    "spectral_norm",
    {"bn": Reason.WEIGHT_COMPUTED},
    straight,
    lambda: {"conv": parametrizations.spectral_norm(conv()), "bn": bn()},
)
zoo(
    "pruned",
    {"bn": Reason.WEIGHT_COMPUTED},
    straight,
    lambda: {"conv": prune.random_unstructured(conv(), "weight", 0.5), "bn": bn()},
)
zoo(
    "standardised_weight",
    {"bn": Reason.WEIGHT_COMPUTED},
    straight,
    lambda: {"conv": StdConv2d(4, 6, 3), "bn": bn()},
)
zoo(
    "parametrized_gamma",
    {"bn": Reason.WEIGHT_COMPUTED},
    straight,
    pair,
    tweak=lambda m: parametrize.register_parametrization(m.bn, "weight", nn.Softplus()),
)
zoo(
    "hook_on_conv",
    {"bn": Reason.HOOKED},
    straight,
    pair,
    tweak=lambda m: m.conv.register_forward_hook(lambda module, args, out: None),
)
zoo(
    "hook_changes_output",
    {"bn": Reason.NONLINEAR},
    straight,
    pair,
    tweak=lambda m: m.conv.register_forward_hook(lambda module, args, out: out.abs()),
)
zoo(
    "hook_on_conv_after_bn",
    {"bn": Reason.REACHES_INPUT},
    lambda m, x: m.conv(m.bn(x)),
    lambda: {"bn": bn(4), "conv": conv()},
    tweak=lambda m: m.conv.register_forward_pre_hook(lambda module, args: None),
)
zoo(
    "hook_on_bn",
    {"bn": Reason.HOOKED},
    straight,
    pair,
    tweak=lambda m: m.bn.register_forward_hook(lambda module, args, out: None),
)
zoo(
    "hook_on_container",
    {"bn": Reason.HOOKED},
    lambda m, x: m.bn(m.box(x)),
    lambda: {"box": nn.Sequential(nn.ReLU(), conv()), "bn": bn()},
    tweak=lambda m: m.box.register_forward_hook(lambda module, args, out: None),
)
zoo(
    "hook_sees_second_argument",
    {"late.bn": Reason.HOOKED},
    lambda m, x: m.late(x, m.conv(x)),
    lambda: {"conv": conv(padding=1), "late": Net(lambda m, x, y: m.bn(y), {"bn": bn()})},
    tweak=lambda m: m.late.register_forward_pre_hook(lambda module, args: None),
)
zoo(
    "layer_reached_through_a_closure",
    {"bn": Reason.HOOKED},
    lambda m, x: m.bn(m.early(x)),
    pair,
    tweak=lambda m: setattr(m, "early", lambda x: m.conv(x) * 1),
)
zoo(
    "never_called",
    {"bn": FOLDED, "spare.1": Reason.NOT_OBSERVED},
    straight,
    lambda: {**pair(), "spare": nn.Sequential(conv(), bn())},
)


def quietly(make: Callable[[nn.Module], nn.Module], module: nn.Module) -> nn.Module:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return make(module)


# -- on the way up --------------------------------------------------------------------------------------


def through(step: Callable[..., Any], channels: int = 6, **parts: Any) -> tuple[Any, Any]:
    """conv -> step -> BN."""
    return (
        lambda m, x: m.bn(step(m, m.conv(x))),
        lambda: {"conv": conv(), "bn": bn(channels), **{n: part() for n, part in parts.items()}},
    )


zoo("relu_between", {"bn": Reason.NONLINEAR}, *through(lambda m, y: y.relu()))
zoo(
    "relu_scale_only",
    {"bn": FOLDED},
    *through(lambda m, y: F.leaky_relu(y, 0.1)),
    tweak=lambda m: (m.bn.bias.zero_(), m.bn.running_mean.zero_()),
)
zoo(
    "relu_negative_scale",
    {"bn": Reason.NEGATIVE_SCALE},
    *through(lambda m, y: y.relu()),
    tweak=lambda m: (m.bn.bias.zero_(), m.bn.running_mean.zero_(), flip_first(m)),
)
zoo("average_pool", {"bn": FOLDED}, *through(lambda m, y: F.avg_pool2d(y, 2)))
zoo(
    "average_pool_counts_zeros",
    {"bn": Reason.SHIFT_AT_PADDING},
    *through(lambda m, y: F.avg_pool2d(y, 2, padding=1)),
)
zoo(
    "average_pool_uncounted",
    {"bn": FOLDED},
    *through(lambda m, y: F.avg_pool2d(y, 2, padding=1, ceil_mode=True, count_include_pad=False)),
)
zoo("adaptive_average_pool", {"bn": FOLDED}, *through(lambda m, y: F.adaptive_avg_pool2d(y, 4)))
zoo("max_pool", {"bn": FOLDED}, *through(lambda m, y: F.max_pool2d(y, 3, padding=1)))
zoo(
    "max_pool_negative",
    {"bn": Reason.NEGATIVE_SCALE},
    *through(lambda m, y: F.max_pool2d(y, 2)),
    tweak=flip_first,
)
zoo("adaptive_max_pool", {"bn": FOLDED}, *through(lambda m, y: F.adaptive_max_pool2d(y, 4)))
zoo("upsample", {"bn": FOLDED}, *through(lambda m, y: F.interpolate(y, scale_factor=2, mode="bicubic")))
zoo(
    "pixel_shuffle",
    {"bn": FOLDED},
    lambda m, x: m.bn(F.pixel_shuffle(m.conv(x), 2)),
    lambda: {"conv": conv(4, 12), "bn": bn(3)},
)
zoo("pixel_unshuffle", {"bn": Reason.AXIS_MISMATCH}, *through(lambda m, y: F.pixel_unshuffle(y, 2), 24))
zoo(
    "channel_shuffle",
    {"bn": FOLDED},
    *through(lambda m, y: y.view(2, 2, 3, 6, 6).transpose(1, 2).reshape(2, 6, 6, 6)),
)
zoo("channel_shuffle_op", {"bn": FOLDED}, *through(lambda m, y: F.channel_shuffle(y, 3)))
zoo(
    "chunk_one_part",
    {"bn": FOLDED},
    lambda m, x: let(lambda a, b: m.bn(a) + b.relu(), *m.conv(x).chunk(2, 1)),
    lambda: {"conv": conv(), "bn": bn(3)},
)
zoo(
    "slice_one_part",
    {"bn": Reason.OUTPUT_USED_ELSEWHERE},
    lambda m, x: let(lambda y: m.bn(y[:, 1:4]) + y[:, ::3].sum(1, keepdim=True), m.conv(x)),
    lambda: {"conv": conv(), "bn": bn(3)},
    tweak=None,
)
zoo(
    "slices_apart",
    {"bn": FOLDED},
    lambda m, x: let(lambda y: m.bn(y[:, 1:4]) + y[:, 4:].sum(1, keepdim=True), m.conv(x)),
    lambda: {"conv": conv(), "bn": bn(3)},
)
zoo("cropped_in_space", {"bn": FOLDED}, *through(lambda m, y: y[:, :, 1:, :-2]))
zoo(
    "cropped_but_read_whole",
    {"bn": Reason.OUTPUT_USED_ELSEWHERE},
    lambda m, x: let(lambda y: m.bn(y[:, :, 1:]).sum() + y.sum(), m.conv(x)),
    pair,
)
zoo(
    "two_crops_one_norm",
    {"bn": Reason.AXIS_MISMATCH},
    lambda m, x: let(lambda y: m.bn(y[:, :, :3]).sum() + y[:, :, 3:].sum(), m.conv(x)),
    pair,
)
zoo(
    "concat",
    {"bn": FOLDED},
    lambda m, x: m.bn(torch.cat([m.c(x), m.d(x)], 1)),
    lambda: {"c": conv(4, 2), "d": conv(4, 4), "bn": bn()},
)
zoo(
    "concat_shared_part",
    {"bn": Reason.OUTPUT_USED_ELSEWHERE},
    lambda m, x: let(lambda y: (m.bn(torch.cat([y, m.d(x)], 1)), y.relu())[0].sum() + y.sum(), m.c(x)),
    lambda: {"c": conv(4, 2), "d": conv(4, 4), "bn": bn()},
)
zoo(
    "concat_twice_the_same",
    {"bn": Reason.OUTPUT_USED_ELSEWHERE},
    lambda m, x: let(lambda y: m.bn(torch.cat([y, y], 1)), m.c(x)),
    lambda: {"c": conv(4, 3), "bn": bn()},
)
zoo(
    "add_of_two_convs",
    {"bn": FOLDED},
    lambda m, x: m.bn(m.c(x) + m.d(x)),
    lambda: {"c": conv(bias=False), "d": conv(bias=False), "bn": bn()},
)
zoo(
    "difference_of_two_convs",
    {"bn": FOLDED},
    lambda m, x: m.bn(m.c(x) - m.d(x)),
    lambda: {"c": conv(), "d": conv(), "bn": bn()},
)
zoo(
    "weighed_sum_whose_first_branch_takes_no_shift",
    {"bn": FOLDED},
    lambda m, x: m.bn(torch.sub(m.c(x).relu(), m.d(x), alpha=0.3)),
    lambda: {"c": conv(), "d": conv(), "bn": bn()},
)
zoo(
    "shift_past_a_weight_read_from_the_data",
    {"bn": FOLDED},
    lambda m, x: m.bn(torch.add(m.c(x), m.d(x), alpha=x.abs().max().item())),
    lambda: {"c": conv(), "d": conv(), "bn": bn()},
)
zoo(
    "shift_through_a_weight_read_from_the_data",
    {"bn": Reason.UNKNOWN_OP},
    lambda m, x: m.bn(torch.add(m.c(x).relu(), m.d(x), alpha=x.abs().max().item())),
    lambda: {"c": conv(), "d": conv(), "bn": bn()},
)
zoo("add_with_itself", {"bn": Reason.OUTPUT_USED_ELSEWHERE}, *through(lambda m, y: y + y))
zoo(
    "residual",
    {"bn": Reason.REACHES_INPUT},
    lambda m, x: m.bn(m.conv(x) + x),
    lambda: {"conv": conv(4, 4, padding=1), "bn": bn(4)},
)
zoo(
    "shift_to_the_second_branch",
    {"bn": FOLDED},
    lambda m, x: m.bn(m.c(x).relu() + m.d(x)),
    lambda: {"c": conv(), "d": conv(), "bn": bn()},
)
zoo(
    "constant_factor",
    {"bn": FOLDED},
    *through(lambda m, y: y * 0.3 / m.k, k=lambda: nn.Parameter(torch.tensor(3.0))),
)
zoo(
    "constant_added",
    {"bn": FOLDED},
    *through(lambda m, y: 2.0 + y - m.k, k=lambda: nn.Parameter(torch.arange(6.0).view(6, 1, 1))),
)
zoo("constant_subtracted_from", {"bn": FOLDED}, *through(lambda m, y: -y + 1))
zoo("subtracted_from_a_number", {"bn": FOLDED}, *through(lambda m, y: 1.5 - y))
zoo(
    "spatial_constant_added",
    {"bn": Reason.AXIS_MISMATCH},
    *through(lambda m, y: y + m.k, k=lambda: nn.Parameter(torch.randn(1, 1, 6, 6))),
)
zoo(
    "times_zero",
    {"bn": Reason.ZERO_SCALE},
    *through(lambda m, y: y * m.k, k=lambda: nn.Parameter(torch.tensor([0.0, 1, 1, 1, 1, 1]).view(6, 1, 1))),
)
zoo(
    "layer_scale",
    {"bn": FOLDED},
    *through(lambda m, y: y * m.k.view(1, -1, 1, 1), k=lambda: nn.Parameter(torch.rand(6))),
)
zoo("gate", {"bn": Reason.NONLINEAR}, *through(lambda m, y: y * y.mean((2, 3), keepdim=True).sigmoid()))
zoo(
    "random_noise_added",
    {"bn": Reason.AXIS_MISMATCH},
    *through(lambda m, y: y + torch.randn(1, 6, 1, 1, dtype=y.dtype)),
)
zoo("random_noise_everywhere", {"bn": Reason.UNKNOWN_OP}, *through(lambda m, y: y + torch.randn_like(y)))
zoo(
    "random_noise_in_place",
    {"bn": Reason.UNKNOWN_OP},
    *through(lambda m, y: y + torch.empty_like(y).normal_()),
)
zoo(
    "random_factor",
    {"bn": Reason.NONLINEAR},
    *through(lambda m, y: y * torch.rand(1, 6, 1, 1, dtype=y.dtype)),
)
zoo(
    "factor_from_the_data",
    {"bn": Reason.UNKNOWN_OP},
    lambda m, x: m.bn(m.conv(x) * x.abs().max().item()),
    pair,
)
zoo(
    "rounded_to_integers",
    {"bn": Reason.NONLINEAR},
    *through(lambda m, y: (y * 4).to(torch.int32).to(y.dtype)),
)
zoo("rounded_to_float16", {"bn": Reason.NONLINEAR}, *through(lambda m, y: y.half().to(y.dtype)))
zoo(
    "rounded_to_float32_in_a_float32_net",
    {"bn": FOLDED},
    *through(lambda m, y: y.double().float()),
    dtype=torch.float32,
)
zoo(
    "computed_in_float32_in_a_float16_net",
    {"bn": FOLDED},
    lambda m, x: m.bn(F.avg_pool2d(m.conv(x).float(), 2).half()),
    pair,
    dtype=torch.float16,
)
zoo(
    "permuted",
    {"bn": FOLDED},
    lambda m, x: m.bn(m.conv(x).permute(0, 2, 3, 1).reshape(-1, 6)),
    lambda: {"conv": conv(), "bn": nn.BatchNorm1d(6)},
)
zoo("dropout", {"bn": FOLDED}, *through(lambda m, y: m.drop(y), drop=lambda: nn.Dropout2d(0.5)))
zoo(
    "dropout_left_in_train_mode",
    {"bn": Reason.UNKNOWN_OP},
    *through(lambda m, y: m.drop(y), drop=lambda: nn.Dropout(0.5)),
    tweak=lambda m: m.drop.train(),
)
zoo(
    "pool_of_the_wrong_rank",
    {"bn": Reason.AXIS_MISMATCH},
    lambda m, x: m.bn(F.adaptive_avg_pool2d(m.conv(x), (4, 3))),
    lambda: {"conv": nn.Conv1d(4, 8, 1), "bn": nn.BatchNorm1d(4)},
    (2, 4, 6),
)
zoo("unbatched", {"bn": FOLDED}, lambda m, x: m.bn(F.avg_pool2d(m.conv(x), 2).unsqueeze(0)), pair, (4, 8, 8))
zoo(
    "expanded",
    {"bn": FOLDED},
    *through(lambda m, y: y.mean((2, 3), keepdim=True).expand(-1, -1, 4, 4)),
)
zoo("many_shuffles", {"bn": FOLDED}, *through(lambda m, y: shuffled(y)))


def shuffled(y: Tensor) -> Tensor:
    for _ in range(6):
        a, b = y.chunk(2, 1)
        y = torch.cat([b, a], 1)
    return y


# -- in place ------------------------------------------------------------------------------------------

zoo("activation_in_place", {"bn": FOLDED}, lambda m, x: F.relu(m.bn(m.conv(x)), inplace=True) + 1, pair)
zoo(
    "residual_in_place",
    {"bn": FOLDED},
    lambda m, x: m.bn(m.conv(x)).add_(x),
    lambda: {"conv": conv(4, 4, padding=1), "bn": bn(4)},
)
zoo(
    "overwritten_after_bn",
    {"bn": Reason.OUTPUT_USED_ELSEWHERE},
    lambda m, x: let(lambda y: (m.bn(y), y.relu_())[0] + y, m.conv(x)),
    pair,
)
zoo(
    "overwritten_through_a_view",
    {"bn": Reason.UNKNOWN_OP},
    lambda m, x: let(lambda y: (y[:, :2].relu_(), m.bn(y))[1], m.conv(x)),
    pair,
)
zoo("scaled_in_place", {"bn": FOLDED}, lambda m, x: m.bn(m.conv(x).mul_(0.5)), pair)
zoo(
    "shared_value_written_after_bn",
    {"bn": Reason.OUTPUT_USED_ELSEWHERE},
    lambda m, x: let(lambda y: m.head(m.bn(y).add_(1.0)) + y[:, :, 2:, 2:], x.tanh()),
    lambda: {"bn": bn(4), "head": conv(4, 4)},
)
zoo(
    "identity_bn_guards_a_shared_value",
    {"bn": Reason.OUTPUT_USED_ELSEWHERE},
    lambda m, x: let(lambda y: F.relu(m.bn(y), inplace=True) + y, m.conv(x)),
    pair,
    tweak=lambda m: (m.bn.reset_parameters(), m.bn.running_var.fill_(1 - m.bn.eps)),
)
zoo(
    "overwritten_before_its_reader_runs",
    {"bn": Reason.OUTPUT_USED_ELSEWHERE},
    lambda m, x: let(lambda y: let(lambda z: (y.relu_(), m.head(z))[1], m.bn(y)), x.tanh()),
    lambda: {"bn": bn(4), "head": conv(4, 4)},
)
zoo(
    "written_through_two_views",
    {"bn": Reason.OUTPUT_USED_ELSEWHERE},
    lambda m, x: let(
        lambda y: m.head(m.bn(y.view(2, 4, 8, 8)).permute(0, 1, 3, 2).add_(1.0)) + y[:, :, 2:, 2:], x.tanh()
    ),
    lambda: {"bn": bn(4), "head": conv(4, 4)},
)
for step, seen_again in (
    ("flatten", lambda y: y.flatten(2).unflatten(2, (8, 8))),
    ("unsqueeze", lambda y: y[None][0]),
    ("squeeze", lambda y: y.view(1, 2, 4, 8, 8).squeeze(0)),
    ("ravel", lambda y: y.ravel().view(2, 4, 8, 8)),
    ("mH", lambda y: y.mH),
    ("einsum", lambda y: torch.einsum("nchw->ncwh", y)),
    ("diagonal", lambda y: y[..., None, None].diagonal(0, -1, -2)[..., 0]),
):
    zoo(
        f"written_through_{step}",
        {"bn": Reason.OUTPUT_USED_ELSEWHERE},
        lambda m, x, view=seen_again: let(
            lambda y: m.head(m.bn(view(y)).add_(1.0)) + y[:, :, 2:, 2:], x.tanh()
        ),
        lambda: {"bn": bn(4), "head": conv(4, 4)},
    )
zoo(
    "written_past_an_earlier_write",
    {"bn": Reason.OUTPUT_USED_ELSEWHERE},
    lambda m, x: let(
        lambda y: let(
            lambda turned: (y.relu_(), let(lambda z: (y.sigmoid_(), m.head(z))[1], m.bn(turned)))[1], y.mT
        ),
        x.tanh(),
    ),
    lambda: {"bn": bn(4), "head": conv(4, 4)},
)
zoo(
    "shared_value_read_only",
    {"bn": FOLDED},
    lambda m, x: let(lambda y: m.head(m.bn(y).add(1.0)) + y[:, :, 2:, 2:], x.tanh()),
    lambda: {"bn": bn(4), "head": conv(4, 4)},
)
zoo(
    "input_written_after_bn",
    {"bn": Reason.OUTPUT_USED_ELSEWHERE},
    lambda m, x: m.conv(m.bn(x).mul_(2.0)),
    lambda: {"bn": bn(4), "conv": conv()},
)

# -- on the way down -----------------------------------------------------------------------------------


def before(step: Callable[..., Any], **options: Any) -> tuple[Any, Any]:
    """BN -> step -> conv."""
    return lambda m, x: m.conv(step(m, m.bn(x))), lambda: {"bn": bn(4), "conv": conv(**options)}


zoo("before_conv", {"bn": FOLDED}, *before(lambda m, y: y))
zoo("before_grouped_conv", {"bn": FOLDED}, *before(lambda m, y: y, groups=2, bias=False))
zoo("before_zero_padding", {"bn": Reason.REACHES_INPUT}, *before(lambda m, y: y, padding=1))
zoo(
    "before_zero_padding_no_shift",
    {"bn": FOLDED},
    *before(lambda m, y: y, padding=1),
    tweak=lambda m: (m.bn.bias.zero_(), m.bn.running_mean.zero_()),
)
zoo("before_reflect", {"bn": FOLDED}, *before(lambda m, y: y, padding=1, padding_mode="reflect"))
zoo("before_replicate", {"bn": FOLDED}, *before(lambda m, y: y, padding=2, padding_mode="replicate"))
zoo("before_circular", {"bn": FOLDED}, *before(lambda m, y: y, padding=1, padding_mode="circular"))
zoo("before_zeros_then_valid", {"bn": Reason.REACHES_INPUT}, *before(lambda m, y: F.pad(y, (1, 1, 1, 1))))
zoo("before_pointwise_same", {"bn": FOLDED}, *before(lambda m, y: y, kernel=1, padding="same"))
zoo("before_pointwise_padded", {"bn": Reason.REACHES_INPUT}, *before(lambda m, y: y, kernel=1, padding=1))
zoo("before_max_pool", {"bn": FOLDED}, *before(lambda m, y: F.max_pool2d(y, 3, 1, 1)))
zoo("before_relu", {"bn": Reason.REACHES_INPUT}, *before(lambda m, y: y.relu()))
zoo(
    "before_transposed",
    {"bn": Reason.REACHES_INPUT},
    lambda m, x: m.conv(m.bn(x)),
    lambda: {"bn": bn(4), "conv": nn.ConvTranspose2d(4, 6, 2, stride=2)},
)
zoo(
    "before_transposed_pointwise",
    {"bn": FOLDED},
    lambda m, x: m.conv(m.bn(x)),
    lambda: {"bn": bn(4), "conv": nn.ConvTranspose2d(4, 6, 1, groups=2)},
)
zoo(
    "before_transposed_with_hole",
    {"bn": Reason.REACHES_INPUT},
    lambda m, x: m.conv(m.bn(x)),
    lambda: {"bn": bn(4), "conv": nn.ConvTranspose2d(4, 6, 1, dilation=2, output_padding=1)},
)
zoo(
    "before_two_convs",
    {"bn": FOLDED},
    lambda m, x: let(lambda y: m.c(y) + m.d(y), m.bn(x)),
    lambda: {"bn": bn(4), "c": conv(), "d": conv(bias=False)},
)
zoo(
    "before_conv_and_output",
    {"bn": Reason.REACHES_INPUT},
    lambda m, x: let(lambda y: (m.conv(y), y), m.bn(x)),
    lambda: {"bn": bn(4), "conv": conv()},
)
zoo(
    "before_pool_and_linear",
    {"bn": FOLDED},
    lambda m, x: m.fc(torch.flatten(F.adaptive_avg_pool2d(m.bn(x), 1), 1)),
    lambda: {"bn": bn(4), "fc": nn.Linear(4, 3)},
)
zoo(
    "before_flatten_and_linear",
    {"bn": FOLDED},
    lambda m, x: m.fc(m.bn(x).flatten(1)),
    lambda: {"bn": bn(4), "fc": nn.Linear(4 * 64, 3)},
)
zoo(
    "before_matmul",
    {"bn": Reason.REACHES_INPUT},
    lambda m, x: m.bn(x) @ m.weight,
    lambda: {"bn": nn.BatchNorm1d(5), "weight": nn.Parameter(torch.randn(5, 6))},
    (3, 5),
)
zoo(
    "before_linear_weight_by_matmul",
    {"bn": Reason.REACHES_INPUT},
    lambda m, x: m.bn(x) @ m.fc.weight,
    lambda: {"bn": nn.BatchNorm1d(5), "fc": nn.Linear(6, 5, bias=False)},
    (3, 5),
)
zoo(
    "before_square_of_itself",
    {"bn": Reason.REACHES_INPUT},
    lambda m, x: m.conv(let(lambda y: y * y, m.bn(x))),
    lambda: {"bn": bn(4), "conv": conv()},
)
zoo(
    "before_concat",
    {"bn": FOLDED},
    lambda m, x: m.conv(torch.cat([m.bn(x), x.tanh()], 1)),
    lambda: {"bn": bn(4), "conv": conv(8)},
)
zoo(
    "before_residual",
    {"bn": Reason.REACHES_INPUT},
    lambda m, x: m.conv(m.bn(x) + x),
    lambda: {"bn": bn(4), "conv": conv()},
)
zoo(
    "split_scale_up_shift_down",
    {"bn": FOLDED},
    lambda m, x: m.out(m.bn(m.conv(x).relu()) + x[:, :, 1:-1, 1:-1]),
    lambda: {"conv": conv(4, 4), "bn": bn(4), "out": conv(4, 4)},
)
zoo(
    "split_refused_at_padding",
    {"bn": Reason.NONLINEAR},
    lambda m, x: m.out(m.bn(m.conv(x).relu())),
    lambda: {"conv": conv(4, 4), "bn": bn(4), "out": conv(4, 4, padding=1)},
)
zoo(
    "split_shift_up_scale_down",
    {"bn": FOLDED},
    lambda m, x: m.out(m.bn(m.conv(x) + x.tanh()).mul(1.0)),
    lambda: {"conv": conv(4, 4, padding=1), "bn": bn(4), "out": conv(4, 4, padding=1)},
)
zoo("returned", {"bn": FOLDED}, lambda m, x: {"out": [m.bn(m.conv(x))]}, pair)

# -- bad numbers ---------------------------------------------------------------------------------------

zoo(
    "nan_mean",
    {"bn": Reason.BAD_STATISTICS},
    straight,
    pair,
    tweak=lambda m: m.bn.running_mean[1:2].fill_(torch.nan),
)
zoo(
    "infinite_gamma",
    {"bn": Reason.BAD_STATISTICS},
    straight,
    pair,
    tweak=lambda m: m.bn.weight[1:2].fill_(torch.inf),
)
zoo(
    "negative_variance",
    {"bn": Reason.BAD_STATISTICS},
    straight,
    pair,
    tweak=lambda m: m.bn.running_var[2:3].fill_(-1e-9),
)
zoo(
    "half_overflow_of_weight",
    {"bn": Reason.OVERFLOW},
    straight,
    pair,
    dtype=torch.float16,
    tweak=lambda m: (m.bn.weight.fill_(6e4), m.conv.weight.fill_(10.0), m.bn.running_var.fill_(1.0)),
)
zoo(
    "half_overflow_of_bias",
    {"bn": Reason.OVERFLOW},
    straight,
    pair,
    dtype=torch.float16,
    tweak=lambda m: (m.bn.weight.fill_(1e3), m.conv.bias.fill_(1e3), m.bn.running_var.fill_(1.0)),
)
zoo(
    "half_overflow_in_two_steps",
    {"first": FOLDED, "second": Reason.OVERFLOW},
    lambda m, x: m.second(m.first(m.conv(x))),
    lambda: {"conv": conv(), "first": bn(), "second": bn()},
    dtype=torch.float16,
    tweak=lambda m: [(b.weight.fill_(1e3), b.running_var.fill_(1.0)) for b in (m.first, m.second)],
)
zoo(
    "half_overflow_downstream",
    {"bn": Reason.OVERFLOW},
    lambda m, x: m.out(m.bn(x.tanh())),
    lambda: {"bn": bn(4), "out": conv(4, 6)},
    dtype=torch.float16,
    tweak=lambda m: (m.bn.weight.fill_(6e4), m.out.weight.fill_(10.0), m.bn.running_var.fill_(1.0)),
)
