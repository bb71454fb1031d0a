"""All front ends speak the vocabulary of `bntool.graph.ops`, and every law is for a word of it."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir
import pytest

from bntool.graph.dataflow import Graph
from bntool.graph.inputs import Inputs
from bntool.graph.ops import OPS
from bntool.laws.base import LAWS
from bntool.observe.eager import observe
from bntool.observe.exported_program import observe_program
from bntool.observe.onnx_model import observe_onnx
from tests.fold_zoo import ZOO, Entry
from tests.onnx_zoo import ONNX_ZOO, OnnxNet
from tests.program_zoo import PROGRAM_ZOO, ProgramNet


def _faults(graph: Graph) -> Iterator[str]:
    for op in graph.ops:
        if op.kind in OPS:
            yield from (f"{op.kind} {fault}" for fault in OPS[op.kind].faults(op.inputs, op.attrs))
        elif op.attrs:
            yield f"{op.kind} is no word, and has {sorted(op.attrs)}"


def _graph_of_module(net: Entry) -> Graph:
    return observe(net.build(), Inputs(net.inputs())).graph


def _graph_of_program(net: ProgramNet) -> Graph:
    return observe_program(net.program()).graph


def _graph_of_file(net: OnnxNet) -> Graph:
    return observe_onnx(ir.from_proto(net.model())).graph


FRONT_ENDS = {
    "module": (_graph_of_module, ZOO),
    "program": (_graph_of_program, PROGRAM_ZOO),
    "onnx": (_graph_of_file, ONNX_ZOO),
}


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_every_op_is_as_the_vocabulary_has_it(front_end: str) -> None:
    graph_of, nets = FRONT_ENDS[front_end]
    found: dict[str, str] = {}
    seen: set[str] = set()
    for net in nets:
        graph = graph_of(net)  # type: ignore[operator]
        seen.update(op.kind for op in graph.ops)
        found.update((fault, net.name) for fault in _faults(graph))
    assert found == {}
    assert len(seen & OPS.keys()) >= 15, "the zoo hardly speaks"


def test_every_law_is_for_a_word_or_for_an_op_that_it_refuses() -> None:
    quantised = ("quantize", "Quantize", "QLinear", "Integer")
    unknown = [kind for kind in LAWS if kind not in OPS and not any(q in kind for q in quantised)]
    assert unknown == []
