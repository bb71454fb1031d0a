"""Which ops count as an activation. No torch here."""

from __future__ import annotations

ACTIVATIONS = frozenset(
    """relu relu6 silu gelu hardswish hardsigmoid sigmoid tanh leaky_relu elu selu celu mish prelu softplus
    hardtanh logsigmoid threshold hardshrink softshrink rrelu glu clamp""".split()
)
"""Kinds that count as an activation after a convolution: each is one operator."""
