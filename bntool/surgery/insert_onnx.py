"""Apply an insertion plan to an ONNX model in memory: a BatchNormalization node behind every planned call."""

from __future__ import annotations

import numpy as np
import torch

from bntool.core.plan import Plan
from bntool.observe.onnx_model import OnnxObservation
from bntool.surgery.onnx_wiring import Wiring


def apply_insert_onnx(observed: OnnxObservation, plan: Plan) -> None:
    """Carry an insertion plan out on the observed model itself.

    γ = 1, β = 0, μ = 0 and σ² = 1 − ε in the layer's own type, where ε is what a node can hold of it, a
    float32: what the model computes stays.
    """
    wiring = Wiring(observed.model)
    eps = float(np.float32(plan.options["eps"]))
    for site in plan.insert_sites:
        layer = observed.layers[site.conv]
        dtype = observed.graph.tensors[f"{site.conv}.weight"].dtype
        ones = torch.ones(site.channels, dtype=dtype)
        tensors = (ones, torch.zeros_like(ones), torch.zeros_like(ones), ones - eps)
        for call, name in zip(layer.calls, site.norms, strict=True):
            wiring.batch_norm_behind(call.last, name, tensors, eps)
