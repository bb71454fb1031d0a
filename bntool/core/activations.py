"""Which ops count as an activation, and the names that people have for them. No torch here."""

from __future__ import annotations

import re

ACTIVATIONS = frozenset(
    """relu relu6 silu gelu hardswish hardsigmoid sigmoid tanh leaky_relu elu selu celu mish prelu softplus
    hardtanh logsigmoid threshold hardshrink softshrink rrelu glu clamp""".split()
)
"""Kinds that count as an activation after a convolution: each is one operator."""
ANY = "any"
_OTHERS = {
    "swish": "silu",
    "hswish": "hardswish",
    "hsigmoid": "hardsigmoid",
    "lrelu": "leaky_relu",
    "leaky": "leaky_relu",
    "logistic": "sigmoid",
    "gelutanh": "gelu",
    "clip": "clamp",
}
_PLAIN = {name.replace("_", ""): name for name in (*ACTIVATIONS, ANY)} | _OTHERS


def kind_of(name: str) -> str:
    """The kind meant by `LeakyReLU`, `nn.ReLU6`, `F.relu_`, `swish`, `hard-swish`; else the name itself.

    The classes and functions of torch are known by their names, with and without what leads to them.
    """
    last = name.strip().rpartition(".")[2]
    return _PLAIN.get(re.sub(r"[\s_-]", "", last).lower(), name)


def kinds_of(names: tuple[str, ...]) -> tuple[str, ...]:
    """The kinds that are meant, each once; a name may hold several between commas."""
    return tuple(dict.fromkeys(kind_of(part.strip()) for name in names for part in name.split(",")))
