"""Apply an insertion plan to an exported program: a BatchNorm behind every planned call, in a copy."""

from __future__ import annotations

import torch
from torch.export import ExportedProgram

from bntool.core.plan import Plan
from bntool.observe.exported_program import ProgramObservation
from bntool.surgery.program_graph import ProgramCopy


def apply_insert_program(observed: ProgramObservation, plan: Plan) -> ExportedProgram:
    """A copy of the observed program with the BatchNorms of an insertion plan.

    γ = 1, β = 0, μ = 0 and σ² = 1 − ε in the layer's own type, in eval mode: what the program computes stays.
    γ and β are parameters, μ and σ² buffers, under names such as `conv_bn.weight`. The argument is not
    changed.
    """
    copied = ProgramCopy(observed.program)
    eps, momentum = float(plan.options["eps"]), float(plan.options["momentum"])
    for site in plan.insert_sites:
        like = observed.names[f"{site.conv}.weight"][0]
        ones = torch.ones(site.channels, dtype=copied.tensor(like).dtype, device=copied.tensor(like).device)
        for label, name in zip(observed.layers[site.conv], site.norms, strict=True):
            node = copied.nodes[label]
            stored = (
                copied.add_parameter(copied.free_name(f"{name}.weight"), ones.clone(), like),
                copied.add_parameter(copied.free_name(f"{name}.bias"), torch.zeros_like(ones), like),
                copied.add_buffer(copied.free_name(f"{name}.running_mean"), torch.zeros_like(ones), like),
                copied.add_buffer(copied.free_name(f"{name}.running_var"), ones - eps, like),
            )
            settings = (False, momentum, eps, True)
            copied.call_behind(node, torch.ops.aten.batch_norm.default, (*stored, *settings))
    return copied.finish()
