"""Apply an insertion plan to an ONNX model in memory: a BatchNormalization node behind every planned call."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from bntool.core.plan import Plan
from bntool.laws.taking import TAKERS
from bntool.observe.onnx_model import OnnxObservation
from bntool.observe.onnx_shapes import DTYPES
from bntool.surgery.onnx_wiring import Wiring


def apply_insert_onnx(observed: OnnxObservation, plan: Plan) -> Plan:
    """Carry an insertion plan out on the observed model itself; the plan, with a note of another ε.

    γ = 1, β = 0, μ = 0 and σ² = 1 − ε in the type of the data, where ε is what a node can hold of it, a
    float32, and the type: what the model computes stays. A momentum of torch's, the share that is new, is
    1 − that of ONNX.
    """
    wiring = Wiring(observed.model)
    asked, momentum = float(plan.options["eps"]), 1.0 - float(plan.options["momentum"])
    notes: dict[str, None] = {}
    for site in plan.insert_sites:
        layer = observed.layers[site.conv]
        dtype = _type_of_data(observed, site.conv)
        eps = held_eps(asked, dtype)
        if torch.finfo(dtype).bits < 32 and eps != asked:
            short = str(dtype).removeprefix("torch.")
            notes[f"ε is {eps:.3g} in {short}: 1 − {asked:.3g} is no number of that type"] = None
        ones = torch.ones(site.channels, dtype=dtype)
        tensors = (ones, torch.zeros_like(ones), torch.zeros_like(ones), ones - eps)
        for call, name in zip(layer.calls, site.norms, strict=True):
            wiring.batch_norm_behind(call.last, name, tensors, eps, momentum)
    return dataclasses.replace(plan, notes=(*plan.notes, *notes))


def held_eps(eps: float, dtype: torch.dtype) -> float:
    """The ε next to this one for which 1 − ε is a number of the type, so that (1 − ε) + ε is 1.

    The numbers right below 1 lie half an eps of the type apart. A float32 has enough of them for any ε.
    """
    if torch.finfo(dtype).bits >= 32:
        return float(np.float32(eps))
    step = torch.finfo(dtype).eps / 2
    return max(round(eps / step), 1) * step


def _type_of_data(observed: OnnxObservation, layer: str) -> torch.dtype:
    """The type of what a layer puts out; its weight may be held in another, and dequantised."""
    graph = observed.graph
    ops = [op for op in graph.ops if op.scope == layer and op.kind in TAKERS]
    told = {graph.output(op).dtype for op in ops}
    # nodes that share a weight have it under the name of one of them
    handles = (graph.input(op, "weight").handle for op in ops if "weight" in op.inputs)
    stored = (graph.tensors[name].dtype for name in (*handles, f"{layer}.weight") if name in graph.tensors)
    own = next(stored, torch.float32)
    if own.is_floating_point:
        told.add(str(own))
    known = [dtype for dtype in DTYPES.values() if str(dtype) in told]
    return known[0] if len(known) == 1 else own if own.is_floating_point else torch.float32
