"""Ops that are known to let no affine map by whole; all others without a law are merely unknown."""

from __future__ import annotations

_POINTWISE = """
relu6 silu gelu hardswish hardsigmoid sigmoid tanh elu selu celu mish softplus hardtanh logsigmoid
threshold hardshrink softshrink softsign tanhshrink rrelu glu clamp erf erfc erfinv exp exp2 expm1
log log2 log10 log1p sqrt rsqrt reciprocal square pow abs sign sgn sin cos tan asin acos atan sinh
cosh asinh acosh atanh sinc floor ceil round trunc frac fix fmod remainder div_rounded floor_divide
maximum minimum fmax fmin atan2 hypot where masked_fill nan_to_num eq ne lt le gt ge isnan isinf
isfinite logical_not logical_and logical_or bitwise_not bernoulli gumbel_softmax heaviside lgamma
digamma softmax log_softmax logsumexp xlogy"""
_NORMS = """layer_norm native_layer_norm group_norm native_group_norm instance_norm rms_norm _fused_rms_norm
local_response_norm normalize norm linalg_norm linalg_vector_norm linalg_matrix_norm renorm var std
var_mean std_mean cdist cosine_similarity pairwise_distance"""
_REDUCTIONS = "argmax argmin argsort any all prod cumprod count_nonzero mode unique _unique2 histc bincount"
_OTHER = "lstm gru rnn_tanh rnn_relu bilinear embedding multinomial"
_ONNX = """Abs Acos Acosh And ArgMax ArgMin Asin Asinh Atan Atanh Bernoulli Cast Ceil Cos Cosh CumProd Equal
Exp Floor GRU Greater GreaterOrEqual GroupNormalization HardSwish Hardmax InstanceNormalization IsInf
IsNaN LRN LSTM LayerNormalization Less LessOrEqual Log LogSoftmax LpNormalization LpPool Max
MeanVarianceNormalization Min Mod Not Or RMSNormalization RNN Reciprocal ReduceL1 ReduceL2
ReduceLogSum ReduceLogSumExp ReduceProd ReduceSumSquare Round Shrink Sign Sin Sinh Softmax Softsign
Sqrt Tan ThresholdedRelu Where Xor"""

NONLINEAR = frozenset(f"{_POINTWISE} {_NORMS} {_REDUCTIONS} {_OTHER} {_ONNX}".split())
"""Kinds of op, in the words of ATen and of ONNX."""
