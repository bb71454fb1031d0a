"""ATen operations in bntool's words: one small table from operator names to a kind and its attributes.

An operator that is not in the table keeps its own name as its kind: no law knows it, so nothing moves
through it. Attributes are plain Python values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bntool.graph.dataflow import Value, is_out

Bound = dict[str, Any]
Translation = tuple[str, dict[str, Any]]

SHAPE_ONLY: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("reshape_as", "view_as", "expand_as", "type_as"), ("other",)),
    **dict.fromkeys(
        """zeros_like ones_like full_like empty_like rand_like randn_like
        new_zeros new_ones new_full new_empty""".split(),
        ("input",),
    ),
}
"""Operands of which only the shape or the type is read, never the numbers."""

_RESHAPES = "view reshape unflatten ravel reshape_as view_as _unsafe_view _reshape_alias".split()
_IDENTITIES = (
    "contiguous clone detach detach_ alias lift_fresh to _to_copy type_as feature_dropout dropout".split()
)
_UPSAMPLES = """upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d
upsample_trilinear3d upsample_bicubic2d _upsample_nearest_exact1d _upsample_nearest_exact2d
_upsample_nearest_exact3d _upsample_bilinear2d_aa _upsample_bicubic2d_aa""".split()


def translate(name: str, bound: Bound) -> Translation:
    """Kind and attributes of one call of the operator `name` with schema-named arguments `bound`."""
    bare = name.rstrip("_") if not name.startswith("__") else name
    translator = _TABLE.get(bare)
    if translator is None:
        return bare, {}
    return translator(bound)


def product_of(inputs: dict[str, int], values: Sequence[Value]) -> tuple[str, dict[str, int]]:
    """Kind and roles of a matrix product: one with a weight, or of two values that depend on the data.

    `inputs` are its operands by role, as places in `values`, the values of the graph.
    """
    if not any(values[value].constant for role, value in inputs.items() if not is_out(role)):
        return "product", inputs
    roles = {role: role if role == "input" or is_out(role) else "weight" for role in inputs}
    return "matmul", {roles[role]: value for role, value in inputs.items()}


def _conv(dims: int, transposed: bool) -> Callable[[Bound], Translation]:
    def translator(b: Bound) -> Translation:
        return "conv", {
            "dims": dims,
            "transposed": transposed,
            "stride": _tuple(b.get("stride", 1), dims),
            "padding": b.get("padding", 0)
            if isinstance(b.get("padding"), str)
            else _tuple(b.get("padding", 0), dims),
            "dilation": _tuple(b.get("dilation", 1), dims),
            "groups": b.get("groups", 1),
            "output_padding": _tuple(b.get("output_padding", 0), dims),
        }

    return translator


def _convolution(b: Bound) -> Translation:
    return _conv(len(b["stride"]), b["transposed"])(b)


def _batch_norm(b: Bound) -> Translation:
    return "batch_norm", {"eps": b["eps"], "training": bool(b["training"]), "axis": 1}


def _native_batch_norm(b: Bound) -> Translation:
    return "batch_norm", {"eps": b["eps"], "training": bool(b.get("training", False)), "axis": 1}


def _permute(b: Bound) -> Translation:
    return "permute", {"dims": tuple(b["dims"])}


def _transpose(b: Bound) -> Translation:
    return "permute", {"swap": (b.get("dim0", 0), b.get("dim1", 1))}


def _slice(b: Bound) -> Translation:
    return "slice", {
        "axis": b.get("dim", 0),
        "start": b.get("start"),
        "stop": b.get("end"),
        "step": b.get("step", 1),
    }


def _narrow(b: Bound) -> Translation:
    if not isinstance(b["start"], int):
        return "narrow", {}
    stop = b["start"] + b["length"]
    return "slice", {"axis": b["dim"], "start": b["start"], "stop": stop or None, "step": 1}


def _pool(kind: str, dims: int) -> Callable[[Bound], Translation]:
    def translator(b: Bound) -> Translation:
        return kind, {
            "dims": dims,
            "padding": _tuple(b.get("padding", 0), dims),
            "ceil_mode": bool(b.get("ceil_mode", False)),
            "count_include_pad": bool(b.get("count_include_pad", True)),
            "divisor_override": b.get("divisor_override"),
        }

    return translator


def _adaptive(kind: str, dims: int) -> Callable[[Bound], Translation]:
    return lambda b: (kind, {"dims": dims})


def _mean(b: Bound) -> Translation:
    return "mean", {"axes": b.get("dim"), "keepdim": bool(b.get("keepdim", False))}


def _reduction(kind: str) -> Callable[[Bound], Translation]:
    def translator(b: Bound) -> Translation:
        axes = b.get("dim")
        return kind, {"axes": (axes,) if isinstance(axes, int) else axes, "keepdim": bool(b.get("keepdim"))}

    return translator


def _order_statistic(kind: str) -> Callable[[Bound], Translation]:
    """Of all, along one axis with the places of what was found, or (`kind`) of two tensors."""

    def translator(b: Bound) -> Translation:
        return (kind, {}) if "other" in b else _reduction("order_statistic")(b)

    return translator


def _vector_norm(b: Bound) -> Translation:
    """Any order but zero, which counts, scales with its input."""
    order = b.get("ord", b.get("p", 2))
    known = order is None or (isinstance(order, int | float) and order != 0)
    return _reduction("vector_norm")(b) if known else ("norm", {})


def _scatter(kind: str, role: str) -> Callable[[Bound], Translation]:
    """Values added up at places; `role` is what the operator calls them."""
    return lambda b: (kind, {"axis": b["dim"], "source": role, "elementwise": role == "src"})


def _scatter_reduce(b: Bound) -> Translation:
    kinds = {"sum": "sum", "mean": "mean", "amax": "extreme", "amin": "extreme"}
    if b.get("reduce") not in kinds or not b.get("include_self", True):
        return "scatter_reduce", {}
    return _scatter(f"scatter_{kinds[b['reduce']]}", "src")(b)


def _grid_sample(b: Bound) -> Translation:
    return "grid_sample", {"zeros": b["padding_mode"] == 0}


def _sorted(b: Bound) -> Translation:
    return "order_statistic", {"axes": (b.get("dim", -1),), "keepdim": True}


def _move(b: Bound) -> Translation:
    ends = (b["source"], b["destination"])
    return "permute", {"move": tuple((end,) if isinstance(end, int) else tuple(end) for end in ends)}


def _repeat_interleave(b: Bound) -> Translation:
    if not isinstance(b.get("repeats"), int) or b.get("dim") is None:
        return "repeat_interleave", {}
    return "index_select", {"axis": b["dim"], "repeats": b["repeats"]}


def _numbers(value: Any) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def _index(b: Bound) -> Translation:
    """x[:, [0, 2]] picks along one axis; of several index tensors no law knows."""
    axes = [axis for axis, index in enumerate(b["indices"]) if index is not None]
    return ("index_select", {"axis": axes[0]}) if len(axes) == 1 else ("index", {})


def _axis(kind: str) -> Callable[[Bound], Translation]:
    return lambda b: (kind, {"axis": b.get("dim", 0)})


def _binary(kind: str) -> Callable[[Bound], Translation]:
    def translator(b: Bound) -> Translation:
        # a decomposed `1 - x` has its number first
        numbers = [n for n in (b.get("other"), b.get("self")) if isinstance(n, bool | int | float)]
        number = float(numbers[0]) if numbers else None
        if kind == "div" and b.get("rounding_mode") is not None:
            return "div_rounded", {}
        return kind, {"number": number, "alpha": float(b.get("alpha", 1))}

    return translator


def _hardtanh(b: Bound) -> Translation:
    low, high = float(b.get("min_val", -1)), float(b.get("max_val", 1))
    return ("relu6", {}) if (low, high) == (0.0, 6.0) else ("hardtanh", {"low": low, "high": high})


def _clamp(b: Bound) -> Translation:
    low, high = b.get("min"), b.get("max")
    if isinstance(low, int | float) and float(low) == 0.0:
        if high is None:
            return "relu", {}
        if isinstance(high, int | float) and float(high) == 6.0:
            return "relu6", {}
    return "clamp", {"low": low, "high": high}


def _pad(b: Bound) -> Translation:
    mode = b.get("mode", "constant")
    return "pad", {"mode": mode, "pads": tuple(b["pad"]), "value": float(b.get("value") or 0.0)}


def _mode_pad(mode: str) -> Callable[[Bound], Translation]:
    return lambda b: ("pad", {"mode": mode, "pads": tuple(b["padding"]), "value": 0.0})


def _dropout(b: Bound) -> Translation:
    return ("dropout", {}) if b.get("train") else ("identity", {})


def _fixed(kind: str, **attrs: Any) -> Callable[[Bound], Translation]:
    return lambda b: (kind, dict(attrs))


_TABLE: dict[str, Callable[[Bound], Translation]] = {
    "convolution": _convolution,
    "_convolution": _convolution,
    "linear": _fixed("linear"),
    "mm": _fixed("matmul"),
    "bmm": _fixed("product"),
    "softmax": _axis("softmax"),
    "_softmax": _axis("softmax"),
    "scaled_dot_product_attention": lambda b: (
        "scaled_dot_product_attention",
        {"dropout": bool(b.get("dropout_p"))},
    ),
    "batch_norm": _batch_norm,
    "native_batch_norm": _native_batch_norm,
    "_native_batch_norm_legit_no_training": _native_batch_norm,
    "cudnn_batch_norm": _native_batch_norm,
    "permute": _permute,
    "transpose": _transpose,
    "swapaxes": lambda b: ("permute", {"swap": (b["axis0"], b["axis1"])}),
    "swapdims": _transpose,
    "mT": _fixed("permute", swap=(-2, -1)),
    "mH": _fixed("permute", swap=(-2, -1)),
    "adjoint": _fixed("permute", swap=(-2, -1)),
    "movedim": _move,
    "moveaxis": _move,
    "t": _transpose,
    "slice": _slice,
    "narrow": _narrow,
    "select": lambda b: ("select", {"axis": b["dim"], "index": b["index"]}),
    "flip": lambda b: ("flip", {"axes": _numbers(b["dims"])}),
    "fliplr": _fixed("flip", axes=(1,)),
    "flipud": _fixed("flip", axes=(0,)),
    "roll": lambda b: ("roll", {"axes": _numbers(b.get("dims", ())), "shifts": _numbers(b["shifts"])}),
    "unbind": _axis("unbind"),
    "unfold": lambda b: ("unfold", {"axis": b["dimension"]}),
    "hsplit": _fixed("split", axis=1),
    "vsplit": _fixed("split", axis=0),
    "dsplit": _fixed("split", axis=2),
    "split": lambda b: ("split", {"axis": b.get("dim", 0)}),
    "split_with_sizes": lambda b: ("split", {"axis": b.get("dim", 0)}),
    "chunk": lambda b: ("split", {"axis": b.get("dim", 0)}),
    "tensor_split": lambda b: ("split", {"axis": b.get("dim", 0)}),
    "unsafe_split": lambda b: ("split", {"axis": b.get("dim", 0)}),
    "unsafe_chunk": lambda b: ("split", {"axis": b.get("dim", 0)}),
    "cat": _axis("concat"),
    "concat": _axis("concat"),
    "concatenate": _axis("concat"),
    "hstack": _fixed("concat", axis=1),
    "column_stack": _fixed("concat", axis=1),
    "vstack": _fixed("concat", axis=0),
    "dstack": _fixed("concat", axis=2),
    "stack": _axis("stack"),
    "mean": _mean,
    "amax": _reduction("amax"),
    "amin": _reduction("amin"),
    "max": _order_statistic("maximum"),
    "min": _order_statistic("minimum"),
    "median": _order_statistic("median"),
    "kthvalue": lambda b: _reduction("order_statistic")({"dim": -1, **b}),
    "sort": _sorted,
    "topk": _sorted,
    "grid_sampler": _grid_sample,
    "grid_sampler_2d": _grid_sample,
    "grid_sampler_3d": _grid_sample,
    "sum": _reduction("sum"),
    **{kind: _reduction(kind) for kind in ("std", "var", "std_mean", "var_mean")},
    "linalg_vector_norm": _vector_norm,
    "norm": _vector_norm,
    "scatter_add": _scatter("scatter_sum", "src"),
    "scatter_reduce": _scatter_reduce,
    "index_add": _scatter("scatter_sum", "source"),
    "index": _index,
    "index_select": lambda b: ("index_select", {"axis": b["dim"]}),
    "repeat_interleave": _repeat_interleave,
    "expand_as": _fixed("expand"),
    "broadcast_to": _fixed("expand"),
    "tile": _fixed("repeat"),
    "pixel_shuffle": lambda b: ("pixel_shuffle", {"factor": b["upscale_factor"]}),
    "pixel_unshuffle": lambda b: ("pixel_unshuffle", {"factor": b["downscale_factor"]}),
    "channel_shuffle": lambda b: ("channel_shuffle", {"groups": b["groups"]}),
    "native_channel_shuffle": lambda b: ("channel_shuffle", {"groups": b["groups"]}),
    "add": _binary("add"),
    "addcmul": lambda b: ("addcmul", {"alpha": float(b.get("value", 1))}),
    "sub": _binary("sub"),
    "subtract": _binary("sub"),
    "rsub": _binary("rsub"),
    "mul": _binary("mul"),
    "multiply": _binary("mul"),
    "div": _binary("div"),
    "divide": _binary("div"),
    "true_divide": _binary("div"),
    "neg": _fixed("mul", number=-1.0, alpha=1.0),
    "negative": _fixed("mul", number=-1.0, alpha=1.0),
    "relu": _fixed("relu"),
    "leaky_relu": lambda b: ("leaky_relu", {"slope": float(b.get("negative_slope", 0.01))}),
    "prelu": _fixed("prelu"),
    "relu6": _fixed("relu6"),
    "log_sigmoid": _fixed("logsigmoid"),
    "hardtanh": _hardtanh,
    "clamp": _clamp,
    "clip": _clamp,
    "clamp_min": lambda b: _clamp({"min": b.get("min")}),
    "clamp_max": lambda b: _clamp({"max": b.get("max")}),
    "constant_pad_nd": _pad,
    "pad": _pad,
    "dropout": _dropout,
    "feature_dropout": _dropout,
    "alpha_dropout": _dropout,
    **{f"conv{d}d": _conv(d, False) for d in (1, 2, 3)},
    **{f"conv_transpose{d}d": _conv(d, True) for d in (1, 2, 3)},
    **{f"adaptive_avg_pool{d}d": _adaptive("adaptive_avg_pool", d) for d in (1, 2, 3)},
    **{f"adaptive_max_pool{d}d": _adaptive("max_pool", d) for d in (1, 2, 3)},
    **{f"avg_pool{d}d": _pool("avg_pool", d) for d in (1, 2, 3)},
    **{f"max_pool{d}d": _pool("max_pool", d) for d in (1, 2, 3)},
    **{f"max_pool{d}d_with_indices": _pool("max_pool", d) for d in (1, 2, 3)},
    **{f"reflection_pad{d}d": _mode_pad("reflect") for d in (1, 2, 3)},
    **{f"replication_pad{d}d": _mode_pad("replicate") for d in (1, 2, 3)},
    **{name: _fixed("reshape") for name in _RESHAPES},
    **{name: _fixed("identity") for name in _IDENTITIES if "dropout" not in name},
    **{name: _fixed("upsample") for name in _UPSAMPLES},
}


def _tuple(value: Any, dims: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * dims
    numbers = tuple(int(v) for v in value)
    return numbers * dims if len(numbers) == 1 else numbers
