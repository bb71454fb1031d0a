from __future__ import annotations

import pytest
import torch

from tests.cli import nets
from tests.cli.conftest import Shell

SHORT = ("--rounds", "11", "--batch-sizes", "1,2")


def test_a_fold_is_timed_before_and_after(bntool: Shell) -> None:
    nets.save(nets.normalised(), "model.pt")
    said = bntool("fold", "model.pt", *nets.INPUT, "--export", "onnx", "--bench", *SHORT, "--json")
    assert said.code == 0, said
    found = said.document["latency"]
    names = ["torch before", "torch folded", "ONNX before", "ONNX folded"]
    assert [row["name"] for row in found["rows"]] == names * 2
    assert {row["device"] for row in found["rows"]} == {"cpu"}
    assert [row["provider"] for row in found["rows"][:4]] == ["torch"] * 2 + ["CPUExecutionProvider"] * 2
    before, after = found["costs"][:2]
    assert before["parameters"] > after["parameters"]
    assert before["flops"] > 0
    assert {cost["flops"] for cost in found["costs"]} == {before["flops"]} == {after["flops"]}
    assert [(c["first"], c["second"]) for c in found["comparisons"][::2]] == [
        ("torch before", "torch folded"), ("ONNX before", "ONNX folded"), ("torch folded", "ONNX folded"),
    ]  # fmt: skip


def test_bench_compares_any_two(bntool: Shell) -> None:
    nets.save(nets.normalised(), "model.pt")
    assert bntool("fold", "model.pt", *nets.INPUT, "--export", "onnx").code == 0
    said = bntool("bench", "model.pt", "model_folded.onnx", *nets.INPUT, *SHORT)
    assert said.code == 0, said
    assert "ORT CPU" in said.out
    assert "batch 2: " in said.out
    files = bntool("bench", "model_folded.onnx", "model_folded.onnx", *SHORT, "--json").document
    assert [row["name"] for row in files["latency"]["rows"][:2]] == [
        "model_folded.onnx (A)", "model_folded.onnx (B)",
    ]  # fmt: skip


def test_bench_takes_an_exported_program(bntool: Shell) -> None:
    model = nets.normalised()
    program = torch.export.export(model, (torch.randn(2, 3, 12, 12),))
    torch.export.save(program, "model.pt2")
    nets.save(model, "model.pt")
    said = bntool("bench", "model.pt2", "model.pt", "--rounds", "11", "--batch-sizes", "1,2", "--json")
    assert said.code == 0, said
    assert [row["batch"] for row in said.document["latency"]["rows"]] == [2, 2]
    assert "batch 1 is left out" in said.document["latency"]["notes"][0]


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("bench", "model.pt"), 2, "B"),
        (("bench", "model.pt", "nope.pt"), 3, "nope.pt"),
        (("bench", "model.pt", "model.pt", "--rounds", "3"), 2, "--rounds"),
        (("bench", "model.pt", "model.pt", "--batch-sizes", "0"), 2, "not like 1,8,32"),
        (("bench", "model.pt", "model.pt", "--device", "tpu"), 2, "tpu"),
    ],
)
def test_what_cannot_be_timed(refused: Shell, words: tuple[str, ...], code: int, says: str) -> None:
    nets.save(nets.normalised(), "model.pt")
    refused(*words, code=code, says=says)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_that_is_not_there_is_exit_5(refused: Shell) -> None:
    nets.save(nets.normalised(), "model.pt")
    refused("bench", "model.pt", "model.pt", *nets.INPUT, "--device", "cuda", code=5)
