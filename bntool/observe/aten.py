"""ATen operations in bntool's words: one small table from operator names to a kind and its attributes.

An operator that is not in the table keeps its own name as its kind: no law knows it, so nothing moves
through it. Attributes are plain Python values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bntool.graph.dataflow import Value, is_out
from bntool.observe.aten_calls import (
    Bound,
    Translation,
    to_adaptive,
    to_axis,
    to_batch_norm,
    to_binary,
    to_clamp,
    to_conv,
    to_convolution,
    to_dropout,
    to_fixed,
    to_grid_sample,
    to_hardtanh,
    to_index,
    to_mean,
    to_mode_pad,
    to_move,
    to_narrow,
    to_native_batch_norm,
    to_order_statistic,
    to_pad,
    to_permute,
    to_pool,
    to_power,
    to_reduction,
    to_repeat_interleave,
    to_scatter,
    to_scatter_reduce,
    to_slice,
    to_sorted,
    to_transpose,
    to_vector_norm,
    whole_numbers,
)

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


_TABLE: dict[str, Callable[[Bound], Translation]] = {
    "convolution": to_convolution,
    "_convolution": to_convolution,
    "linear": to_fixed("linear"),
    "mm": to_fixed("matmul"),
    "bmm": to_fixed("product"),
    "softmax": to_axis("softmax"),
    "_softmax": to_axis("softmax"),
    "scaled_dot_product_attention": lambda b: (
        "scaled_dot_product_attention",
        {"dropout": bool(b.get("dropout_p"))},
    ),
    "batch_norm": to_batch_norm,
    "native_batch_norm": to_native_batch_norm,
    "_native_batch_norm_legit_no_training": to_native_batch_norm,
    "cudnn_batch_norm": to_native_batch_norm,
    "permute": to_permute,
    "transpose": to_transpose,
    "swapaxes": lambda b: ("permute", {"swap": (b["axis0"], b["axis1"])}),
    "swapdims": to_transpose,
    "mT": to_fixed("permute", swap=(-2, -1)),
    "mH": to_fixed("permute", swap=(-2, -1)),
    "adjoint": to_fixed("permute", swap=(-2, -1)),
    "movedim": to_move,
    "moveaxis": to_move,
    "t": to_transpose,
    "slice": to_slice,
    "narrow": to_narrow,
    "select": lambda b: ("select", {"axis": b["dim"], "index": b["index"]}),
    "flip": lambda b: ("flip", {"axes": whole_numbers(b["dims"])}),
    "fliplr": to_fixed("flip", axes=(1,)),
    "flipud": to_fixed("flip", axes=(0,)),
    "roll": lambda b: (
        "roll",
        {"axes": whole_numbers(b.get("dims", ())), "shifts": whole_numbers(b["shifts"])},
    ),
    "unbind": to_axis("unbind"),
    "unfold": lambda b: ("unfold", {"axis": b["dimension"]}),
    "hsplit": to_fixed("split", axis=1),
    "vsplit": to_fixed("split", axis=0),
    "dsplit": to_fixed("split", axis=2),
    "split": lambda b: ("split", {"axis": b.get("dim", 0)}),
    "split_with_sizes": lambda b: ("split", {"axis": b.get("dim", 0)}),
    "chunk": lambda b: ("split", {"axis": b.get("dim", 0)}),
    "tensor_split": lambda b: ("split", {"axis": b.get("dim", 0)}),
    "unsafe_split": lambda b: ("split", {"axis": b.get("dim", 0)}),
    "unsafe_chunk": lambda b: ("split", {"axis": b.get("dim", 0)}),
    "cat": to_axis("concat"),
    "concat": to_axis("concat"),
    "concatenate": to_axis("concat"),
    "hstack": to_fixed("concat", axis=1),
    "column_stack": to_fixed("concat", axis=1),
    "vstack": to_fixed("concat", axis=0),
    "dstack": to_fixed("concat", axis=2),
    "stack": to_axis("stack"),
    "mean": to_mean,
    "amax": to_reduction("amax"),
    "amin": to_reduction("amin"),
    "max": to_order_statistic("maximum"),
    "min": to_order_statistic("minimum"),
    "median": to_order_statistic("median"),
    "kthvalue": lambda b: to_reduction("order_statistic")({"dim": -1, **b}),
    "sort": to_sorted,
    "topk": to_sorted,
    "grid_sampler": to_grid_sample,
    "grid_sampler_2d": to_grid_sample,
    "grid_sampler_3d": to_grid_sample,
    "sum": to_reduction("sum"),
    **{kind: to_reduction(kind) for kind in ("std", "var", "std_mean", "var_mean")},
    "linalg_vector_norm": to_vector_norm,
    "norm": to_vector_norm,
    "scatter_add": to_scatter("scatter_sum", "src"),
    "scatter_reduce": to_scatter_reduce,
    "index_add": to_scatter("scatter_sum", "source"),
    "index": to_index,
    "index_select": lambda b: ("index_select", {"axis": b["dim"]}),
    "repeat_interleave": to_repeat_interleave,
    "expand_as": to_fixed("expand"),
    "broadcast_to": to_fixed("expand"),
    "tile": to_fixed("repeat"),
    "pixel_shuffle": lambda b: ("pixel_shuffle", {"factor": b["upscale_factor"]}),
    "pixel_unshuffle": lambda b: ("pixel_unshuffle", {"factor": b["downscale_factor"]}),
    "channel_shuffle": lambda b: ("channel_shuffle", {"groups": b["groups"]}),
    "native_channel_shuffle": lambda b: ("channel_shuffle", {"groups": b["groups"]}),
    "add": to_binary("add"),
    "addcmul": lambda b: ("addcmul", {"alpha": float(b.get("value", 1))}),
    "sub": to_binary("sub"),
    "subtract": to_binary("sub"),
    "rsub": to_binary("rsub"),
    "mul": to_binary("mul"),
    "multiply": to_binary("mul"),
    "div": to_binary("div"),
    "divide": to_binary("div"),
    "true_divide": to_binary("div"),
    "neg": to_fixed("mul", number=-1.0, alpha=1.0),
    "pow": to_power,
    "negative": to_fixed("mul", number=-1.0, alpha=1.0),
    "relu": to_fixed("relu"),
    "leaky_relu": lambda b: ("leaky_relu", {"slope": float(b.get("negative_slope", 0.01))}),
    "prelu": to_fixed("prelu", axis=1),
    "relu6": to_fixed("relu6"),
    "log_sigmoid": to_fixed("logsigmoid"),
    "hardtanh": to_hardtanh,
    "clamp": to_clamp,
    "clip": to_clamp,
    "clamp_min": lambda b: to_clamp({"min": b.get("min")}),
    "clamp_max": lambda b: to_clamp({"max": b.get("max")}),
    "constant_pad_nd": to_pad,
    "pad": to_pad,
    "dropout": to_dropout,
    "feature_dropout": to_dropout,
    "alpha_dropout": to_dropout,
    **{f"conv{d}d": to_conv(d, False) for d in (1, 2, 3)},
    **{f"conv_transpose{d}d": to_conv(d, True) for d in (1, 2, 3)},
    **{f"adaptive_avg_pool{d}d": to_adaptive("adaptive_avg_pool", d) for d in (1, 2, 3)},
    **{f"adaptive_max_pool{d}d": to_adaptive("max_pool", d) for d in (1, 2, 3)},
    **{f"avg_pool{d}d": to_pool("avg_pool", d) for d in (1, 2, 3)},
    **{f"max_pool{d}d": to_pool("max_pool", d) for d in (1, 2, 3)},
    **{f"max_pool{d}d_with_indices": to_pool("max_pool", d) for d in (1, 2, 3)},
    **{f"reflection_pad{d}d": to_mode_pad("reflect") for d in (1, 2, 3)},
    **{f"replication_pad{d}d": to_mode_pad("replicate") for d in (1, 2, 3)},
    **{name: to_fixed("reshape") for name in _RESHAPES},
    **{name: to_fixed("identity") for name in _IDENTITIES if "dropout" not in name},
    **{name: to_fixed("upsample") for name in _UPSAMPLES},
}
