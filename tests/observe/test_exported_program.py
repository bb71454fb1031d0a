"""What the front end for exported programs sees: names, sizes, memory, and what a program writes to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bntool.observe.exported_program import observe_program
from tests.fold_zoo import Net, bn, conv, enliven
from tests.program_zoo import BATCH, PROGRAM_ZOO, decomposed, exported

ZOO = {net.name: net for net in PROGRAM_ZOO}
IMAGE = (torch.randn(2, 4, 8, 8),)


def test_tensors_have_the_names_of_the_program() -> None:
    program = ZOO["conv_bn"].program()
    observed = observe_program(program)
    state = program.state_dict
    assert set(observed.graph.tensors) == set(state)
    assert all(tensor is state[name] for name, tensor in observed.graph.tensors.items())
    assert observed.layers == {"conv": ("conv2d",)}
    assert observed.norms == {"bn": ("batch_norm",)}
    assert not observed.open


def test_decomposing_changes_no_kind_and_no_attribute() -> None:
    program = ZOO["linear"].program()
    whole, apart = observe_program(program).graph, observe_program(decomposed(program)).graph
    assert [(op.kind, op.attrs) for op in whole.ops] == [(op.kind, op.attrs) for op in apart.ops]
    assert whole.signature() == apart.signature()


def test_open_sizes_differ_between_the_two_sets() -> None:
    program = ZOO["dynamic_image"].program()
    first, second = (observe_program(program, sizes=i) for i in (0, 1))
    assert first.open and second.open
    shapes = [
        (a.shape, b.shape)
        for a, b in zip(first.graph.values, second.graph.values, strict=True)
        if not a.constant
    ]
    assert shapes[0] == ((2, 4, 8, 8), (6, 4, 24, 24))
    assert shapes[1] == ((2, 6, 6, 6), (6, 6, 22, 22))


def test_tied_weights_are_one_value_with_several_readers() -> None:
    observed = observe_program(ZOO["weight_tied"].program())
    weight = next(v for v in observed.graph.values if v.handle == "c.weight")
    assert [observed.graph.ops[op].kind for op, _ in weight.readers] == ["conv", "conv"]
    assert not any(value.handle == "d.weight" for value in observed.graph.values)


def test_a_stored_tensor_that_is_written_to_is_no_constant() -> None:
    for program in (ZOO["counted_factor"].program(), decomposed(ZOO["counted_factor"].program())):
        graph = observe_program(program).graph
        assert "count.factor" not in graph.tensors
        product = next(graph.of_kind("mul"))
        assert not any(graph.input(product, role).constant for role in product.inputs)


def test_a_view_of_what_is_overwritten_reads_something_new() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        view = y[:, :2]
        y.relu_()
        out: Tensor = m.bn(y)[:, :2] + view
        return out

    program = exported(enliven(Net(run, {"conv": conv(), "bn": bn()}).eval()), IMAGE)
    graph = observe_program(program).graph
    mixed = next(graph.of_kind("overwritten_view"))
    written = next(graph.of_kind("relu"))
    assert written.inplace
    assert mixed.inputs["other"] == written.outputs[0]
    assert mixed.outputs[0] in next(graph.of_kind("add")).inputs.values()
    assert graph.input(next(graph.of_kind("batch_norm"))).producer == written.id


def test_small_constants_are_computed() -> None:
    program = exported(
        enliven(
            Net(
                lambda m, x: m.bn(m.conv(x)) * torch.full((1, 6, 1, 1), 3.0), {"conv": conv(), "bn": bn()}
            ).eval()
        ),
        IMAGE,
    )
    graph = observe_program(program).graph
    product = next(graph.of_kind("mul"))
    factor = graph.constant(graph.input(product, "other"))
    assert factor is not None and torch.equal(factor, torch.full((1, 6, 1, 1), 3.0))


def test_a_training_norm_says_so_also_decomposed() -> None:
    model = enliven(nn.Sequential(conv(), bn()))
    model.train()
    program = exported(model, IMAGE, BATCH)
    for made in (program, decomposed(program)):
        observed = observe_program(made)
        assert [op.attrs["training"] for op in observed.graph.of_kind("batch_norm")] == [True]
        assert list(observed.norms) == ["1"]
