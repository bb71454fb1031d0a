"""Operators that a program may name: those that only compute."""

from __future__ import annotations

import pytest
import torch

from bntool.files.security.archives import Unsafe
from bntool.files.security.operators import UnknownOperator, check_operator


@pytest.mark.parametrize(
    "target",
    [
        "torch.ops.aten.conv2d.default",
        "torch.ops.aten.einsum.default",
        "torch.ops.aten.__and__.Tensor",
        "torch.ops.higher_order.cond",
        "_operator.floordiv",
        "torch.sym_max",
    ],
)
def test_operators_that_compute_pass(target: str) -> None:
    check_operator(target)


@pytest.mark.parametrize(
    "target",
    [
        "torch.ops.aten.from_file.default",
        "torch.ops.aten.conv2d.default.__class__",
        "torch.ops.load_library",
        "torch.os.system",
        "_operatorx.attrgetter",
        "math.os",
        7,
    ],
)
def test_what_is_no_operator_is_unsafe(target: object) -> None:
    with pytest.raises(Unsafe):
        check_operator(target)


@pytest.mark.parametrize("target", ["torch.ops.mylib.thing.default", "torch.ops.aten.conv2d.__class__"])
def test_what_is_not_registered_is_named(target: str) -> None:
    with pytest.raises(UnknownOperator, match=target.split(".")[3]):
        check_operator(target)


def test_no_other_operator_of_aten_takes_a_file() -> None:
    """An argument named like a file in a new torch would need a look."""
    takes = {
        f"{schema.name}:{argument.name}"
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith(("aten::", "prims::"))
        for argument in schema.arguments
        if "file" in argument.name
    }
    assert takes == {"aten::from_file:filename", "aten::save:filename"}
