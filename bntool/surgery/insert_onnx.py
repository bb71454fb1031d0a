"""Apply an insertion plan to an ONNX model in memory: a BatchNormalization node behind every planned call."""

from __future__ import annotations

import numpy as np
import torch

from bntool.core.plan import Plan
from bntool.laws.taking import TAKERS
from bntool.observe.onnx_model import OnnxObservation
from bntool.observe.onnx_shapes import DTYPES
from bntool.surgery.onnx_wiring import Wiring


def apply_insert_onnx(observed: OnnxObservation, plan: Plan) -> None:
    """Carry an insertion plan out on the observed model itself.

    γ = 1, β = 0, μ = 0 and σ² = 1 − ε in the type of the data, where ε is what a node can hold of it, a
    float32: what the model computes stays. A momentum of torch's, the share that is new, is 1 − that of ONNX.
    """
    wiring = Wiring(observed.model)
    eps, momentum = float(np.float32(plan.options["eps"])), 1.0 - float(plan.options["momentum"])
    for site in plan.insert_sites:
        layer = observed.layers[site.conv]
        dtype = _type_of_data(observed, site.conv)
        ones = torch.ones(site.channels, dtype=dtype)
        tensors = (ones, torch.zeros_like(ones), torch.zeros_like(ones), ones - eps)
        for call, name in zip(layer.calls, site.norms, strict=True):
            wiring.batch_norm_behind(call.last, name, tensors, eps, momentum)


def _type_of_data(observed: OnnxObservation, layer: str) -> torch.dtype:
    """The type of what a layer puts out; its weight may be held in another, and dequantised."""
    graph = observed.graph
    told = {graph.output(op).dtype for op in graph.ops if op.scope == layer and op.kind in TAKERS}
    own = graph.tensors[f"{layer}.weight"].dtype
    if own.is_floating_point:
        told.add(str(own))
    known = [dtype for dtype in DTYPES.values() if str(dtype) in told]
    return known[0] if len(known) == 1 else own if own.is_floating_point else torch.float32
