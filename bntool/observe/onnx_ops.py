"""ONNX operators in bntool's words: a table from operator names to one or several neutral steps.

An operator that is not in the table, or used in a way that its entry does not cover, keeps its own name as
its kind: no law knows it, so nothing moves through it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from bntool.observe.onnx_shapes import DTYPES
from bntool.observe.onnx_view import NodeView, Step, Steps

Translator = Callable[[NodeView], "Steps | None"]


def translate(view: NodeView) -> Steps | None:
    """The steps of a node; None where no law covers it."""
    node = view.node
    if node.domain not in ("", "ai.onnx"):
        return None
    translator = _TABLE.get(node.op_type)
    return None if translator is None else translator(view)


def _one(kind: str, **attrs: Any) -> Steps:
    return Steps((Step(kind, attrs),))


def _fixed(kind: str) -> Translator:
    return lambda view: _one(kind)


# -- shapes ---------------------------------------------------------------------------------------------


def _transpose(view: NodeView) -> Steps | None:
    shape = view.shape()
    if shape is None:
        return None
    return _one("permute", dims=tuple(view.attr("perm", range(len(shape))[::-1])))


def _slice(view: NodeView) -> Steps | None:
    shape = view.shape()
    starts, known_starts = view.integers(1, "starts")
    ends, known_ends = view.integers(2, "ends")
    axes, known_axes = view.integers(3, "axes")
    steps, known_steps = view.integers(4, "steps")
    if shape is None or starts is None or ends is None:
        return None
    axes = list(range(len(starts))) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    if not (known_starts and known_ends and known_axes and known_steps) or any(step == 0 for step in steps):
        return None
    made: list[Step] = []
    for axis, start, stop, step in zip(axes, starts, ends, steps, strict=True):
        axis %= len(shape)
        picked = range(*slice(start, stop, step).indices(shape[axis]))
        if step < 0:
            # An end before the first element is written as a large negative number; Python's is None.
            picked = range(*slice(start, None if stop < -shape[axis] else stop, step).indices(shape[axis]))
        shape = (*shape[:axis], len(picked), *shape[axis + 1 :])
        if step > 0:
            made.append(Step("slice", {"axis": axis, "start": start, "stop": stop, "step": step}, shape))
        else:
            made.append(Step("index_select", {"axis": axis, "indices": tuple(picked)}, shape))
    return Steps(tuple(made)) if made else _one("identity")


def _gather(view: NodeView) -> Steps | None:
    """A single index of an axis, which goes, or a list of them, which stays in its place."""
    index = view.constants.array(view.input(1))
    if index is None or index.ndim > 1 or view.shape() is None:
        return None
    axis = view.attr("axis", 0)
    if not index.ndim:
        return _one("select", axis=axis, index=int(index))
    return _one("index_select", axis=axis, indices=tuple(int(i) for i in index))


def _concat(view: NodeView) -> Steps:
    return Steps((Step("concat", {"axis": view.attr("axis", 0)}),), tuple(range(len(view.node.inputs))))


def _pixels(view: NodeView) -> Steps | None:
    """DepthToSpace and SpaceToDepth as the reshapes and permutations by which ONNX defines them."""
    shape = view.shape()
    if shape is None or len(shape) != 4:
        return None
    b, c, h, w = shape
    r = view.attr("blocksize")
    if view.node.op_type == "SpaceToDepth":
        middle, dims = (b, c, h // r, r, w // r, r), (0, 3, 5, 1, 2, 4)
        whole = (b, c * r * r, h // r, w // r)
    else:
        if view.attr("mode", "DCR") == "CRD":
            return _one("pixel_shuffle", factor=r)
        middle, dims = (b, r, r, c // (r * r), h, w), (0, 3, 4, 1, 5, 2)
        whole = (b, c // (r * r), h * r, w * r)
    turned = tuple(middle[d] for d in dims)
    return Steps(
        (Step("reshape", {}, middle), Step("permute", {"dims": dims}, turned), Step("reshape", {}, whole))
    )


def _cast(view: NodeView) -> Steps | None:
    return _one("identity") if view.attr("to") in DTYPES else None


def _dropout(view: NodeView) -> Steps | None:
    """In inference it hands its input on, and its mask says that it drops nothing."""
    training = view.input(2)
    if training is None:
        return _one("identity")
    known = view.constants.array(training)
    return _one("identity") if known is not None and not bool(known) else None


# -- sampling -------------------------------------------------------------------------------------------


def _avg_pool(view: NodeView) -> Steps | None:
    padding = view.pads()
    padded = padding == "same" or any(padding)
    # A window that ceil_mode lets hang over the edge may count what is not there.
    padded = padded or bool(view.attr("ceil_mode", 0))
    return _one(
        "avg_pool",
        dims=view.dims,
        padding=(int(padded),) * view.dims,
        count_include_pad=bool(view.attr("count_include_pad", 0)),
        ceil_mode=bool(view.attr("ceil_mode", 0)),
        divisor_override=None,
    )


def _max_pool(view: NodeView) -> Steps:
    padding = view.pads()
    single = all(n == 1 for n in view.attr("kernel_shape")) and padding != "same" and not any(padding)
    return _one("max_pool", dims=view.dims, single=single)


def _global(kind: str) -> Translator:
    return lambda view: _one(kind, axes=tuple(range(2, view.dims + 2)), keepdim=True)


def _reduce(kind: str) -> Translator:
    def translator(view: NodeView) -> Steps | None:
        axes, known = view.integers(1, "axes")
        if not known:
            return None
        if not axes and view.attr("noop_with_empty_axes", 0):
            return _one("identity")
        return _one(kind, axes=tuple(axes) if axes else None, keepdim=bool(view.attr("keepdims", 1)))

    return translator


def _resize(view: NodeView) -> Steps | None:
    """Every output is a mean of inputs whose weights sum to one, unless it comes from beyond the image."""
    source, target = view.shape(), view.result()
    if source is None or target is None or source[:2] != target[:2]:
        return None
    outside = view.attr("coordinate_transformation_mode", "") == "tf_crop_and_resize"
    known = view.attr("mode", "nearest") in ("nearest", "linear", "cubic")
    if outside or not known:
        return None
    return _one("upsample", dims=view.dims)


_PAD_MODES = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}


def _pad(view: NodeView) -> Steps | None:
    shape = view.shape()
    pads, known = view.integers(1, "pads")
    axes, known_axes = view.integers(3, "")
    mode = _PAD_MODES.get(view.attr("mode", "constant"))
    if shape is None or pads is None or not known or not known_axes or mode is None:
        return None
    value = view.attr("value", 0.0)
    if view.input(2) is not None:
        number = view.constants.array(view.input(2))
        if number is None:
            return None
        value = float(number.reshape(-1)[0])
    rank = len(shape)
    half = len(pads) // 2
    before, after = [0] * rank, [0] * rank
    for axis, first, last in zip(axes or range(rank), pads[:half], pads[half:], strict=True):
        before[axis], after[axis] = first, last
    paired = [n for axis in reversed(range(rank)) for n in (before[axis], after[axis])]
    return _one("pad", mode=mode, pads=tuple(paired), value=float(value))


# -- elementwise ----------------------------------------------------------------------------------------


def _binary(kind: str) -> Translator:
    def translator(view: NodeView) -> Steps | None:
        if view.version < 7:
            return None  # broadcast by rules of its own
        return Steps((Step(kind, {"number": None, "alpha": 1.0}),), (0, 1))

    return translator


def _sum(view: NodeView) -> Steps | None:
    """Sum and Mean of any number of inputs: additions in turn, and for the mean a division."""
    count = len(view.node.inputs)
    shapes = [view.shape(i) for i in range(count)]
    if view.version < 8 or any(shape is None for shape in shapes):
        return None  # without broadcasting, or without shapes
    made: list[Step] = []
    for i in range(1, count):
        shape = tuple(np.broadcast_shapes(*(s for s in shapes[: i + 1] if s is not None)))
        made.append(Step("add", {"number": None, "alpha": 1.0}, shape, other=i))
    if view.node.op_type == "Mean" and count > 1:
        made.append(Step("div", {"number": float(count), "alpha": 1.0}))
    return Steps(tuple(made)) if made else _one("identity")


def _clip(view: NodeView) -> Steps | None:
    if view.version < 11:
        given = low, high = view.attr("min"), view.attr("max")
    else:
        given = view.input(1), view.input(2)
        low, high = map(view.constants.array, given)
    if given == (None, None):
        return _one("identity")
    if low is None or np.any(low):
        return _one("clamp")
    if given[1] is None:
        return _one("relu")
    return _one("relu6") if high is not None and np.all(high == 6) else _one("clamp")


def _softmax(view: NodeView) -> Steps | None:
    """Before opset 13 it is one over all axes from `axis` on."""
    shape = view.shape()
    axis = view.attr("axis", -1 if view.version >= 13 else 1)
    if shape is None or (view.version < 13 and axis % len(shape) != len(shape) - 1):
        return None
    return _one("softmax", axis=axis)


def _grid_sample(view: NodeView) -> Steps:
    zeros = view.attr("padding_mode", "zeros") == "zeros"
    return Steps((Step("grid_sample", {"zeros": zeros}),), (0, 1))


_ACTIVATIONS = "Sigmoid Tanh Elu Selu Celu Mish Softplus Gelu HardSwish HardSigmoid Erf".split()
"""Ops that no map passes, by the names that an insertion knows them by."""

_TABLE: dict[str, Translator] = {
    **{name: _fixed("reshape") for name in ("Reshape", "Flatten", "Squeeze", "Unsqueeze")},
    "Identity": _fixed("identity"),
    "Cast": _cast,
    "CastLike": _fixed("identity"),
    "Dropout": _dropout,
    "Transpose": _transpose,
    "Slice": _slice,
    "Gather": _gather,
    "Split": lambda view: _one("split", axis=view.attr("axis", 0)),
    "Concat": _concat,
    "DepthToSpace": _pixels,
    "SpaceToDepth": _pixels,
    "AveragePool": _avg_pool,
    "MaxPool": _max_pool,
    "GlobalAveragePool": _global("mean"),
    "GlobalMaxPool": _global("amax"),
    "ReduceMean": _reduce("mean"),
    "ReduceMax": _reduce("amax"),
    "ReduceMin": _reduce("amin"),
    "TopK": lambda view: _one("order_statistic", axes=(view.attr("axis", -1),), keepdim=True),
    "GridSample": _grid_sample,
    "ReduceSum": _reduce("sum"),
    "Tile": _fixed("repeat"),
    "Expand": _fixed("expand"),
    "Resize": _resize,
    "Upsample": _resize,
    "Pad": _pad,
    "Add": _binary("add"),
    "Sub": _binary("sub"),
    "Mul": _binary("mul"),
    "Div": _binary("div"),
    "Sum": _sum,
    "Mean": _sum,
    "Neg": lambda view: _one("mul", number=-1.0, alpha=1.0),
    "Relu": _fixed("relu"),
    "Clip": _clip,
    **{name: _fixed(name.lower()) for name in _ACTIVATIONS},
    "LeakyRelu": lambda view: _one("leaky_relu", slope=float(view.attr("alpha", 0.01))),
    "MatMul": lambda view: Steps((Step("product", {}),), (0, 1)),
    "Softmax": _softmax,
    "PRelu": lambda view: Steps((Step("prelu", {}),), (0, 1)),
    "Pow": lambda view: Steps((Step("pow", {}),), (0, 1)),
}
