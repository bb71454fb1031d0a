"""Elementwise ops: sums and products with constants and of branches, and activations that let a scale by."""

from __future__ import annotations

from bntool.affine import Affine, add, identity
from bntool.graph import Op
from bntool.laws.base import (
    Context,
    Maps,
    Refused,
    along,
    constant_operand,
    law,
    no_shift,
    non_negative,
    only_input,
    variable_roles,
)
from bntool.reasons import Reason


@law("relu", "leaky_relu", "prelu")
class PositivelyHomogeneous:
    """f(s·x) = s·f(x) for s ≥ 0; a shift would move the corner at zero."""

    @staticmethod
    def up(context: Context, op: Op, demands: list[Affine]) -> Maps:
        return {"input": _homogeneous(context, op, demands[0])}

    @staticmethod
    def down(context: Context, op: Op, maps: Maps) -> list[Affine]:
        return [_homogeneous(context, op, maps["input"])]


def _homogeneous(context: Context, op: Op, affine: Affine) -> Affine:
    only_input(context, op)
    no_shift(affine, Reason.NONLINEAR, f"{op.label} stands in the way of the shift")
    non_negative(affine, op.label)
    return affine


@law("add", "sub")
class Addition:
    """A sum of branches: upstream the scale goes to each and the shift to one; a constant stays."""

    @staticmethod
    def up(context: Context, op: Op, demands: list[Affine]) -> Maps:
        roles, rank = _operands(context, op)
        demand = along(demands[0], rank, op.label)
        if len(roles) == 1:
            role = roles[0]
            _require_full(context, op, role)
            return {role: _around_constant(context, op, role, demand, "before_add")}
        if op.attrs["alpha"] != 1.0 or op.kind == "sub":
            no_shift(demand, Reason.MIXED_BRANCHES, f"{op.label} weighs its branches")
        for role in roles:
            _require_full(context, op, role)
        if not demand.has_shift:
            return dict.fromkeys(roles, demand)
        taker = context.choose(len(roles))
        return {role: demand if i == taker else demand.then("scale_part") for i, role in enumerate(roles)}

    @staticmethod
    def down(context: Context, op: Op, maps: Maps) -> list[Affine]:
        roles, rank = _operands(context, op)
        if len(roles) == 1:
            role = roles[0]
            _require_full(context, op, role)
            affine = along(maps[role], rank, op.label)
            return [_around_constant(context, op, role, affine, "after_add")]
        for role in roles:
            _require_full(context, op, role)
        if op.attrs["alpha"] != 1.0 or op.kind == "sub":
            raise Refused(Reason.MIXED_BRANCHES, f"{op.label} weighs its branches")
        first, second = (along(maps.get(role, identity(rank)), rank, op.label) for role in roles)
        joined = add(first, second)
        if joined is None:
            raise Refused(Reason.MIXED_BRANCHES, f"the branches of {op.label} carry different scales")
        return [joined]


@law("mul", "div")
class Multiplication:
    """c·(s·x + t) = s·(c·x) + c·t for a constant c; two branches that both depend on the data refuse."""

    @staticmethod
    def up(context: Context, op: Op, demands: list[Affine]) -> Maps:
        role, rank = _only_operand(context, op)
        demand = along(demands[0], rank, op.label)
        if not demand.has_shift:
            return {role: demand}
        factor = constant_operand(context, op, role)
        if op.kind == "mul" and bool((factor.tensor == 0).any()):
            raise Refused(Reason.ZERO_SCALE, f"{op.label} multiplies by zero, which swallows a shift")
        return {role: demand.then_constant("multiply_shift" if op.kind == "div" else "divide_shift", factor)}

    @staticmethod
    def down(context: Context, op: Op, maps: Maps) -> list[Affine]:
        role, rank = _only_operand(context, op)
        affine = along(maps[role], rank, op.label)
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


def _require_full(context: Context, op: Op, role: str) -> None:
    """An operand that is broadcast stands for several elements at once."""
    if context.graph.input(op, role).shape != context.graph.output(op).shape:
        raise Refused(Reason.AXIS_MISMATCH, f"an operand of {op.label} is broadcast")


def _around_constant(context: Context, op: Op, role: str, affine: Affine, step: str) -> Affine:
    """Move a map around `x + c`. A pure shift passes as it is; a scale adds its part of c."""
    if role != "input" and (op.kind == "sub" or op.attrs["alpha"] != 1.0):
        raise Refused(Reason.MIXED_BRANCHES, f"{op.label} weighs the operand that depends on the data")
    if not affine.has_scale:
        return affine
    sign = -1.0 if op.kind == "sub" else 1.0
    factor = sign * op.attrs["alpha"] if role == "input" else 1.0
    return affine.then_constant(step, constant_operand(context, op, role), factor)
