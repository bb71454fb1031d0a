"""The program that a fold leaves: its parameters, its signature, its outputs, and its way to ONNX."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

import bntool
from bntool.surgery.fold_program import apply_fold_program, in_float64
from tests.program_zoo import PROGRAM_ZOO, decomposed, plan_fold_program

ZOO = {net.name: net for net in PROGRAM_ZOO}


def folded(name: str) -> ExportedProgram:
    return bntool.fold(ZOO[name].program(), check="none").program


def test_a_bias_that_was_not_there_is_a_parameter_with_its_placeholder() -> None:
    program = folded("no_bias")
    specs = program.graph_signature.input_specs
    assert [(s.kind, s.target) for s in specs] == [
        (InputKind.PARAMETER, "conv.weight"),
        (InputKind.PARAMETER, "conv.bias"),
        (InputKind.USER_INPUT, None),
    ]
    assert set(program.state_dict) == {"conv.weight", "conv.bias"}
    assert program.state_dict["conv.bias"].requires_grad
    assert set(dict(program.module().named_parameters())) == {"conv.weight", "conv.bias"}


def test_a_made_bias_takes_no_name_that_is_in_use() -> None:
    program = folded("bias_with_another_use")
    assert set(program.state_dict) == {"owner.weight", "owner.bias", "owner.bias_1"}
    assert program.state_dict["owner.bias_1"].shape == (6,)


def test_weights_of_the_root_get_biases_of_their_own() -> None:
    assert set(folded("weights_of_the_root").state_dict) == {"w", "w_bias", "v", "v_bias"}


def test_a_product_with_a_matrix_gets_an_add_behind_it() -> None:
    program = folded("matrix_of_the_root")
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets == ["aten.matmul.default", "aten.add.Tensor"]
    assert program.graph_signature.user_outputs == (
        next(n.name for n in program.graph.nodes if "add" in n.name),
    )


def test_the_output_is_named_by_what_now_makes_it() -> None:
    for program in (ZOO["conv_bn"].program(), decomposed(ZOO["conv_bn"].program())):
        made = bntool.fold(program, check="none").program
        last = [node for node in made.graph.nodes if node.op == "call_function"][-1]
        assert made.graph_signature.user_outputs == (last.name,)


def test_the_copy_shares_no_tensor_with_the_program() -> None:
    program = ZOO["behind_relu"].program()
    plan, observed = plan_fold_program(program)
    copied = apply_fold_program(observed, plan)
    assert not plan
    for name, tensor in copied.state_dict.items():
        assert torch.equal(tensor, program.state_dict[name])
        assert tensor.data_ptr() != program.state_dict[name].data_ptr()


def test_tied_weights_stay_tied() -> None:
    program = ZOO["weight_tied"].program()
    plan, observed = plan_fold_program(program)
    state = apply_fold_program(observed, plan).state_dict
    assert state["c.weight"].data_ptr() == state["d.weight"].data_ptr()


def test_wide_is_the_same_program_in_float64() -> None:
    program = ZOO["conv_bn"].program()
    wide = in_float64(program)
    floats = [tensor for tensor in wide.state_dict.values() if tensor.is_floating_point()]
    assert {tensor.dtype for tensor in floats} == {torch.float64}
    assert {node.meta["val"].dtype for node in wide.graph.nodes if node.op == "call_function"} == {
        torch.float64
    }
    (x,) = ZOO["conv_bn"].inputs()
    with torch.no_grad():
        exact, own = wide.module()(x.double()), program.module()(x)
    # one sum of 36 products, each rounded once
    limit = 36 * torch.finfo(torch.float32).eps * float(exact.abs().max())
    assert float((exact - own).abs().max()) <= limit


@pytest.mark.parametrize("name", ["no_bias", "functional", "dynamic_batch", "linear"])
def test_it_goes_to_onnx(name: str, tmp_path: Path) -> None:
    net = ZOO[name]
    program = folded(name)
    path = tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, while it converts
        torch.onnx.export(program, f=str(path), dynamo=True, verbose=False, external_data=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (x,) = net.inputs()
    got: Any = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    with torch.no_grad():
        expected = program.module()(x)
    # one sum of 36 products, in another order
    limit = 36 * torch.finfo(torch.float32).eps * float(expected.abs().max())
    assert float((torch.from_numpy(got) - expected).abs().max()) <= limit
