"""Which provider ONNX Runtime gave each node to; and the proof that the heavy ones run where they should."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from bntool.core.errors import DeviceError

_HEAVY = re.compile(r"(Fused|Nhwc)?(Conv|ConvTranspose|Gemm|MatMul|BatchNormalization)(Activation)?")


@dataclasses.dataclass(frozen=True)
class NodeAssignment:
    """Where ONNX Runtime put one node."""

    op_type: str
    name: str
    provider: str


def assignments(session: Any) -> list[NodeAssignment]:
    """Which provider each node was given to, as the session recorded it at creation."""
    return [
        NodeAssignment(node.op_type, node.name, graph.ep_name)
        for graph in session.get_provider_graph_assignment_info()
        for node in graph.get_nodes()
    ]


def prove_heavy_nodes(found: Sequence[NodeAssignment], *providers: str) -> tuple[str, ...]:
    """The nodes that are on none of the providers, as `op name`.

    Raises `DeviceError` when one of them is a convolution, matrix product or batch normalisation, or
    when nothing was recorded: no record is no proof.
    """
    asked = " and ".join(providers)
    if not found:
        raise DeviceError(
            f"ONNX Runtime recorded no node assignment, so running on {asked} is not proved",
            next_step="pip install --upgrade onnxruntime-gpu, or use --device cpu",
        )
    elsewhere = [node for node in found if node.provider not in providers]
    heavy = [node for node in elsewhere if _HEAVY.fullmatch(node.op_type)]
    if heavy:
        first = heavy[0]
        raise DeviceError(
            f"{len(heavy)} heavy node(s) are not on {asked}: {first.op_type} is on {first.provider}",
            where=first.name,
            next_step="use --device cpu, or report the model to bntool",
        )
    return tuple(f"{node.op_type} {node.name}".strip() for node in elsewhere)
