"""One call of an ATen operator in bntool's words: kind and attributes, from the arguments of its schema."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Bound = dict[str, Any]
Translation = tuple[str, dict[str, Any]]


def to_conv(dims: int, transposed: bool) -> Callable[[Bound], Translation]:
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


def to_convolution(b: Bound) -> Translation:
    return to_conv(len(b["stride"]), b["transposed"])(b)


def to_batch_norm(b: Bound) -> Translation:
    return "batch_norm", {"eps": b["eps"], "training": bool(b["training"]), "axis": 1}


def to_native_batch_norm(b: Bound) -> Translation:
    return "batch_norm", {"eps": b["eps"], "training": bool(b.get("training", False)), "axis": 1}


def to_permute(b: Bound) -> Translation:
    return "permute", {"dims": tuple(b["dims"])}


def to_transpose(b: Bound) -> Translation:
    return "permute", {"swap": (b.get("dim0", 0), b.get("dim1", 1))}


def to_slice(b: Bound) -> Translation:
    return "slice", {
        "axis": b.get("dim", 0),
        "start": b.get("start"),
        "stop": b.get("end"),
        "step": b.get("step", 1),
    }


def to_narrow(b: Bound) -> Translation:
    if not isinstance(b["start"], int):
        return "narrow", {}
    stop = b["start"] + b["length"]
    return "slice", {"axis": b["dim"], "start": b["start"], "stop": stop or None, "step": 1}


def to_pool(kind: str, dims: int) -> Callable[[Bound], Translation]:
    def translator(b: Bound) -> Translation:
        return kind, {
            "dims": dims,
            "padding": _tuple(b.get("padding", 0), dims),
            "ceil_mode": bool(b.get("ceil_mode", False)),
            "count_include_pad": bool(b.get("count_include_pad", True)),
            "divisor_override": b.get("divisor_override"),
            "single": all(n == 1 for n in _tuple(b["kernel_size"], dims)),
        }

    return translator


def to_adaptive(kind: str, dims: int) -> Callable[[Bound], Translation]:
    return lambda b: (kind, {"dims": dims})


def to_mean(b: Bound) -> Translation:
    return "mean", {"axes": b.get("dim"), "keepdim": bool(b.get("keepdim", False))}


def to_reduction(kind: str) -> Callable[[Bound], Translation]:
    def translator(b: Bound) -> Translation:
        axes = b.get("dim")
        return kind, {"axes": (axes,) if isinstance(axes, int) else axes, "keepdim": bool(b.get("keepdim"))}

    return translator


def to_order_statistic(kind: str) -> Callable[[Bound], Translation]:
    """Of all, along one axis with the places of what was found, or (`kind`) of two tensors."""

    def translator(b: Bound) -> Translation:
        return (kind, {}) if "other" in b else to_reduction("order_statistic")(b)

    return translator


def to_vector_norm(b: Bound) -> Translation:
    """Any order but zero, which counts, scales with its input."""
    order = b.get("ord", b.get("p", 2))
    known = order is None or (isinstance(order, int | float) and order != 0)
    return to_reduction("vector_norm")(b) if known else ("norm", {})


def to_scatter(kind: str, role: str) -> Callable[[Bound], Translation]:
    """Values added up at places; `role` is what the operator calls them."""
    return lambda b: (kind, {"axis": b["dim"], "source": role, "elementwise": role == "src"})


def to_scatter_reduce(b: Bound) -> Translation:
    kinds = {"sum": "sum", "mean": "mean", "amax": "extreme", "amin": "extreme"}
    if b.get("reduce") not in kinds:
        return "scatter_reduce", {}
    kind, attrs = to_scatter(f"scatter_{kinds[b['reduce']]}", "src")(b)
    return kind, {**attrs, "apart": not b.get("include_self", True)}


def to_grid_sample(b: Bound) -> Translation:
    return "grid_sample", {"zeros": b["padding_mode"] == 0}


def to_sorted(b: Bound) -> Translation:
    return "order_statistic", {"axes": (b.get("dim", -1),), "keepdim": True}


def to_move(b: Bound) -> Translation:
    ends = (b["source"], b["destination"])
    return "permute", {"move": tuple((end,) if isinstance(end, int) else tuple(end) for end in ends)}


def to_repeat_interleave(b: Bound) -> Translation:
    if not isinstance(b.get("repeats"), int) or b.get("dim") is None:
        return "repeat_interleave", {}
    return "index_select", {"axis": b["dim"], "repeats": b["repeats"]}


def whole_numbers(value: Any) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def to_index(b: Bound) -> Translation:
    """x[:, [0, 2]] picks along one axis; of several index tensors no law knows."""
    axes = [axis for axis, index in enumerate(b["indices"]) if index is not None]
    return ("index_select", {"axis": axes[0]}) if len(axes) == 1 else ("index", {})


def to_axis(kind: str) -> Callable[[Bound], Translation]:
    return lambda b: (kind, {"axis": b.get("dim", 0)})


def to_binary(kind: str) -> Callable[[Bound], Translation]:
    def translator(b: Bound) -> Translation:
        # a decomposed `1 - x` has its number first
        numbers = [n for n in (b.get("other"), b.get("self")) if isinstance(n, bool | int | float)]
        number = float(numbers[0]) if numbers else None
        if kind == "div" and b.get("rounding_mode") is not None:
            return "div_rounded", {}
        return kind, {"number": number, "alpha": float(b.get("alpha", 1))}

    return translator


def to_power(b: Bound) -> Translation:
    """Of a number; one of a tensor of powers, or of a number to the data, has none."""
    exponent = b.get("exponent")
    return "pow", {"number": float(exponent)} if isinstance(exponent, int | float) else {}


def to_hardtanh(b: Bound) -> Translation:
    low, high = float(b.get("min_val", -1)), float(b.get("max_val", 1))
    return ("relu6", {}) if (low, high) == (0.0, 6.0) else ("hardtanh", {"low": low, "high": high})


def to_clamp(b: Bound) -> Translation:
    low, high = b.get("min"), b.get("max")
    if isinstance(low, int | float) and float(low) == 0.0:
        if high is None:
            return "relu", {}
        if isinstance(high, int | float) and float(high) == 6.0:
            return "relu6", {}
    return "clamp", {"low": low, "high": high}


def to_pad(b: Bound) -> Translation:
    mode = b.get("mode", "constant")
    return "pad", {"mode": mode, "pads": tuple(b["pad"]), "value": float(b.get("value") or 0.0)}


def to_mode_pad(mode: str) -> Callable[[Bound], Translation]:
    return lambda b: ("pad", {"mode": mode, "pads": tuple(b["padding"]), "value": 0.0})


def to_dropout(b: Bound) -> Translation:
    return ("dropout", {}) if b.get("train") else ("identity", {})


def to_fixed(kind: str, **attrs: Any) -> Callable[[Bound], Translation]:
    return lambda b: (kind, dict(attrs))


def _tuple(value: Any, dims: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * dims
    numbers = tuple(int(v) for v in value)
    return numbers * dims if len(numbers) == 1 else numbers
