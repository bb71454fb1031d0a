"""Networks made at random from the ops that folding has laws for, and from some that it must stop at."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIDE = 12
Shape = tuple[int, int, int]
Step = Callable[["RandomNet", list[Tensor]], Tensor]


class RandomNet(nn.Module):
    """A straight program of random steps over (N, C, H, W); what nobody read is returned.

    The same seed gives the same network. Its BatchNorms have statistics, and γ of both signs; half of the
    networks end in a pooled head with BatchNorm1d.
    """

    def __init__(self, seed: int, steps: int = 14) -> None:
        super().__init__()
        self.draw = random.Random(seed)  # noqa: S311 - networks, not secrets
        torch.manual_seed(seed)
        self.layers = nn.ModuleList()
        self.channels = self.draw.choice((2, 4, 6))
        self.program: list[tuple[Step, list[int], str]] = []
        self.shapes: list[Shape] = [(self.channels, SIDE, SIDE)]
        for _ in range(steps):
            self.draw.choice(_MAKERS)(self)
        read = {i for _, sources, _ in self.program for i in sources}
        self.ends = [i for i in range(len(self.shapes)) if i not in read] or [len(self.shapes) - 1]
        self.head: nn.Module | None = None
        if self.draw.random() < 0.5:
            wide = sum(self.shapes[i][0] for i in self.ends)
            self.head = nn.Sequential(
                nn.Linear(wide, 5),
                nn.BatchNorm1d(5),
                nn.Linear(5, 3),
                nn.ReLU(),
                nn.BatchNorm1d(3),
                nn.Linear(3, 2),
            )
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                _randomise(module, self.draw)
        self.double().eval()

    def forward(self, x: Tensor) -> Any:
        values = [x]
        for step, sources, _ in self.program:
            values.append(step(self, [values[i] for i in sources]))
        found = [values[i] for i in self.ends]
        if self.head is None:
            return found
        return self.head(torch.cat([value.mean((2, 3)) for value in found], 1))

    def told(self) -> str:
        """The program, one step a line."""
        return "\n".join(
            f"v{i + 1} {self.shapes[i + 1]} = {what}({', '.join(f'v{s}' for s in sources)})"
            for i, (_, sources, what) in enumerate(self.program)
        )

    # -- for the makers ---------------------------------------------------------------------------------

    def recent(self) -> int:
        """One of the last values, most often the very last."""
        return max(0, len(self.shapes) - 1 - int(self.draw.expovariate(1.0)))

    def add(self, what: str, sources: list[int], shape: Shape, step: Step) -> None:
        if min(shape) < 1 or shape[0] * shape[1] * shape[2] > 4000:
            return
        self.program.append((step, sources, what))
        self.shapes.append(shape)

    def add_layer(self, layer: nn.Module, source: int) -> None:
        try:
            with torch.no_grad():
                made = layer.eval()(torch.zeros(1, *self.shapes[source])).shape
        except RuntimeError:
            return  # the layer does not fit this value
        if len(made) == 4:
            self.layers.append(layer)
            self.add_call(len(self.layers) - 1, source, tuple(made[1:]))

    def add_call(self, number: int, source: int, shape: Any) -> None:
        def step(net: RandomNet, values: list[Tensor]) -> Tensor:
            out: Tensor = net.layers[number](values[0])
            return out

        self.add(f"layer {number} {self.layers[number]}", [source], shape, step)


def _randomise(norm: nn.modules.batchnorm._BatchNorm, draw: random.Random) -> None:
    with torch.no_grad():
        if norm.running_mean is not None and norm.running_var is not None:
            norm.running_mean.normal_(0, 0.5)
            norm.running_var.uniform_(0.3, 2.0)
            if draw.random() < 0.1:
                norm.running_var[0] = 0.0
        if norm.affine:
            norm.weight.normal_(0, 1)
            norm.bias.normal_(0, 0.5)
            if draw.random() < 0.1:
                norm.weight[0] = 0.0


# -- makers ---------------------------------------------------------------------------------------------


def _conv(net: RandomNet) -> None:
    source, draw = net.recent(), net.draw
    channels = net.shapes[source][0]
    out = draw.choice((2, 4, 6, channels))
    kernel = draw.choice((1, 1, 2, 3, 3, (1, 3)))
    groups = draw.choice([1, 1, *(g for g in (2, channels) if channels % g == 0 and out % g == 0)])
    bias = draw.random() < 0.6
    if draw.random() < 0.2:
        stride = draw.choice((1, 2))
        layer: nn.Module = nn.ConvTranspose2d(channels, out, kernel, stride, groups=groups, bias=bias)
    else:
        mode = draw.choice(("zeros", "zeros", "zeros", "reflect", "replicate", "circular"))
        layer = nn.Conv2d(
            channels, out, kernel, draw.choice((1, 1, 2)), draw.choice((0, 1)), draw.choice((1, 1, 2)),
            groups, bias, mode,
        )  # fmt: skip
    net.add_layer(layer, source)


def _conv_and_activation(net: RandomNet) -> None:
    _conv(net)
    last = len(net.shapes) - 1
    acts: tuple[tuple[str, Step], ...] = (
        ("relu", lambda _, v: F.relu(v[0])),
        ("in-place relu", lambda _, v: F.relu(v[0], inplace=True)),
        ("x * sigmoid(x)", lambda _, v: v[0] * torch.sigmoid(v[0])),
    )
    if last and net.draw.random() < 0.5:
        net.add_layer(net.draw.choice((nn.ReLU, nn.GELU, nn.Hardswish))(), last)
    elif last:
        what, step = net.draw.choice(acts)
        net.add(what, [last], net.shapes[last], step)


def _norm(net: RandomNet) -> None:
    source, draw = net.recent(), net.draw
    eps = draw.choice((1e-5, 1e-3, 1e-1))
    net.add_layer(nn.BatchNorm2d(net.shapes[source][0], eps=eps, affine=draw.random() < 0.85), source)


def _layer_again(net: RandomNet) -> None:
    """A layer that is there already, on another value of the right width."""
    if not len(net.layers):
        return
    number, source = net.draw.randrange(len(net.layers)), net.recent()
    try:
        with torch.no_grad():
            made = net.layers[number].eval()(torch.zeros(1, *net.shapes[source])).shape
    except RuntimeError:
        return
    net.add_call(number, source, tuple(made[1:]))


def _tied(net: RandomNet) -> None:
    """A convolution of its own that shares the weight of another."""
    convs = [layer for layer in net.layers if type(layer) is nn.Conv2d]
    if not convs:
        return
    old, source = net.draw.choice(convs), net.recent()
    layer = nn.Conv2d(
        old.in_channels, old.out_channels, old.kernel_size, groups=old.groups, bias=net.draw.random() < 0.5
    )
    layer.weight = old.weight
    net.add_layer(layer, source)


def _layer(net: RandomNet) -> None:
    makers: tuple[Callable[[], nn.Module], ...] = (
        nn.ReLU, nn.ReLU, nn.SiLU, nn.Identity, lambda: nn.Dropout(0.5), lambda: nn.MaxPool2d(2),
        lambda: nn.MaxPool2d(3, 1, 1), lambda: nn.AvgPool2d(2), lambda: nn.AvgPool2d(3, 1, 1),
        lambda: nn.AvgPool2d(3, 1, 1, count_include_pad=False), lambda: nn.AvgPool2d(2, ceil_mode=True),
        lambda: nn.Upsample(scale_factor=2), lambda: nn.AdaptiveAvgPool2d(3), lambda: nn.ZeroPad2d(1),
        lambda: nn.ReflectionPad2d(1), lambda: nn.PixelShuffle(2), lambda: nn.PixelUnshuffle(2),
        lambda: nn.ChannelShuffle(2), lambda: nn.LeakyReLU(0.2), lambda: nn.GroupNorm(1, net.channels),
        lambda: nn.Upsample(scale_factor=2, mode="bilinear"), lambda: nn.ConstantPad2d(1, 0.5),
        lambda: Summand(net.channels),
    )  # fmt: skip
    net.add_layer(net.draw.choice(makers)(), net.recent())


def _binary(net: RandomNet) -> None:
    source = net.recent()
    same = [i for i, shape in enumerate(net.shapes) if shape == net.shapes[source]]
    what = net.draw.choice(("add", "add", "add", "sub", "mul", "in-place add"))
    steps: dict[str, Step] = {
        "add": lambda _, v: v[0] + v[1],
        "sub": lambda _, v: v[0] - 0.5 * v[1],
        "mul": lambda _, v: v[0] * v[1],
        "in-place add": lambda _, v: v[0].clone().add_(v[1]),
    }
    net.add(what, [source, net.draw.choice(same)], net.shapes[source], steps[what])


def _join(net: RandomNet) -> None:
    source = net.recent()
    same = [i for i, shape in enumerate(net.shapes) if shape[1:] == net.shapes[source][1:]]
    sources = [source, net.draw.choice(same)]
    channels = sum(net.shapes[i][0] for i in sources)
    net.add("cat", sources, (channels, *net.shapes[source][1:]), lambda _, v: torch.cat(v, 1))


def _rearranged(net: RandomNet) -> None:
    source = net.recent()
    c, h, w = net.shapes[source]
    number = net.draw.uniform(-2, 2)
    start = net.draw.randrange(c)
    scale = torch.randn(1, c, 1, 1, dtype=torch.float64)
    constant = torch.randn(1, 1, 1, w, dtype=torch.float64)
    choices: list[tuple[str, Shape, Step]] = [
        (f"channels from {start}", (c - start, h, w), lambda _, v: v[0][:, start:]),
        ("last half", (c - c // 2, h, w), lambda _, v: v[0].split([c // 2, c - c // 2], 1)[1]),
        ("every other row", (c, (h + 1) // 2, w), lambda _, v: v[0][:, :, ::2]),
        (f"times {number:.2f}", (c, h, w), lambda _, v: v[0] * number),
        (f"plus {number:.2f}", (c, h, w), lambda _, v: v[0] + number),
        ("minus it", (c, h, w), lambda _, v: 1 - v[0]),
        ("scaled by channel", (c, h, w), lambda _, v: v[0] * scale),
        ("shifted by column", (c, h, w), lambda _, v: v[0] + constant),
        ("turned", (c, w, h), lambda _, v: v[0].transpose(2, 3)),
        ("rows as channels", (h, c, w), lambda _, v: v[0].permute(0, 2, 1, 3).contiguous()),
        ("folded and back", (c, h, w), lambda _, v: v[0].flatten(2).unflatten(2, (h, w))),
        ("half the rows as channels", (2 * c, h // 2, w),
         lambda _, v: v[0][:, :, : h // 2 * 2].reshape(v[0].shape[0], 2 * c, h // 2, w)),
        ("weighed by its means", (c, h, w), lambda net, v: v[0] * v[0].mean((2, 3), keepdim=True)),
        ("rolled", (c, h, w), lambda _, v: v[0].roll(1, 1)),
        ("flipped", (c, h, w), lambda _, v: v[0].flip(1)),
        ("gathered", (2, h, w), lambda _, v: v[0][:, [0, c - 1]]),
        ("zeros beside the channels", (c + 2, h, w), lambda _, v: F.pad(v[0], (0, 0, 0, 0, 1, 1))),
        ("taken apart and stacked", (h, c, w), lambda _, v: torch.stack(v[0].unbind(2), 1)),
        ("moved", (w, c, h), lambda _, v: v[0].movedim(3, 1)),
        ("largest of each row", (c, h, 1), lambda _, v: v[0].max(3, keepdim=True)[0]),
        ("two largest of each column", (c, min(2, h), w), lambda _, v: v[0].topk(min(2, h), 2)[0]),
        ("each row twice", (c, 2 * h, w), lambda _, v: v[0].repeat_interleave(2, 2)),
        ("spread of each row", (c, h, 1), lambda _, v: v[0].std(3, correction=0, keepdim=True)),
        ("length of each column", (c, 1, w), lambda _, v: v[0].norm(dim=2, keepdim=True)),
        ("rows added up", (c, h, w), lambda _, v: _rows_added_up(v[0])),
        ("relu", (c, h, w), lambda _, v: F.relu(v[0])),
        ("in-place relu", (c, h, w), lambda _, v: v[0].clone().relu_()),
        ("softmax", (c, h, w), lambda _, v: v[0].softmax(1)),
        ("half of it in place", (c, h, w), _half_in_place),
    ]  # fmt: skip
    net.add(*_ordered(net.draw.choice(choices), source))


class Summand(nn.Module):
    """Adds a stored number to each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


def _rows_added_up(x: Tensor) -> Tensor:
    """Row i goes to row i // 2, as the messages of a graph network go to its nodes."""
    places = torch.arange(x.shape[2]) // 2
    return torch.zeros_like(x).scatter_add(2, places[:, None].expand_as(x), x)


def _half_in_place(_: RandomNet, values: list[Tensor]) -> Tensor:
    out = values[0].clone()
    out[:, : out.shape[1] // 2] *= 2.0
    return out


def _ordered(choice: tuple[str, Shape, Step], source: int) -> tuple[str, list[int], Shape, Step]:
    what, shape, step = choice
    return what, [source], shape, step


_MAKERS = (
    *(_conv,) * 4, *(_conv_and_activation,) * 2, *(_norm,) * 6, *(_layer,) * 3, *(_binary,) * 2,
    _join, *(_rearranged,) * 2, _layer_again, _tied,
)  # fmt: skip
