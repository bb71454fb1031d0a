"""Which Einsum nodes are linear layers: one constant matrix, one axis of the data summed away for another."""

from __future__ import annotations

import dataclasses
import string

from bntool.observe.onnx_view import NodeView, Shape


@dataclasses.dataclass(frozen=True)
class LinearEinsum:
    """An Einsum as a matrix product over the last axis, between two permutations.

    `weight` numbers the matrix among the inputs; `kind` tells its layout (`linear` (out, in), `matmul`
    (in, out)); `before` and `after` are the permutations of the data and of the product; `behind` counts the
    axes behind the channels in the result.
    """

    weight: int
    kind: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    behind: int
    turned: Shape
    product: Shape


def linear_einsum(view: NodeView) -> LinearEinsum | None:
    """The linear layer that an Einsum is; None for any other product, or unknown shapes."""
    terms, arrow, out = str(view.attr("equation")).replace(" ", "").partition("->")
    operands = terms.split(",")
    fixed = [i for i in range(len(operands)) if view.input(i) in view.constants]
    if not arrow or len(operands) != 2 or len(fixed) != 1:
        return None
    (weight,) = fixed
    shape, result, sizes = view.shape(1 - weight), view.result(), view.shape(weight)
    data, matrix = operands[1 - weight], operands[weight]
    if shape is None or result is None or sizes is None or len(matrix) != 2:
        return None
    rest = len(shape) - len(data.replace("...", ""))
    free = [letter for letter in string.ascii_letters if letter not in terms][:rest]
    data, out = (labels.replace("...", "".join(free)) for labels in (data, out))
    summed, made = set(data) - set(out), set(out) - set(data)
    plain = len(set(data)) == len(data) == len(shape) and len(set(out)) == len(out) == len(result)
    if not plain or len(summed) != 1 or len(made) != 1 or {*matrix} != summed | made:
        return None
    (inner,), (outer,) = summed, made
    kept = [i for i, label in enumerate(data) if label != inner]
    before = (*kept, data.index(inner))
    labels = [*(data[i] for i in kept), outer]
    kind = "linear" if matrix[0] == outer else "matmul"
    turned = tuple(shape[i] for i in before)
    width = sizes[matrix.index(outer)]
    return LinearEinsum(
        weight,
        kind,
        before,
        tuple(labels.index(label) for label in out),
        len(out) - 1 - out.index(outer),
        turned,
        (*turned[:-1], width),
    )
