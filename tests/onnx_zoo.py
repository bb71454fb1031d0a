"""Little ONNX nets, each with the verdict that algebra gives every one of its BatchNorms.

A net is written as ONNX text, one node a line; a node bears the name of its first output, `BN(x)` stands for
a BatchNormalization with statistics of its own. Numbers are random and seeded, γ is positive unless a net
says otherwise.
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from bntool.core.reasons import Reason

FOLDED = "folded"
Verdict = str | Reason
Shape = tuple[int | str, ...]
IMAGE: Shape = (2, 4, 8, 8)
SIZES = {"N": 3, "H": 8, "W": 8, "L": 5}
"""What an open axis is at run time."""


@dataclasses.dataclass(frozen=True)
class OnnxNet:
    name: str
    verdicts: Mapping[str, Verdict]
    body: str
    tensors: Mapping[str, Any]
    inputs: Mapping[str, Shape]
    outputs: Sequence[str]
    opset: int
    ir_version: int
    imports: Mapping[str, int]
    has_reference: bool
    """Whether ONNX's reference implementation computes the net: before opset 14 it takes the batch's own
    statistics, and it knows no grouped transposed convolution."""

    def model(self, dtype: Any = np.float32) -> onnx.ModelProto:
        """The model with its numbers in float32 or float64."""
        code = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        nodes = [_node(line) for line in self.body.strip().splitlines() if line.strip()]
        initializers = []
        for name, what in self.tensors.items():
            for part, array in _arrays(name, what).items():
                array = array.astype(dtype) if array.dtype == np.float64 else array
                initializers.append(numpy_helper.from_array(array, part))
        graph = helper.make_graph(
            nodes,
            self.name,
            [helper.make_tensor_value_info(name, code, shape) for name, shape in self.inputs.items()],
            [helper.make_tensor_value_info(name, code, None) for name in self.outputs],
            initializers,
        )
        imports = [helper.make_opsetid("", self.opset)]
        imports += [helper.make_opsetid(domain, version) for domain, version in self.imports.items()]
        model = helper.make_model(graph, opset_imports=imports, producer_name="zoo")
        model.ir_version = self.ir_version
        if self.ir_version < 4:
            graph_inputs = model.graph.input
            graph_inputs.extend(
                helper.make_tensor_value_info(t.name, t.data_type, list(t.dims))
                for t in model.graph.initializer
            )
        return onnx.shape_inference.infer_shapes(model)

    def feed(self, dtype: Any = np.float32) -> dict[str, Any]:
        random = np.random.default_rng(1)
        return {
            name: random.standard_normal([SIZES[n] if isinstance(n, str) else n for n in shape]).astype(dtype)
            for name, shape in self.inputs.items()
        }


def _node(line: str) -> onnx.NodeProto:
    output = re.split("[=,]", line, maxsplit=1)[0].strip()
    if "BN" in line:
        before, _, after = line.partition("BN")
        options, _, rest = after.partition("(")
        source = rest.rstrip(") ")
        own = source.split(",")[1].strip() if "," in source else output
        source = source.split(",")[0]
        stats = ", ".join(f"{own}.{slot}" for slot in ("weight", "bias", "mean", "var"))
        line = f"{before}BatchNormalization{options}({source}, {stats})"
    node = onnx.parser.parse_node(re.sub(r"([A-Za-z]\w*)\.([A-Za-z])", r"\1_dot_\2", line.strip()))
    for names in (node.input, node.output):
        restored = [name.replace("_dot_", ".") for name in names]
        del names[:]
        names.extend(restored)
    node.name = output
    return node


def _arrays(name: str, what: Any) -> dict[str, Any]:
    random = np.random.default_rng(zlib.crc32(name.encode()))
    if isinstance(what, int):
        return {
            f"{name}.weight": random.uniform(0.5, 1.5, what),
            f"{name}.bias": random.standard_normal(what),
            f"{name}.mean": random.standard_normal(what),
            f"{name}.var": random.uniform(0.5, 2.5, what),
        }
    if isinstance(what, tuple):
        return {name: random.standard_normal(what)}
    array = np.asarray(what)
    return {name: array}


ONNX_ZOO: list[OnnxNet] = []


def zoo(
    name: str,
    verdicts: Mapping[str, Verdict],
    body: str,
    tensors: Mapping[str, Any],
    *,
    inputs: Mapping[str, Shape] | None = None,
    outputs: Sequence[str] = ("y",),
    opset: int = 17,
    ir_version: int = 8,
    imports: Mapping[str, int] | None = None,
    has_reference: bool = True,
) -> None:
    inputs, imports = inputs or {"x": IMAGE}, imports or {}
    ONNX_ZOO.append(
        OnnxNet(name, verdicts, body, tensors, inputs, outputs, opset, ir_version, imports, has_reference)
    )


def ints(*numbers: int) -> Any:
    return np.array(numbers, dtype=np.int64)


W = (6, 4, 3, 3)
SAME = "<pads=[1,1,1,1]>"

# -- a layer and its BatchNorm ------------------------------------------------------------------------

zoo("conv", {"y": FOLDED}, "c = Conv(x, w)\ny = BN(c)", {"w": W, "y": 6})
zoo("conv_bias", {"y": FOLDED}, f"c = Conv{SAME}(x, w, b)\ny = BN(c)", {"w": W, "b": (6,), "y": 6})
zoo("conv_named_weight", {"y": FOLDED}, "c = Conv(x, conv.weight)\ny = BN(c)", {"conv.weight": W, "y": 6})
zoo(
    "conv_grouped",
    {"y": FOLDED},
    "c = Conv<group=2, strides=[2,2]>(x, w)\ny = BN(c)",
    {"w": (6, 2, 3, 3), "y": 6},
)
zoo("conv_same_upper", {"y": FOLDED}, 'c = Conv<auto_pad="SAME_UPPER">(x, w)\ny = BN(c)', {"w": W, "y": 6})
zoo(
    "conv1d",
    {"y": FOLDED},
    "c = Conv<dilations=[2]>(x, w)\ny = BN(c)",
    {"w": (6, 4, 3), "y": 6},
    inputs={"x": (2, 4, 9)},
)
zoo(
    "conv3d",
    {"y": FOLDED},
    "c = Conv(x, w)\ny = BN(c)",
    {"w": (6, 4, 2, 2, 2), "y": 6},
    inputs={"x": (2, 4, 4, 4, 4)},
)
zoo(
    "transposed",
    {"y": FOLDED},
    "c = ConvTranspose<strides=[2,2], output_padding=[1,1]>(x, w, b)\ny = BN(c)",
    {"w": (4, 6, 3, 3), "b": (6,), "y": 6},
)
zoo(
    "transposed_grouped",
    {"y": FOLDED},
    "c = ConvTranspose<strides=[2,2], group=2, pads=[1,0,0,1]>(x, w)\ny = BN(c)",
    {"w": (4, 3, 3, 3), "y": 6},
    has_reference=False,
)
zoo(
    "transposed_downstream",
    {"n": Reason.REACHES_INPUT},
    "n = BN(x)\ny = ConvTranspose(n, w)",
    {"w": (4, 6, 3, 3), "n": 4},
)
zoo(
    "opset_7",
    {"y": FOLDED},
    "c = Conv(x, w)\ny = BN(c)",
    {"w": W, "y": 6},
    opset=7,
    ir_version=3,
    has_reference=False,
)
zoo(
    "opset_9_overridable_defaults_of_old_files",
    {"y": FOLDED},
    "c = Conv(x, w, b)\ny = BN(c)",
    {"w": W, "b": (6,), "y": 6},
    opset=9,
    ir_version=3,
    has_reference=False,
)
zoo("epsilon", {"y": FOLDED}, "c = Conv(x, w)\ny = BN<epsilon=0.3>(c)", {"w": W, "y": 6})
zoo(
    "several_in_turn",
    {"b1": FOLDED, "y": FOLDED},
    f"c = Conv{SAME}(x, w)\nb1 = BN(c)\nr = Relu(b1)\nd = Conv{SAME}(r, v)\ny = BN(d)",
    {"w": W, "b1": 6, "v": (5, 6, 3, 3), "y": 5},
)
zoo(
    "two_on_one",
    {"b1": FOLDED, "y": FOLDED},
    "c = Conv(x, w)\nb1 = BN(c)\ny = BN(b1)",
    {"w": W, "b1": 6, "y": 6},
)

FLAT = {"x": (3, 5)}
zoo("gemm", {"y": FOLDED}, "c = Gemm(x, w, b)\ny = BN(c)", {"w": (5, 6), "b": (6,), "y": 6}, inputs=FLAT)
zoo(
    "gemm_without_bias",
    {"y": FOLDED},
    "c = Gemm<transB=1>(x, w)\ny = BN(c)",
    {"w": (6, 5), "y": 6},
    inputs=FLAT,
)
zoo(
    "gemm_alpha_beta",
    {"y": FOLDED},
    "c = Gemm<alpha=0.5, beta=-3.0, transB=1>(x, w, b)\ny = BN(c)",
    {"w": (6, 5), "b": (1, 6), "y": 6},
    inputs=FLAT,
)
zoo(
    "gemm_scalar_bias",
    {"y": FOLDED},
    "c = Gemm<beta=2.0>(x, w, b)\ny = BN(c)",
    {"w": (5, 6), "b": 0.7 * np.ones(1), "y": 6},
    inputs=FLAT,
)
zoo(
    "gemm_bias_per_row",
    {"y": Reason.UNKNOWN_OP},
    "c = Gemm(x, w, b)\ny = BN(c)",
    {"w": (5, 6), "b": (3, 1), "y": 6},
    inputs=FLAT,
)
zoo(
    "gemm_transposed_data",
    {"y": FOLDED},
    "c = Gemm<transA=1>(x, w, b)\ny = BN(c)",
    {"w": (3, 6), "b": (6,), "y": 6},
    inputs=FLAT,
)
zoo(
    "gemm_transposed_data_downstream",
    {"n": Reason.REACHES_INPUT},
    "n = BN(x)\ny = Gemm<transA=1>(n, w, b)",
    {"w": (3, 6), "b": (6,), "n": 5},
    inputs=FLAT,
)
zoo("matmul", {"y": FOLDED}, "c = MatMul(x, w)\ny = BN(c)", {"w": (5, 6), "y": 6}, inputs=FLAT)
zoo(
    "matmul_add",
    {"y": FOLDED},
    "m = MatMul(x, w)\nc = Add(b, m)\ny = BN(c)",
    {"w": (5, 6), "b": (6,), "y": 6},
    inputs=FLAT,
)
zoo(
    "matmul_from_the_left",
    {"y": Reason.NONLINEAR},
    "c = MatMul(w, x)\ny = BN(c)",
    {"w": (6, 3), "y": 5},
    inputs=FLAT,
)
zoo(
    "matmul_3d_transposed_to_channels",
    {"y": FOLDED},
    "m = MatMul(x, w)\nc = Add(m, b)\nt = Transpose<perm=[0,2,1]>(c)\ny = BN(t)",
    {"w": (5, 6), "b": (6,), "y": 6},
    inputs={"x": (2, 7, 5)},
)
zoo(
    "matmul_3d_wrong_axis",
    {"y": Reason.AXIS_MISMATCH},
    "m = MatMul(x, w)\ny = BN(m)",
    {"w": (7, 7), "y": 7},
    inputs={"x": (2, 7, 7)},
)
zoo(
    "matmul_of_two_data",
    {"y": Reason.NONLINEAR},
    "c = MatMul(x, z)\ny = BN(c)",
    {"y": 6},
    inputs={"x": (3, 5), "z": (5, 6)},
)

for name, equation, first in (
    ("channels_second", "bihw,oi->bohw", False),
    ("matrix_first", "io,bihw->bohw", True),
    ("channels_last", "bihw,io->bhwo", False),
    ("ellipsis", "oi,bi...->b...o", True),
):
    operands = "w, x" if first else "x, w"
    last = equation.endswith("o")
    turn = "t = Transpose<perm=[0,3,1,2]>(c)" if last else "t = Identity(c)"
    zoo(
        f"einsum_{name}",
        {"y": FOLDED},
        f'c = Einsum<equation="{equation}">({operands})\n{turn}\ny = BN(t)',
        {"w": (6, 4) if "oi" in equation else (4, 6), "y": 6},
    )
    zoo(
        f"einsum_{name}_downstream",
        {"n": FOLDED},
        f's = Sigmoid(x)\nn = BN(s)\ny = Einsum<equation="{equation}">({operands.replace("x", "n")})',
        {"w": (6, 4) if "oi" in equation else (4, 6), "n": 4},
    )
for name, equation in (
    ("diagonal", "bchw,cc->bchw"),
    ("batch", "bchw,bo->ochw"),
    ("outer", "bchw,oi->bchwoi"),
):
    zoo(
        f"einsum_{name}_is_no_layer",
        {"n": Reason.REACHES_INPUT},
        f'n = BN(x)\ny = Einsum<equation="{equation}">(n, w)',
        {"w": (2, 4) if "bo" in equation else (4, 4), "n": 4},
    )

# -- through other ops --------------------------------------------------------------------------------


def through(name: str, ops: str, verdict: Verdict = FOLDED, channels: int = 6, **tensors: Any) -> None:
    zoo(
        f"through_{name}",
        {"y": verdict},
        f"c = Conv{SAME}(x, w)\n{ops}\ny = BN(p)",
        {"w": W, "y": channels, **tensors},
    )


through("identity", "i = Identity(c)\np = Dropout(i)")
through("clip_without_limits", "p = Clip(c)")
through("max_pool", "p = MaxPool<kernel_shape=[2,2], strides=[2,2], ceil_mode=1>(c)")
through("avg_pool", "p = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1]>(c)")
through(
    "avg_pool_counting_zeros",
    "p = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1], count_include_pad=1>(c)",
    Reason.SHIFT_AT_PADDING,
)
through("global_average_pool", "p = GlobalAveragePool(c)")
through("global_max_pool", "p = GlobalMaxPool(c)")
through("reduce_min", "p = ReduceMin<axes=[2,3], keepdims=1>(c)")
through("top_k", "p, i = TopK(c, k)", k=ints(2))
through(
    "grid_sample",
    'p = GridSample<padding_mode="border">(c, g)',
    g=np.linspace(-1.5, 1.5, 2 * 3 * 3 * 2, dtype=np.float32).reshape(2, 3, 3, 2),
)
through(
    "grid_sample_zeros",
    "p = GridSample(c, g)",
    Reason.SHIFT_AT_PADDING,
    g=np.linspace(-1.5, 1.5, 2 * 3 * 3 * 2, dtype=np.float32).reshape(2, 3, 3, 2),
)
through("reduce_mean", "m = ReduceMean<axes=[2,3], keepdims=0>(c)\np = Identity(m)")
through("flatten", "g = GlobalAveragePool(c)\np = Flatten(g)")
through("transpose_and_back", "t = Transpose<perm=[0,2,3,1]>(c)\np = Transpose<perm=[0,3,1,2]>(t)")
through("reshape", "p = Reshape(c, shape)", shape=ints(2, 6, -1))
through("squeeze", "u = Unsqueeze(c, ax)\np = Squeeze(u, ax)", ax=ints(2))
through("depth_to_space_crd", 'e = Conv(c, v)\np = DepthToSpace<blocksize=2, mode="CRD">(e)', v=(24, 6, 1, 1))
through("depth_to_space_dcr", "e = Conv(c, v)\np = DepthToSpace<blocksize=2>(e)", v=(24, 6, 1, 1))
through("space_to_depth", "p = SpaceToDepth<blocksize=2>(c)", Reason.AXIS_MISMATCH, channels=24)
through("resize_nearest", 'p = Resize<mode="nearest">(c, , s)', s=np.array([1, 1, 2, 2], dtype=np.float32))
through(
    "resize_linear",
    'p = Resize<mode="linear", coordinate_transformation_mode="align_corners">(c, , s)',
    s=np.array([1, 1, 2, 2], dtype=np.float32),
)
through("pad_edge", 'p = Pad<mode="edge">(c, pads)', pads=ints(0, 0, 1, 1, 0, 0, 1, 1))
through("pad_zero", "p = Pad(c, pads)", Reason.SHIFT_AT_PADDING, pads=ints(0, 0, 1, 1, 0, 0, 1, 1))
through("slice", "p = Slice(c, start, stop, ax)", channels=3, start=ints(1), stop=ints(4), ax=ints(1))
through(
    "two_slices",
    "p = Slice(c, start, stop, ax)",
    channels=3,
    start=ints(1, 0),
    stop=ints(4, 3),
    ax=ints(1, 2),
)
through(
    "gather_one", "q = Unsqueeze(c, ax)\np = Gather<axis=1>(q, i)", ax=ints(1), i=np.array(0, dtype=np.int64)
)
through("reduce_sum", "p = ReduceSum(c, ax)", ax=ints(2, 3))
through("gather_in_another_order", "p = Gather<axis=1>(c, i)", i=ints(5, 0, -2, 1, 3, 2))
through("gather_a_channel_twice", "p = Gather<axis=1>(c, i)", Reason.OUTPUT_USED_ELSEWHERE, i=ints(*[0] * 6))
through(
    "slice_backwards",
    "p = Slice(c, start, stop, ax, step)",
    start=ints(-1),
    stop=ints(-100),
    ax=ints(1),
    step=ints(-1),
)
through("tile_of_the_image", "p = Tile(c, times)", times=ints(1, 1, 2, 1))
through(
    "tile_of_the_channels", "p = Tile(c, times)", Reason.AXIS_MISMATCH, channels=12, times=ints(1, 2, 1, 1)
)
through("expand", "g = GlobalAveragePool(c)\np = Expand(g, s)", s=ints(2, 6, 4, 4))
through(
    "sum_of_three", "d = Conv<pads=[1,1,1,1]>(x, v)\np = Sum(c, d, two)", v=(6, 4, 3, 3), two=np.array(2.0)
)
through("mean_of_two", "d = Conv<pads=[1,1,1,1]>(x, v)\np = Mean(c, d)", v=(6, 4, 3, 3))
through("sum_of_one", "p = Sum(c)")
through("mul_add_scalars", "m = Mul(c, two)\np = Add(three, m)", two=np.array(2.0), three=np.array(3.0))
through("div_sub", "m = Div(c, two)\np = Sub(m, three)", two=np.array(2.0), three=np.array(3.0))
through("neg", "p = Neg(c)")
through("relu", "p = Relu(c)", Reason.NONLINEAR)
through("sigmoid", "p = Sigmoid(c)", Reason.NONLINEAR)
through("cast_like_itself", "p = CastLike(c, c)")
through("cast_to_integers", "i = Cast<to=6>(c)\np = CastLike(i, c)", Reason.NONLINEAR)

zoo(
    "concat",
    {"y": FOLDED},
    "a = Conv(x, w)\nb = Conv(x, v)\nc = Concat<axis=1>(a, b)\ny = BN(c)",
    {"w": W, "v": (3, 4, 3, 3), "y": 9},
)
zoo(
    "split",
    {"y": FOLDED, "z": FOLDED},
    "c = Conv(x, w)\na, b = Split<axis=1>(c)\ny = BN(a)\nz = BN(b)",
    {"w": W, "y": 3, "z": 3},
    outputs=("y", "z"),
)
zoo(
    "add_of_branches",
    {"y": FOLDED},
    "a = Conv(x, w)\nb = Conv(x, v)\nc = Add(a, b)\ny = BN(c)",
    {"w": W, "v": W, "y": 6},
)
zoo(
    "channel_shuffle",
    {"y": FOLDED},
    "c = Conv(x, w)\nr = Reshape(c, s1)\nt = Transpose<perm=[0,2,1,3,4]>(r)\nq = Reshape(t, s2)\ny = BN(q)",
    {"w": W, "y": 6, "s1": ints(2, 2, 3, 6, 6), "s2": ints(2, 6, 6, 6)},
)

# -- downstream ---------------------------------------------------------------------------------------

zoo("pre_activation", {"n": FOLDED}, "n = BN(x)\ny = Conv(n, w)", {"n": 4, "w": W})
zoo(
    "pre_activation_padded", {"n": Reason.REACHES_INPUT}, f"n = BN(x)\ny = Conv{SAME}(n, w)", {"n": 4, "w": W}
)
zoo(
    "before_matmul",
    {"n": FOLDED},
    "r = Sigmoid(x)\nn = BN(r)\ny = MatMul(n, w)",
    {"n": 5, "w": (5, 6)},
    inputs=FLAT,
)
zoo(
    "before_gemm",
    {"n": FOLDED},
    "n = BN(x)\ny = Gemm<transB=1, alpha=2.0>(n, w)",
    {"n": 5, "w": (6, 5)},
    inputs=FLAT,
)
zoo(
    "pool_then_gemm",
    {"n": FOLDED},
    "r = Sigmoid(x)\nn = BN(r)\np = GlobalAveragePool(n)\nf = Flatten(p)\ny = Gemm(f, w)",
    {"n": 4, "w": (4, 6)},
)
zoo(
    "to_two_convs",
    {"n": FOLDED},
    "n = BN(x)\na = Conv(n, w)\nb = Conv(n, v)\ny = Add(a, b)",
    {"n": 4, "w": W, "v": W},
)
zoo(
    "into_a_kept_norm",
    {"n": FOLDED, "m": Reason.NONLINEAR},
    "s = Sigmoid(x)\nn = BN(s)\nm = BN(n)\ny = Sigmoid(m)",
    {"n": 4, "m": 4},
)

# -- who else reads -----------------------------------------------------------------------------------

zoo(
    "conv_read_twice",
    {"b": Reason.OUTPUT_USED_ELSEWHERE},
    "c = Conv(x, w)\nb = BN(c)\nr = Relu(c)\ny = Add(b, r)",
    {"w": W, "b": 6},
)
zoo("conv_read_twice_in_a_sum", {"b": FOLDED}, "c = Conv(x, w)\nb = BN(c)\ny = Add(b, c)", {"w": W, "b": 6})
zoo(
    "conv_is_output",
    {"y": Reason.REACHES_OUTPUT},
    "c = Conv(x, w)\ny = BN(c)",
    {"w": W, "y": 6},
    outputs=("c", "y"),
)
zoo(
    "only_the_shape_is_read",
    {"b": FOLDED},
    "c = Conv(x, w)\ns = Shape(c)\nb = BN(c)\ny = Reshape(b, s)",
    {"w": W, "b": 6},
)
zoo(
    "weight_tied",
    {"y": Reason.WEIGHT_SHARED},
    f"a = Conv{SAME}(x, w)\nb = Conv{SAME}(a, w, o)\ny = BN(b)",
    {"w": (4, 4, 3, 3), "o": (4,), "y": 4},
)
zoo(
    "layer_called_twice",
    {"n": FOLDED},
    "a = Conv(x, w)\nn = BN(a, n)\nb = Conv(z, w)\nm = BN(b, n)\ny = Add(n, m)",
    {"w": W, "n": 6},
    inputs={"x": IMAGE, "z": IMAGE},
)
zoo(
    "layer_called_twice_one_norm",
    {"n": Reason.CALLED_MORE_THAN_ONCE},
    "a = Conv(x, w)\nn = BN(a)\nb = Conv(z, w)\ny = Add(n, b)",
    {"w": W, "n": 6},
    inputs={"x": IMAGE, "z": IMAGE},
)
zoo(
    "shared_bias_and_statistics",
    {"n": FOLDED, "m": FOLDED},
    "a = Conv(x, w, o)\nn = BN(a, n)\nb = Conv(x, v, o)\nm = BN(b, n)\ny = Add(n, m)",
    {"w": W, "v": W, "o": (6,), "n": 6},
)
zoo(
    "weight_is_data",
    {"y": Reason.WEIGHT_COMPUTED},
    "c = Conv(x, w)\ny = BN(c)",
    {"y": 6},
    inputs={"x": IMAGE, "w": W},
)

# -- weights that are computed from constants ------------------------------------------------------------

zoo(
    "weight_behind_transpose",
    {"y": FOLDED},
    "t = Transpose<perm=[1,0]>(w)\nc = MatMul(x, t)\ny = BN(c)",
    {"w": (6, 5), "y": 6},
    inputs=FLAT,
)
zoo(
    "weight_behind_identity_and_expand",
    {"y": FOLDED},
    "i = Identity(w)\ne = Expand(o, s)\nc = Conv(x, i, e)\ny = BN(c)",
    {"w": W, "o": (1,), "s": ints(6), "y": 6},
)
zoo(
    "weight_is_arithmetic",
    {"y": FOLDED},
    "n = Mul(w, g)\nc = Conv(x, n)\ny = BN(c)",
    {"w": W, "g": (6, 1, 1, 1), "y": 6},
)
zoo(
    "constant_nodes",
    {"y": FOLDED},
    "o = Constant<value_floats=[1.0,2.0,3.0,4.0,5.0,6.0]>()\nf = CastLike(o, w)\n"
    "c = Conv(x, w, f)\ny = BN(c)",
    {"w": W, "y": 6},
)
zoo(
    "weight_standardised",
    {"y": FOLDED},
    "m = ReduceMean<axes=[1,2,3]>(w)\nd = Sub(w, m)\nc = Conv(x, d)\ny = BN(c)",
    {"w": W, "y": 6},
)

# -- BatchNorm in elementary ops ----------------------------------------------------------------------

zoo(
    "decomposed",
    {"m": FOLDED},
    "c = Conv(x, w)\nm = Mul(c, g)\ny = Add(m, h)",
    {"w": W, "g": (6, 1, 1), "h": (1, 6, 1, 1)},
)
zoo(
    "decomposed_in_full",
    {"d": FOLDED},
    "c = Conv(x, w)\ne = Add(var, eps)\ns = Sqrt(e)\n"
    "d = Sub(c, mean)\nq = Div(d, s)\nm = Mul(g, q)\ny = Add(m, h)",
    {
        "w": W,
        "mean": (6, 1, 1),
        "var": np.linspace(0.5, 2.5, 6).reshape(6, 1, 1),
        "eps": np.array(1e-3),
        "g": (6, 1, 1),
        "h": (6, 1, 1),
    },
)
zoo(
    "decomposed_behind_linear",
    {"m": FOLDED},
    "c = MatMul(x, w)\nb = Add(c, o)\nm = Mul(b, g)\ny = Sub(h, m)",
    {"w": (5, 6), "o": (6,), "g": (6,), "h": (6,)},
    inputs=FLAT,
)
zoo(
    "decomposed_then_batch_norm",
    {"m": FOLDED, "y": FOLDED},
    "c = Conv(x, w)\nm = Mul(c, g)\nn = Add(m, h)\ny = BN(n)",
    {"w": W, "g": (6, 1, 1), "h": (1, 6, 1, 1), "y": 6},
)
COLUMN = (6, 1, 1)
zoo(
    "decomposed_behind_max_pool",
    {"m": FOLDED},
    "c = Conv(x, w)\np = MaxPool<kernel_shape=[2,2]>(c)\nm = Mul(p, g)\ny = Add(m, h)",
    {"w": W, "g": np.linspace(0.5, 1.5, 6).reshape(COLUMN), "h": COLUMN},
)
zoo(
    "decomposed_first",
    {"d": FOLDED},
    "i = Reciprocal(s)\nd = Sub(x, mean)\nn = Mul(d, i)\ny = Conv(n, w)",
    {"w": W, "mean": (4, 1, 1), "s": np.linspace(0.5, 2, 4).reshape(4, 1, 1)},
)
zoo(
    "decomposed_with_pow",
    {"d": FOLDED},
    "c = Conv(x, w)\ne = Add(var, eps)\ns = Pow(e, half)\nd = Sub(c, mean)\nq = Div(d, s)\ny = Relu(q)",
    {
        "w": W,
        "mean": COLUMN,
        "var": np.linspace(0.5, 2.5, 6).reshape(COLUMN),
        "eps": np.array(1e-3),
        "half": np.array(0.5),
    },
)
zoo(
    "decomposed_behind_relu",
    {"m": Reason.NONLINEAR},
    "c = Conv(x, w)\nr = Relu(c)\nm = Mul(r, g)\ny = Add(m, h)",
    {"w": W, "g": COLUMN, "h": COLUMN},
)
zoo(
    "decomposed_with_channels_last",
    {"m": FOLDED},
    "c = Conv(x, w)\nt = Transpose<perm=[0,2,3,1]>(c)\nm = Mul(t, g)\ny = Add(m, h)",
    {"w": W, "g": (6,), "h": (6,)},
)
zoo(
    "decomposed_without_a_spread",
    {"m": Reason.BAD_STATISTICS},
    "c = Conv(x, w)\nm = Sub(c, h)\ny = Div(m, g)",
    {"w": W, "g": np.array([0.0, 1, 1, 1, 1, 1]).reshape(COLUMN), "h": COLUMN},
)
zoo(
    "factor_and_summand_along_other_axes",
    {},
    "c = Conv(x, w)\nm = Mul(c, g)\ny = Add(m, h)",
    {"w": W, "g": COLUMN, "h": (1, 1, 6)},
)
zoo(
    "layer_scale_is_none",
    {"b": FOLDED},
    "c = Conv(x, w)\nb = BN(c)\ny = Mul(b, g)",
    {"w": W, "b": 6, "g": COLUMN},
)
zoo(
    "affine_of_a_layer_norm_is_none",
    {},
    "c = MatMul(x, w)\na = ReduceMean<axes=[-1]>(c)\nd = Sub(c, a)\nq = Mul(d, d)\n"
    "v = ReduceMean<axes=[-1]>(q)\ne = Add(v, eps)\n"
    "s = Sqrt(e)\nn = Div(d, s)\nm = Mul(n, g)\nb = Add(m, h)\ny = MatMul(b, u)",
    {"w": (5, 6), "u": (6, 4), "eps": np.array(1e-5), "g": (6,), "h": (6,)},
    inputs={"x": (2, 7, 5)},
)
zoo(
    "affine_of_a_group_norm_is_none",
    {},
    "c = Conv(x, w)\nr = Reshape(c, s1)\ni = InstanceNormalization(r, o, z)\nb = Reshape(i, s2)\n"
    "m = Mul(b, g)\ny = Add(m, h)",
    {
        "w": W,
        "s1": ints(2, 2, -1),
        "o": np.ones(2),
        "z": np.zeros(2),
        "s2": ints(2, 6, 6, 6),
        "g": COLUMN,
        "h": COLUMN,
    },
)
zoo(
    "behind_a_gate_is_one",
    {"m": Reason.NONLINEAR},
    "c = Conv(x, w)\np = GlobalAveragePool(c)\ns = Sigmoid(p)\nd = Mul(c, s)\nm = Mul(d, g)\ny = Add(m, h)",
    {"w": W, "g": COLUMN, "h": COLUMN},
)
zoo(
    "scale_by_scalars_only",
    {},
    "c = Conv(x, w)\nm = Mul(c, two)\ny = Add(m, two)",
    {"w": W, "two": np.array(2.0)},
)

# -- BatchNorms that cannot go ------------------------------------------------------------------------

zoo(
    "in_training",
    {"y": Reason.BATCH_STATISTICS},
    "c = Conv(x, w)\ny, rm, rv = BN<training_mode=1>(c)",
    {"w": W, "y": 6},
)
zoo(
    "negative_gamma_before_max_pool",
    {"y": Reason.NEGATIVE_SCALE},
    "c = Conv(x, w)\np = MaxPool<kernel_shape=[2,2]>(c)\ny = BatchNormalization(p, g, h, m, v)",
    {"w": W, "g": [-1.0, 1, 1, 1, 1, 1], "h": (6,), "m": (6,), "v": np.ones(6)},
)
zoo(
    "nan_statistics",
    {"y": Reason.BAD_STATISTICS},
    "c = Conv(x, w)\ny = BatchNormalization(c, g, h, m, v)",
    {"w": W, "g": (6,), "h": (6,), "m": np.full(6, np.nan), "v": np.ones(6)},
)
zoo(
    "negative_variance",
    {"y": Reason.BAD_STATISTICS},
    "c = Conv(x, w)\ny = BatchNormalization(c, g, h, m, v)",
    {"w": W, "g": (6,), "h": (6,), "m": (6,), "v": -np.ones(6)},
)
zoo(
    "gamma_is_data",
    {"y": Reason.WEIGHT_COMPUTED},
    "c = Conv(x, w)\ny = BatchNormalization(c, g, h, m, v)",
    {"w": W, "h": (6,), "m": (6,), "v": np.ones(6)},
    inputs={"x": IMAGE, "g": (6,)},
)
zoo(
    "instance_norm_is_none",
    {},
    "c = Conv(x, w)\ny = InstanceNormalization(c, g, h)",
    {"w": W, "g": (6,), "h": (6,)},
)

zoo(
    "quantised_data",
    {"y": Reason.QUANTIZED},
    "c = Conv(x, w)\nq = QuantizeLinear(c, s, z)\nd = DequantizeLinear(q, s, z)\ny = BN(d)",
    {"w": W, "s": np.array(0.1, dtype=np.float32), "z": np.array(0, dtype=np.int8), "y": 6},
    has_reference=False,
)
for opset, ir_version in ((8, 3), (13, 7), (14, 7), (15, 8), (18, 8), (21, 10), (26, 12)):
    zoo(
        f"opset_{opset}",
        {"y": FOLDED},
        "c = Conv(x, w)\ny = BN(c)",
        {"w": W, "y": 6},
        opset=opset,
        ir_version=ir_version,
        has_reference=opset >= 14,
    )
for turned in range(4):
    zoo(
        f"gemm_transposed_{turned:02b}_without_its_bias",
        {"y": FOLDED},
        f"c = Gemm<transA={turned // 2}, transB={turned % 2}, alpha=0.5, beta=0.0>(x, w, b)\ny = BN(c)",
        {"w": (6, 3 if turned // 2 else 5)[:: 1 if turned % 2 else -1], "b": (6,), "y": 6},
        inputs=FLAT,
    )

# -- open axes ----------------------------------------------------------------------------------------

zoo(
    "dynamic_batch",
    {"y": FOLDED},
    "c = Conv(x, w)\ng = GlobalAveragePool(c)\nf = Flatten(g)\nl = Gemm(f, v)\ny = BN(l)",
    {"w": W, "v": (6, 7), "y": 7},
    inputs={"x": ("N", 4, 8, 8)},
)
zoo(
    "dynamic_image",
    {"y": FOLDED},
    f"c = Conv{SAME}(x, w)\np = MaxPool<kernel_shape=[2,2], strides=[2,2]>(c)\ny = BN(p)",
    {"w": W, "y": 6},
    inputs={"x": ("N", 4, "H", "W")},
)
zoo(
    "dynamic_rows",
    {"b": FOLDED},
    "m = MatMul(x, w)\nr = Reshape(m, flat)\nb = BN(r)\n"
    "s = Shape(x)\na = Slice(s, zero, two)\nk = Concat<axis=0>(a, six)\ny = Reshape(b, k)",
    {"w": (5, 6), "b": 6, "flat": ints(-1, 6), "zero": ints(0), "two": ints(2), "six": ints(6)},
    inputs={"x": ("N", "L", 5)},
)
zoo(
    "dynamic_shuffle",
    {"y": FOLDED},
    "c = Conv(x, w)\ns = Shape(c)\nn = Slice(s, zero, one)\nk = Concat<axis=0>(n, parts)\nr = Reshape(c, k)\n"
    "t = Transpose<perm=[0,2,1,3,4]>(r)\nj = Concat<axis=0>(n, whole)\nq = Reshape(t, j)\ny = BN(q)",
    {"w": W, "y": 6, "zero": ints(0), "one": ints(1), "parts": ints(2, 3, 6, 6), "whole": ints(6, 6, 6)},
    inputs={"x": ("N", 4, 8, 8)},
)
zoo(
    "padded_by_computed_amounts",
    {"n": FOLDED},
    "s = Sigmoid(x)\nn = BN(s)\nz = ConstantOfShape(four)\ni = Cast<to=7>(z)\nj = Concat<axis=0>(i, ends)\n"
    "r = Reshape(j, pairs)\nt = Transpose<perm=[1,0]>(r)\na = Reshape(t, flat)\n"
    'p = Pad<mode="reflect">(n, a)\ny = Conv(p, w)',
    {"n": 4, "w": W, "four": ints(4), "ends": ints(1, 1, 1, 1), "pairs": ints(4, 2), "flat": ints(-1)},
)
zoo(
    "channels_mixed_with_batch",
    {"y": Reason.AXIS_MISMATCH},
    "c = Conv(x, w)\nr = Reshape(c, s)\ny = BN(r)",
    {"w": W, "y": 6, "s": ints(6, 6, -1)},
    inputs={"x": ("N", 4, 8, 8)},
)

# -- parallel branches over one value -------------------------------------------------------------------

Q = (4, 4, 3, 3)
P = (4, 4, 1, 1)
IN_ALL = {"b": FOLDED, "d": FOLDED, "i": FOLDED}
REPVGG = f"a = Conv{SAME}(x, w)\nb = BN(a)\nc = Conv(x, v)\nd = BN(c)\ni = BN(x)\ne = Add(b, d)\n"
NUMBERS = {"w": Q, "v": P, "b": 4, "d": 4, "i": 4}

zoo("merge_repvgg", IN_ALL, f"{REPVGG}f = Add(e, i)\ny = Relu(f)", NUMBERS)
zoo("merge_at_the_output", IN_ALL, f"{REPVGG}y = Add(i, e)", NUMBERS)
zoo("merge_open_sizes", IN_ALL, f"{REPVGG}y = Add(i, e)", NUMBERS, inputs={"x": ("N", 4, "H", "W")})
zoo("merge_difference", IN_ALL, f"{REPVGG}y = Sub(i, e)", NUMBERS)
zoo("merge_difference_turned", IN_ALL, f"{REPVGG}f = Sub(e, i)\ny = Sub(z, f)", {**NUMBERS, "z": (4, 1, 1)})
zoo(
    "merge_grouped",
    IN_ALL,
    f"{REPVGG.replace('Conv<', 'Conv<group=2, ').replace('Conv(', 'Conv<group=4>(')}y = Add(e, i)",
    {**NUMBERS, "w": (4, 2, 3, 3), "v": (4, 1, 1, 1)},
)
zoo(
    "merge_padded_on_one_side",
    {"b": FOLDED},
    "a = Conv<pads=[1,0,0,1]>(x, w)\nb = BN(a)\nc = Conv<pads=[0,0,1,1]>(x, v)\n"
    "e = Conv<pads=[1,1,1,1]>(x, u)\nf = Add(b, c)\ny = Add(f, e)",
    {"w": (5, 4, 2, 2), "v": (5, 4, 2, 2), "u": (5, 4, 3, 3), "b": 5},
)
zoo(
    "merge_into_one_without_padding",
    {"b": FOLDED},
    'a = Conv<auto_pad="VALID">(x, w)\nb = BN(a)\nc = Conv<group=2, pads=[0,0,0,1]>(x, v)\ny = Add(b, c)',
    {"w": (4, 4, 3, 3), "v": (4, 2, 3, 4), "b": 4},
)
zoo(
    "merge_into_a_wider_window",
    {"b": FOLDED},
    "a = Conv<pads=[0,1]>(x, w)\nb = BN(a)\nc = Conv<pads=[1,0]>(x, v)\ny = Add(b, c)",
    {"w": (5, 4, 2), "v": (5, 4, 2), "b": 5},
    inputs={"x": (2, 4, 9)},
)
zoo(
    "merge_same_upper",
    IN_ALL,
    f"{REPVGG.replace(SAME, '<auto_pad=' + chr(34) + 'SAME_UPPER' + chr(34) + '>')}y = Add(i, e)",
    NUMBERS,
)
zoo(
    "merge_3d",
    {"i": FOLDED},
    "a = Conv<pads=[1,1,1,1,1,1]>(x, w)\ni = BN(x)\ny = Add(a, i)",
    {"w": (4, 4, 3, 3, 3), "i": 4},
    inputs={"x": (2, 4, 4, 5, 4)},
)
zoo(
    "merge_after_a_fold",
    {"b": FOLDED},
    "a = Conv(x, v)\nb = BN(a)\nd = Conv(x, u)\ny = Add(b, d)",
    {"v": P, "u": P, "b": 4},
)
zoo(
    "branch_is_output_too",
    {"i": Reason.REACHES_INPUT},
    f"a = Conv{SAME}(x, w)\ni = BN(x)\ny = Add(a, i)",
    {"w": Q, "i": 4},
    outputs=("y", "a"),
)
