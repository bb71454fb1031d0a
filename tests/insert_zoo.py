"""Small nets in the styles people write, each with the sites and skips it must get beside it.

Every class is at module level, so that a whole modified model can be pickled.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from bntool.core.reasons import Reason

IMAGE = (2, 3, 8, 8)


@dataclasses.dataclass(frozen=True)
class Net:
    """`sites`: layer -> form. `ends`: forms of sites whose first form breaks the model, "" where all do."""

    build: Callable[[], nn.Module]
    sites: dict[str, str]
    skips: dict[str, Reason]
    shape: tuple[int, ...]
    options: dict[str, Any]
    ends: dict[str, str]
    dtype: torch.dtype
    pickles: bool
    channels: dict[str, int]


ZOO: dict[str, Net] = {}


def zoo(
    sites: dict[str, str] | None = None,
    skips: dict[str, Reason] | None = None,
    *,
    head: bool = True,
    shape: tuple[int, ...] = IMAGE,
    ends: dict[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
    pickles: bool = True,
    channels: dict[str, int] | None = None,
    **options: Any,
) -> Callable[[Any], Any]:
    """Add a net; `head` says that its last layer is `head`, with no activation after it."""

    def add(build: Any) -> Any:
        expected = {"head": Reason.NO_ACTIVATION} if head else {}
        expected.update(skips or {})
        ZOO[build.__name__] = Net(
            build, sites or {}, expected, shape, options, ends or {}, dtype, pickles, channels or {}
        )
        return build

    return add


def conv(inputs: int = 3, outputs: int = 4, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


class OneConv(nn.Module):
    """`conv1`, then `head`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv()
        self.head = conv(4, 2)


class OneConvAct(OneConv):
    """`conv1`, `act`, then `head`."""

    def __init__(self) -> None:
        super().__init__()
        self.act: nn.Module = nn.ReLU()


# -- activations as people call them --------------------------------------------------------------------


@zoo({"conv1": "subclass"})
class FunctionalRelu(OneConv):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv1(x)))


@zoo({"conv1": "subclass"})
class TorchRelu(OneConv):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv1(x)))


@zoo({"conv1": "subclass"})
class MethodRelu(OneConv):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv1(x).relu())


@zoo({"conv1": "subclass"})
class InplaceStatement(OneConv):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        y.relu_()
        return self.head(y)


@zoo({"conv1": "subclass"})
class FunctionalInplaceStatement(OneConv):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        F.relu(y, inplace=True)
        return self.head(y)


@zoo({"conv1": "wrap"})
class ReluModule(OneConvAct):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.conv1(x)))


@zoo({"conv1": "wrap"})
class KeywordCalls(OneConvAct):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(input=self.act(input=self.conv1(input=x)))


@zoo({"conv1": "subclass", "conv2": "subclass"})
class SharedRelu(OneConvAct):
    def __init__(self) -> None:
        super().__init__()
        self.conv2 = conv(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.conv2(self.act(self.conv1(x)))))


@zoo({"conv1": "subclass"})
class ClampAsRelu(OneConv):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv1(x).clamp(min=0))


@zoo({"conv1": "subclass"}, activations=("relu6",))
class ClampAsRelu6(OneConv):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.clamp(self.conv1(x), 0, 6))


@zoo({}, {"conv1": Reason.OTHER_ACTIVATION})
class PreluNotAskedFor(OneConvAct):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.conv1(x)))


# An activation with parameters keeps its keys: it is not wrapped.
@zoo({"conv1": "subclass"}, activations=("prelu",))
class Prelu(PreluNotAskedFor):
    pass


@zoo({}, {"conv1": Reason.OTHER_ACTIVATION})
class SiluNotAskedFor(OneConv):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.silu(self.conv1(x)))


@zoo({"conv1": "subclass"}, activations=("relu", "silu"))
class Silu(SiluNotAskedFor):
    pass


@zoo({"conv1": "wrap"}, activations=("any",))
class Hardswish(OneConvAct):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.Hardswish(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.conv1(x)))


@zoo({"0": "sequential"}, {"2": Reason.NO_ACTIVATION}, head=False, activations=("any",))
def gated_linear_unit() -> nn.Module:
    return nn.Sequential(conv(), nn.GLU(1), conv(2, 2))


# A gated linear unit halves the channels, so that what follows it has half of them.
@zoo(
    {"0": "sequential"},
    {"2": Reason.NO_ACTIVATION},
    head=False,
    channels={"0": 2},
    activations=("glu",),
    position="after",
)
def normed_after_gated_linear_unit() -> nn.Module:
    return gated_linear_unit()


@zoo({}, {"conv1": Reason.OTHER_ACTIVATION})
class SwishByHand(OneConv):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        return self.head(y * torch.sigmoid(y))


@zoo({}, {"gate": Reason.OTHER_ACTIVATION})
class SigmoidGate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = conv(3, 3)
        self.head = conv(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x * torch.sigmoid(self.gate(x)))


# -- containers -----------------------------------------------------------------------------------------


@zoo({"0": "sequential", "2": "sequential"}, {"4": Reason.NO_ACTIVATION}, head=False)
def plain_sequential() -> nn.Module:
    return nn.Sequential(conv(), nn.ReLU(inplace=True), conv(4, 4), nn.ReLU(inplace=True), conv(4, 2))


@zoo({"0": "sequential", "2": "sequential"}, {"4": Reason.NO_ACTIVATION}, head=False, keep_keys=True)
def sequential_with_kept_keys() -> nn.Module:
    return plain_sequential()


@zoo(
    {"0.0": "sequential", "0.2.0": "sequential", "1.0": "sequential"},
    {"1.2": Reason.NO_ACTIVATION},
    head=False,
)
def nested_sequential() -> nn.Module:
    inner = nn.Sequential(conv(4, 4), nn.ReLU())
    return nn.Sequential(
        nn.Sequential(conv(), nn.ReLU(), inner, nn.MaxPool2d(2)),
        nn.Sequential(conv(4, 4), nn.ReLU(), conv(4, 2)),
    )


@zoo({"stem": "sequential"})
def named_sequential() -> nn.Module:
    return nn.Sequential(OrderedDict(stem=conv(), act=nn.ReLU(), stem_bn=nn.Dropout(), head=conv(4, 2)))


class ReversedReading(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        for module in list(self):
            input = module(input)  # noqa: A001
        return input + 0


@zoo({"0": "wrap"}, {"2": Reason.NO_ACTIVATION}, head=False)
def sequential_with_own_forward() -> nn.Module:
    return ReversedReading(conv(), nn.ReLU(), conv(4, 2))


class HasFeatures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(conv(), nn.ReLU(), conv(4, 4), nn.ReLU())
        self.head = conv(4, 2)


@zoo({"features.0": "wrap", "features.2": "wrap"})
class IndexedSequential(HasFeatures):
    def forward(self, x: Tensor) -> Tensor:
        f = self.features
        return self.head(f[3](f[2](f[1](f[0](x)))))


@zoo({"features.0": "wrap", "features.2": "wrap"})
class SlicedSequential(HasFeatures):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features[2:](self.features[:2](x)))


# The forward counts on the numbering: the renumbered model fails, and the next form is taken.
@zoo(
    {"features.0": "sequential", "features.2": "sequential"},
    ends={"features.0": "wrap", "features.2": "wrap"},
)
class CalledAndIndexedSequential(HasFeatures):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x)) * self.features[2].weight.new_ones(())


# No activation is of its class any more once it is wrapped, and nothing is returned at all.
@zoo(
    {"features.0": "wrap", "features.2": "wrap"},
    ends={"features.0": "subclass", "features.2": "subclass"},
    skips={"head": Reason.NOT_OBSERVED},
)
class CollectedByClass(HasFeatures):
    def forward(self, x: Tensor) -> list[Tensor]:
        found = []
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                found.append(x)
        return found


@zoo({"convs.0": "subclass", "convs.1": "subclass"})
class ModuleListLoop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([conv(), conv(4, 4)])
        self.head = conv(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.convs:
            x = F.relu(layer(x))
        return self.head(x)


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = conv(inputs, outputs, bias=False)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))


@zoo({"blocks.a.conv": "wrap", "blocks.b.conv": "wrap"})
class ModuleDictOfBlocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({"a": Block(3, 4), "b": Block(4, 4)})
        self.head = conv(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks["b"](self.blocks["a"](x)))


@zoo({"squeeze": "wrap", "left": "wrap", "right": "wrap"})
class Fire(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.squeeze, self.squeeze_act = conv(), nn.ReLU(inplace=True)
        self.left, self.left_act = conv(4, 4), nn.ReLU(inplace=True)
        self.right, self.right_act = conv(4, 4), nn.ReLU(inplace=True)
        self.head = conv(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze_act(self.squeeze(x))
        return self.head(torch.cat([self.left_act(self.left(x)), self.right_act(self.right(x))], 1))


# Modules reached through a plain list are not found by the names that were exchanged: no form holds.
@zoo({"conv1": "wrap"}, ends={"conv1": ""})
class PlainListOfModules(OneConvAct):
    def __init__(self) -> None:
        super().__init__()
        self.order = [self.conv1, self.act, self.head]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.order:
            x = layer(x)
        return x


# -- slots, names, sharing ------------------------------------------------------------------------------


@zoo({"conv1": "identity"})
class IdentitySlot(OneConvAct):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.norm(self.conv1(x))))


@zoo({"conv1": "identity"})
class IdentityUnderTwoNames(IdentitySlot):
    def __init__(self) -> None:
        super().__init__()
        self.bn1 = self.norm

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.bn1(self.conv1(x))))


@zoo({"conv1": "subclass"})
class IdentitySharedByTwoLayers(OneConv):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.head(F.relu(self.norm(self.conv1(x)))))


@zoo({"conv1": "wrap"})
class ActivationUnderTwoNames(OneConvAct):
    def __init__(self) -> None:
        super().__init__()
        self.relu = self.act

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu(self.conv1(x)))


@zoo({"conv1": "subclass"})
class ConvUnderTwoNames(OneConv):
    def __init__(self) -> None:
        super().__init__()
        self.stem = self.conv1

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.stem(x)))


@zoo({"features.0": "sequential", "features.2": "sequential"})
class SequentialUnderTwoNames(HasFeatures):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = self.features

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


@zoo({"0": "sequential", "2": "subclass", "4": "subclass"}, {"6": Reason.NO_ACTIVATION}, head=False)
def sequential_with_a_repeated_relu() -> nn.Module:
    again = nn.ReLU()
    return nn.Sequential(conv(), nn.ReLU(), conv(4, 4), again, conv(4, 4), again, conv(4, 2))


@zoo({"conv1": "subclass", "conv2": "subclass"})
class TiedWeights(OneConv):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(3, 3), conv(3, 3)
        self.conv2.weight = self.conv1.weight
        self.head = conv(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv2(F.relu(self.conv1(x)))))


@zoo({}, {"conv1": Reason.CALLED_MORE_THAN_ONCE})
class ConvCalledTwice(OneConv):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv1(x)) + F.relu(self.conv1(x.flip(-1))))


@zoo({}, {"conv1": Reason.CALLED_MORE_THAN_ONCE})
class BlockCalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Sequential(conv(3, 3), nn.ReLU())
        self.conv1 = self.step[0]
        self.head = conv(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = self.step(x)
        return self.head(x)


ZOO["BlockCalledTwice"].skips["step.0"] = ZOO["BlockCalledTwice"].skips.pop("conv1")


# -- activations written out ----------------------------------------------------------------------------


WRITTEN_OUT = {
    "SwishModule": ["sigmoid", "mul"],
    "SwishInPlace": ["sigmoid", "mul"],
    "sequential_with_hardswish": ["add", "mul"],
    "GeluByTanh": ["mul", "pow", "add"],
    "sequential_with_a_norm_after_swish": ["conv"],
}
"""What reads the value of each, op by op."""


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class HardSwishBySix(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * F.relu6(x + 3) / 6


@zoo({"conv1": "wrap"}, activations=("silu",))
class SwishModule(OneConv):
    def __init__(self) -> None:
        super().__init__()
        self.act = Swish()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.conv1(x)))


@zoo({"0": "sequential"}, {"2": Reason.NO_ACTIVATION}, head=False, activations=("any",))
def sequential_with_hardswish() -> nn.Module:
    return nn.Sequential(conv(), HardSwishBySix(), conv(4, 2))


@zoo({"0": "sequential"}, {"2": Reason.NO_ACTIVATION}, head=False, activations=("any",), position="after")
def sequential_with_a_norm_after_swish() -> nn.Module:
    return nn.Sequential(conv(), Swish(), conv(4, 2))


@zoo({}, {"conv1": Reason.OUTPUT_USED_ELSEWHERE}, activations=("any",))
class GateLeftAlone(OneConv):
    """The gate is computed and not used."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        torch.sigmoid(y)
        return self.head(y * 2)


@zoo({"conv1": "subclass"}, activations=("silu",))
class SwishInPlace(OneConv):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        return self.head(y.mul_(y.sigmoid()))


@zoo({"conv1": "subclass"}, activations=("any",))
class GeluByTanh(OneConv):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        return self.head(0.5 * y * (1 + torch.tanh(0.8 * (y + 0.04 * y.pow(3)))))


@zoo({}, {"conv1": Reason.OUTPUT_USED_ELSEWHERE}, activations=("any",))
class GateKept(OneConv):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv1(x)
        gate = torch.sigmoid(y)
        return self.head(y * gate), gate


@zoo({}, {"conv1": Reason.OUTPUT_USED_ELSEWHERE}, activations=("any",))
class GatedByTheMean(OneConv):
    """Squeeze and excite: the gate is no function of each number alone."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        return self.head(y * torch.sigmoid(y.mean((2, 3), keepdim=True)))


@zoo({}, {"conv1": Reason.OUTPUT_USED_ELSEWHERE}, activations=("any",))
class GatedByTheInput(OneConv):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        return self.head(y * torch.sigmoid(y + x.mean()))


# -- what stands between or beside ----------------------------------------------------------------------


@zoo({"conv1": "wrap"})
class DropoutBetween(OneConvAct):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout2d(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.drop(self.conv1(x))))


@zoo({}, {"conv1": Reason.NO_ACTIVATION})
class MaxpoolBetween(OneConv):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(F.max_pool2d(self.conv1(x), 2)))


@zoo({}, {"conv1": Reason.NO_ACTIVATION})
class ViewBetween(OneConv):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        return self.head(F.relu(y.view(y.shape[0], -1)).view_as(y))


@zoo({}, {"conv1": Reason.NO_ACTIVATION, "conv2": Reason.NO_ACTIVATION})
class SumThenRelu(OneConv):
    def __init__(self) -> None:
        super().__init__()
        self.conv2 = conv()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        y += self.conv2(x)
        return self.head(F.relu(y))


@zoo({}, {"conv1": Reason.NO_ACTIVATION, "conv2": Reason.NO_ACTIVATION})
class ConcatThenRelu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.head = conv(), conv(), conv(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(torch.cat([self.conv1(x), self.conv2(x)], 1)))


@zoo({}, {"conv1": Reason.OUTPUT_USED_ELSEWHERE})
class Residual(OneConv):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        return self.head(F.relu(y) + y)


@zoo({}, {"conv1": Reason.OUTPUT_USED_ELSEWHERE})
class TwoActivations(OneConv):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        return self.head(torch.cat([F.relu(y[:, :2]), F.relu(-y[:, 2:])], 1))


@zoo({}, {"conv1": Reason.OUTPUT_USED_ELSEWHERE})
class SliceWritten(OneConv):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        y[:, 0] = 0
        return self.head(F.relu(y))


@zoo({}, {"conv1": Reason.OUTPUT_USED_ELSEWHERE})
class BranchOnTheData(OneConv):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        if y.mean() > 100:
            y = -y
        return self.head(F.relu(y))


@zoo({}, {"conv1": Reason.OUTPUT_USED_ELSEWHERE})
class ReadByNumpy(OneConv):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        return self.head(F.relu(y)) + float(y.detach().numpy().mean())


@zoo({"conv1": "subclass"})
class OnlyItsShapeIsRead(OneConv):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        return self.head(F.relu(y) + torch.zeros_like(y) + y.new_ones(y.shape[1:]))


@zoo({}, {"other": Reason.NOT_OBSERVED, "conv1": Reason.NO_ACTIVATION})
class BranchOnTheShape(OneConv):
    def __init__(self) -> None:
        super().__init__()
        self.other = conv()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv1(x) if x.shape[-1] < 64 else F.relu(self.other(x)))


@zoo({"conv1": "subclass"})
class DictOutput(OneConv):
    def forward(self, x: Tensor) -> dict[str, Any]:
        y = F.relu(self.conv1(x))
        return {"features": [y], "out": (self.head(y), None)}


@zoo({}, {"conv1": Reason.NO_ACTIVATION})
class OutputReturned(OneConv):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv1(x)
        return self.head(F.relu(y)), y


@zoo({}, {"conv1": Reason.OUTPUT_ESCAPES})
class OutputKept(OneConv):
    def forward(self, x: Tensor) -> Tensor:
        self.cache = {"features": [self.conv1(x)]}
        return self.head(F.relu(self.cache["features"][0]))


# The activation works in place and its result is dropped: wrapped, it would work on the newcomer's output.
@zoo({"conv1": "wrap"}, ends={"conv1": "subclass"})
class InplaceModuleAsStatement(OneConvAct):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        self.act(y)
        return self.head(y)


@zoo({"conv1": "wrap"}, ends={"conv1": "subclass"})
class InplaceModuleThenResidual(InplaceModuleAsStatement):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        z = self.act(y)
        return self.head(z + y)


@zoo({"conv1": "wrap"}, ends={"conv1": "subclass"})
class ActivationAsked(InplaceModuleAsStatement):
    def forward(self, x: Tensor) -> Tensor:
        assert self.act.inplace
        return self.head(self.act(self.conv1(x)))


# -- norms ----------------------------------------------------------------------------------------------


@zoo({}, {"0": Reason.ALREADY_NORMALISED, "3": Reason.NO_ACTIVATION}, head=False)
def already_normalised() -> nn.Module:
    return nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 2))


@zoo(
    {},
    {"0": Reason.ALREADY_NORMALISED, "3": Reason.ALREADY_NORMALISED, "6": Reason.NO_ACTIVATION},
    head=False,
)
def other_norms() -> nn.Module:
    return nn.Sequential(
        conv(), nn.GroupNorm(2, 4), nn.ReLU(), conv(4, 4), nn.InstanceNorm2d(4), nn.ReLU(), conv(4, 2)
    )


@zoo({}, {"conv1": Reason.ALREADY_NORMALISED})
class FunctionalNorm(OneConv):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(F.layer_norm(self.conv1(x), [8, 8])))


@zoo({"0": "sequential"}, {"2": Reason.NO_ACTIVATION}, head=False, position="after")
def normed_after_the_activation() -> nn.Module:
    return nn.Sequential(conv(), nn.ReLU(inplace=True), conv(4, 2))


@zoo({"conv1": "wrap"}, position="after")
class WrappedAfter(OneConvAct):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.conv1(x)))


@zoo({}, {"conv1": Reason.NOT_A_MODULE}, position="after")
class NothingCanFollowAFunction(FunctionalRelu):
    pass


# -- kinds of layer -------------------------------------------------------------------------------------


@zoo({"0": "sequential"}, {"2": Reason.NO_ACTIVATION}, head=False, shape=(2, 3, 16))
def one_dimension() -> nn.Module:
    return nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU(), nn.Conv1d(4, 2, 3))


@zoo({"0": "sequential"}, {"2": Reason.NO_ACTIVATION}, head=False, shape=(2, 3, 4, 4, 4))
def three_dimensions() -> nn.Module:
    return nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU(), nn.Conv3d(4, 2, 1))


@zoo({"up1": "subclass", "up2": "subclass", "up3": "subclass"}, head=False, shape=(2, 3, 4))
class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up1 = nn.ConvTranspose1d(3, 4, 2, stride=2)
        self.up2 = nn.ConvTranspose2d(4, 6, 2, groups=2)
        self.up3 = nn.ConvTranspose3d(6, 5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.up1(x))[:, :, None]
        x = F.relu(self.up2(x, output_size=(2, 9)))[:, :, None]
        return F.relu(self.up3(x)) + 1


@zoo({"conv1": "subclass", "conv3": "subclass"}, head=False, shape=(2, 3, 16))
class StockLayersOfOtherRanks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv3 = nn.Conv1d(3, 4, 3), nn.Conv3d(4, 4, 1, groups=4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        return F.relu(self.conv3(x[:, :, None, None])).sum(1)


@zoo({"fc1": "subclass"}, {"fc2": Reason.NO_ACTIVATION}, head=False, shape=(4, 8), linear=True)
class LinearLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(x)))


@zoo({}, {}, head=False, shape=(4, 8))
class LinearNotAskedFor(LinearLayers):
    pass


@zoo(
    {},
    {"0": Reason.AXIS_MISMATCH, "2": Reason.NO_ACTIVATION},
    head=False,
    shape=(4, 5, 8),
    linear=True,
)
def linear_over_tokens() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))


@zoo({}, {"conv1": Reason.AXIS_MISMATCH}, shape=IMAGE[1:])
class WithoutABatchAxis(FunctionalRelu):
    pass


@zoo({"conv1": "subclass"}, dtype=torch.float16)
class Half(FunctionalRelu):
    def __init__(self) -> None:
        super().__init__()
        self.half()


@zoo({"conv1": "wrap"}, dtype=torch.bfloat16)
class Bfloat16(ReluModule):
    def __init__(self) -> None:
        super().__init__()
        self.bfloat16()


@zoo({"conv1": "subclass"}, dtype=torch.float64)
class DoubleChannelsLast(FunctionalRelu):
    def __init__(self) -> None:
        super().__init__()
        self.to(dtype=torch.float64, memory_format=torch.channels_last)


@zoo({"conv1": "wrap"})
class AutocastInside(ReluModule):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(x)


@zoo({"conv1": "subclass"})
class Depthwise(OneConv):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, groups=3, padding="same", padding_mode="reflect", bias=False)
        self.head = conv(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv1(x)))


@zoo({"conv1": "wrap"})
class FrozenConv(ReluModule):
    def __init__(self) -> None:
        super().__init__()
        self.conv1.requires_grad_(False)


# -- layers that are more than they look ----------------------------------------------------------------


class ScaledConv(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return super().forward(input) * 2.0


class NamedConv(nn.Conv2d):
    """A subclass that changes nothing."""


@zoo({}, {"conv1": Reason.NO_ACTIVATION})
class ConvWithOwnForward(FunctionalRelu):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = ScaledConv(3, 4, 3, padding=1)


@zoo({}, {"conv1": Reason.CUSTOM_FORWARD})
class SubclassedConvThenFunction(FunctionalRelu):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = NamedConv(3, 4, 3, padding=1)


@zoo({"conv1": "wrap"})
class SubclassedConvThenModule(ReluModule):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = NamedConv(3, 4, 3, padding=1)


@zoo({"conv1": "wrap"}, pickles=False)
class WeightNormed(ReluModule):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = parametrizations.weight_norm(self.conv1)


@zoo({}, {"conv1": Reason.CUSTOM_FORWARD}, pickles=False)
class WeightNormedThenFunction(FunctionalRelu):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = parametrizations.weight_norm(self.conv1)


@zoo({"conv1": "wrap"}, pickles=False)  # nor does torch copy it once it has run
class WeightNormedByHook(ReluModule):
    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the old form, still in many checkpoints
            nn.utils.weight_norm(self.conv1)


def see(module: nn.Module, args: Any, output: Any) -> None:
    """A hook that looks at an output and leaves it."""


@zoo({}, {"conv1": Reason.HOOKED})
class Hooked(ReluModule):
    def __init__(self) -> None:
        super().__init__()
        self.conv1.register_forward_hook(see)


@zoo({}, {"(root)": Reason.NOT_A_MODULE})
class FunctionalConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))
        self.head = conv(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(F.conv2d(x, self.weight)))


@zoo({}, {"conv1": Reason.NOT_A_MODULE})
class ForwardCalledDirectly(OneConv):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv1.forward(x)))


@zoo({}, {"conv1": Reason.NOT_A_MODULE}, pickles=False)
class ClosureOverSelf(OneConv):
    def __init__(self) -> None:
        super().__init__()
        self.stem = lambda x: self.conv1(x)  # noqa: PLW0108 - a closure, as people write it

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.stem(x)))


@zoo({"conv1": "subclass"})
class BoundMethodKept(OneConv):
    def __init__(self) -> None:
        super().__init__()
        self.stem = self.first

    def first(self, x: Tensor) -> Tensor:
        return F.relu(self.conv1(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x))


@zoo(
    {"conv1": "subclass"},
    {"conv2": Reason.EXCLUDED, "head": Reason.EXCLUDED},
    include=("conv*",),
    exclude=("*2",),
)
class IncludedAndExcluded(OneConv):
    def __init__(self) -> None:
        super().__init__()
        self.conv2 = conv(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv2(F.relu(self.conv1(x)))))


def scripted(module: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        return torch.jit.script(module)


@zoo({"conv1": "subclass"}, {"body.0": Reason.NOT_A_MODULE}, pickles=False)
class ScriptedBody(OneConv):
    def __init__(self) -> None:
        super().__init__()
        self.body = scripted(nn.Sequential(conv(4, 4), nn.ReLU()))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(F.relu(self.conv1(x))))
