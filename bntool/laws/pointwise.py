"""Elementwise ops: sums and products with constants and of branches, and activations that let a scale by."""

from __future__ import annotations

import torch

from bntool.core.reasons import Reason
from bntool.graph.affine import Affine, Constant, add, identity
from bntool.graph.dataflow import Op
from bntool.laws.base import (
    Context,
    Maps,
    Refused,
    along,
    constant_operand,
    law,
    no_shift,
    non_negative,
    of_input,
    only_input,
    stored_behind,
    variable_roles,
)


@law("relu", "leaky_relu")
class PositivelyHomogeneous:
    """f(s·x) = s·f(x) for s ≥ 0; a shift would move the corner at zero."""

    @staticmethod
    def up(context: Context, op: Op, demands: list[Affine]) -> Maps:
        return {"input": _homogeneous(context, op, demands[0])}

    @staticmethod
    def down(context: Context, op: Op, maps: Maps) -> list[Affine]:
        return [_homogeneous(context, op, of_input(op, maps))]


def _homogeneous(context: Context, op: Op, affine: Affine) -> Affine:
    only_input(context, op)
    no_shift(affine, Reason.NONLINEAR, f"{op.label} stands in the way of the shift")
    non_negative(affine, op.label)
    return affine


@law(
    *"QuantizeLinear DequantizeLinear DynamicQuantizeLinear QLinearConv QLinearMatMul ConvInteger".split(),
    *"MatMulInteger com.microsoft::QuantizeLinear com.microsoft::DequantizeLinear".split(),
    *"quantize_per_tensor quantize_per_channel dequantize fake_quantize_per_tensor_affine".split(),
    *(
        f"quantized_decomposed.{what}quantize_per_{which}.default"
        for what in ("", "de")
        for which in ("tensor", "channel", "token")
    ),
)
class Quantisation:
    """To integers or from them, by scales of their own: left alone, in both directions."""

    @staticmethod
    def up(_context: Context, op: Op, _demands: list[Affine]) -> Maps:
        raise Refused(Reason.QUANTIZED, f"{op.label} is quantised arithmetic")

    @staticmethod
    def down(_context: Context, op: Op, _maps: Maps) -> list[Affine]:
        raise Refused(Reason.QUANTIZED, f"{op.label} is quantised arithmetic")


@law("add", "sub", "rsub")
class Addition:
    """a + α·b, and a − α·b or b − α·a likewise: upstream the scale goes to each branch and the shift to one,
    divided by that branch's weight; a constant stays, or is a branch where it is stored for this sum alone.
    Downstream (s·a + t) + b = s·(a + b/s) + t, where the other branch can become b/s, or (b + t)/s.
    """

    @staticmethod
    def up(context: Context, op: Op, demands: list[Affine]) -> Maps:
        roles, rank = _operands(context, op)
        demand = along(demands[0], rank, op.label)
        for role in roles:
            _require_full(context, op, role)
        stored = _own_summand(context, op, demand) if len(roles) == 1 else ""
        if stored and context.take_in(op, stored, _unweighed(op, stored, demand)):
            return {roles[0]: demand.then("scale_part")}
        if len(roles) == 1 and demand.has_scale:
            constant = constant_operand(context, op, roles[0])
            demand = demand.then_constant("before_add", constant, _weight_of_constant(op, roles[0]))
        if not demand.has_shift:
            return dict.fromkeys(roles, demand)
        taker = context.choose(len(roles)) if len(roles) > 1 else 0
        return {
            role: _unweighed(op, role, demand) if i == taker else demand.then("scale_part")
            for i, role in enumerate(roles)
        }

    @staticmethod
    def down(context: Context, op: Op, maps: Maps) -> list[Affine]:
        roles, rank = _operands(context, op)
        for role in roles:
            _require_full(context, op, role)
        carried = [
            _weighed(op, role, along(maps.get(role, identity(rank)), rank, op.label)) for role in roles
        ]
        if len(roles) == 1:
            if not carried[0].has_scale:
                return carried
            constant = constant_operand(context, op, roles[0])
            return [carried[0].then_constant("after_add", constant, _weight_of_constant(op, roles[0]))]
        joined = add(*carried)
        if context.asks and len(maps) == 1 and (joined is None or joined.has_shift):
            return [_other_asked(context, op, maps, carried)]
        if joined is None:
            raise Refused(Reason.MIXED_BRANCHES, f"the branches of {op.label} carry different scales")
        return [joined]


@law("mul", "div")
class Multiplication:
    """c·(s·x + t) = s·(c·x) + c·t for a constant c, and s·(a·b) = (s·a)·b for two values that both depend
    on the data: one of them takes the scale, and no shift is had. A factor that is stored for this product
    alone may take the scale itself: c·(s·x + t) = (s·c)·x + c·t, and s·(c·x) + t = (s·c)·(x + t/(s·c)).
    """

    @staticmethod
    def up(context: Context, op: Op, demands: list[Affine]) -> Maps:
        roles, rank = _operands(context, op)
        if len(roles) == 2:
            return {_factor_for(context, op, demands[0]): along(demands[0], rank, op.label)}
        role, rank = _only_operand(context, op)
        demand = along(demands[0], rank, op.label)
        if _factor_takes(context, op, demand):
            demand = demand.then("unscaled_shift")
        if not demand.has_shift:
            return {role: demand}
        factor = constant_operand(context, op, role)
        if op.kind == "mul" and bool((factor.tensor == 0).any()):
            raise Refused(Reason.ZERO_SCALE, f"{op.label} multiplies by zero, which swallows a shift")
        return {role: demand.then_constant("multiply_shift" if op.kind == "div" else "divide_shift", factor)}

    @staticmethod
    def down(context: Context, op: Op, maps: Maps) -> list[Affine]:
        roles, rank = _operands(context, op)
        if len(roles) == 2:
            return [_of_one_factor(context, op, maps)]
        role, rank = _only_operand(context, op)
        affine = along(maps[role], rank, op.label)
        if _factor_takes(context, op, affine):
            affine = affine.then("shift_part")
        if not affine.has_shift:
            return [affine]
        factor = constant_operand(context, op, role)
        return [affine.then_constant("divide_shift" if op.kind == "div" else "multiply_shift", factor)]


def _operands(context: Context, op: Op) -> tuple[list[str], int]:
    """The operands that depend on the data, and the rank of the result."""
    return variable_roles(context, op), len(context.graph.output(op).shape)


def _only_operand(context: Context, op: Op) -> tuple[str, int]:
    roles, rank = _operands(context, op)
    if len(roles) != 1:
        raise Refused(Reason.NONLINEAR, f"{op.label} multiplies two values that depend on the data")
    if op.kind == "div" and roles != ["input"]:
        raise Refused(Reason.NONLINEAR, f"{op.label} divides by a value that depends on the data")
    _require_full(context, op, roles[0])
    return roles[0], rank


def _factor_for(context: Context, op: Op, demand: Affine) -> str:
    """Which of two factors is to take a scale; a divisor, or one that is spread, cannot."""
    no_shift(demand, Reason.NONLINEAR, f"{op.label} multiplies two values that depend on the data")
    shape = context.graph.output(op).shape
    able = [role for role in _FACTORS[op.kind] if context.graph.input(op, role).shape == shape]
    if not able:
        raise Refused(Reason.AXIS_MISMATCH, f"the operands of {op.label} are broadcast")
    return able[context.choose(len(able))] if len(able) > 1 else able[0]


def _of_one_factor(context: Context, op: Op, maps: Maps) -> Affine:
    """The map behind a product of which one factor has become a multiple of what it was."""
    (role, *others) = maps
    if others or role not in _FACTORS[op.kind]:
        raise Refused(Reason.NONLINEAR, f"{op.label} multiplies or divides by what changes")
    no_shift(maps[role], Reason.NONLINEAR, f"{op.label} multiplies two values that depend on the data")
    _require_full(context, op, role)
    return maps[role]


_FACTORS = {"mul": ("input", "other"), "div": ("input",)}
"""The operands whose scale is the result's."""


def _require_full(context: Context, op: Op, role: str) -> None:
    """An operand that is broadcast stands for several elements at once."""
    if context.graph.input(op, role).shape != context.graph.output(op).shape:
        raise Refused(Reason.AXIS_MISMATCH, f"an operand of {op.label} is broadcast")


def _other_asked(context: Context, op: Op, maps: Maps, carried: list[Affine]) -> Affine:
    """The map behind a sum of which one operand carries a map: the other is asked for the inverse scale, and
    may take the shift, which else goes on.
    """
    roles = variable_roles(context, op)
    (given,) = maps
    own, other = carried[roles.index(given)], next(role for role in roles if role != given)
    if own.has_shift and context.choose(2) == 0:
        minus = own.then_constant("multiply_shift", _number(-1.0, own.rank))
        context.ask(op, other, _unweighed(op, other, minus))
        return own.then("scale_part")
    if own.has_scale:
        context.ask(op, other, own.then("scale_part"))
    return own


def _factor_takes(context: Context, op: Op, affine: Affine) -> bool:
    """Whether a stored factor takes in the scale of what it is multiplied with."""
    if op.kind != "mul" or not affine.has_scale or bool((affine.scale == 0).any()):
        return False
    stored = _own_summand(context, op, affine)
    return bool(stored) and context.take_in(op, stored, affine.then("scale_part"))


def _own_summand(context: Context, op: Op, demand: Affine) -> str:
    """The role of a stored constant that nothing else reads, as finely divided as the demand; else empty."""
    graph = context.graph
    shape = graph.output(op).shape
    for role in op.reads:
        value = graph.input(op, role)
        if not value.constant or stored_behind(graph, value) is None:
            continue
        sizes = (1,) * (len(shape) - len(value.shape)) + value.shape
        if all(wanted in (1, size) for wanted, size in zip(demand.scale.shape, sizes, strict=True)):
            return role
    return ""


def _weight(op: Op, role: str) -> float:
    """What the sum multiplies an operand by: the second of `add` and `sub`, the first of `rsub`, by ±α."""
    if (role == "input") != (op.kind == "rsub"):
        return 1.0
    if op.attrs["alpha"] is None:
        raise Refused(Reason.UNKNOWN_OP, f"the weight in {op.label} may have been read from the data")
    alpha = float(op.attrs["alpha"])
    return alpha if op.kind == "add" else -alpha


def _weight_of_constant(op: Op, role: str) -> float:
    """The weight of the operand beside `role`."""
    return _weight(op, "other" if role == "input" else "input")


def _unweighed(op: Op, role: str, demand: Affine) -> Affine:
    """What an operand must become for its weighed self to meet the demand."""
    weight = _weight(op, role)
    if weight == 0.0:
        raise Refused(Reason.ZERO_SCALE, f"{op.label} weighs a branch by zero, which swallows a shift")
    return demand if weight == 1.0 else demand.then_constant("divide_shift", _number(weight, demand.rank))


def _weighed(op: Op, role: str, affine: Affine) -> Affine:
    weight = _weight(op, role)
    return affine if weight == 1.0 else affine.then_constant("multiply_shift", _number(weight, affine.rank))


def _number(value: float, rank: int) -> Constant:
    return Constant.of(torch.tensor(value, dtype=torch.float64), "", rank)
