"""Tensors of every kind that torch can save: a right answer or one true sentence, from every command."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.cli import nets
from tests.cli.conftest import Said, Shell

Refused = Callable[..., Said]
Make = Callable[[Tensor], Tensor]

ARCHITECTURE = """
from torch import nn


def make():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.BatchNorm2d(2)
    ).eval()
"""
COMMANDS = (
    ["summary", *nets.INPUT],
    ["fold", *nets.INPUT],
    ["insert", *nets.INPUT],
    ["export", *nets.INPUT],
    ["calibrate", "--data", "data.npy", *nets.INPUT],
    ["verify", "good.pt", *nets.INPUT],
)
PLACES = ("0.weight", "1.running_mean", "1.running_var", "1.bias")


def _parts(layout: torch.layout) -> Make:
    return lambda t: torch.nested.nested_tensor([t.flatten(), t.flatten()[:1]], layout=layout)


def _bytes_as(dtype: torch.dtype) -> Make:
    return lambda t: torch.zeros(t.shape, dtype=torch.uint8).view(dtype)


def _by_channel(tensor: Tensor) -> Tensor:
    scales, zeros = torch.full((len(tensor),), 0.1), torch.zeros(len(tensor), dtype=torch.int64)
    return torch.quantize_per_channel(tensor, scales, zeros, 0, torch.qint8)


OTHERS: dict[str, tuple[str, Make]] = {
    "sparse": ("sparse", lambda t: t.to_sparse()),
    "csr": ("sparse", lambda t: t.reshape(1, -1).to_sparse_csr()),
    "meta": ("meta", lambda t: t.to("meta")),
    "nested": ("nested", _parts(torch.strided)),
    "jagged": ("nested", _parts(torch.jagged)),
    "quantized": ("quantized", lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)),
    "by channel": ("quantized", _by_channel),
}
STORED_ONLY: dict[str, tuple[str, Make]] = {
    "float4": ("float4_e2m1fn_x2", _bytes_as(torch.float4_e2m1fn_x2)),
    "bits": ("bits8", _bytes_as(torch.bits8)),
}
NUMBERS: dict[str, Make] = {
    "complex": lambda t: t.to(torch.complex64),
    "conjugate": lambda t: t.to(torch.complex64).conj(),
    "complex half": lambda t: t.to(torch.complex32),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "scales": lambda t: (t.abs() + 1).to(torch.float8_e8m0fnu),
    "int8": lambda t: t.to(torch.int8),
    "uint64": lambda t: t.abs().to(torch.uint64),
    "bool": lambda t: t.bool(),
    "no values": lambda t: t[:0],
    "no axes": lambda t: t.flatten()[0].clone(),
    "bfloat16": lambda t: t.bfloat16(),
}


def _negative_view(tensor: Tensor) -> Tensor:
    """The same numbers, kept as their negatives."""
    view = torch.complex(torch.zeros_like(tensor), -tensor).conj().imag
    assert view.is_neg()
    return view


@pytest.fixture(autouse=True)
def _quietly() -> Any:
    # torch has things to say about kinds of tensors that it is about to drop.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(autouse=True)
def _beside(folder: Path) -> None:
    (folder / "net.py").write_text(ARCHITECTURE)
    nets.save(nets.normalised(), "good.pt")
    nets.save(nets.normalised(), "same.pt")
    np.save("data.npy", np.random.default_rng(0).normal(size=(4, 3, 12, 12)).astype("float32"))


def _holding(place: str, make: Make) -> nn.Module:
    model = nets.normalised()
    layer, name = model.get_submodule(place.partition(".")[0]), place.partition(".")[2]
    tensor = make(getattr(layer, name).detach())
    if name.startswith("running"):
        layer._buffers[name] = tensor
    else:
        layer._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    return model


def _state(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.state_dict())


def _arch(command: list[str]) -> list[str]:
    return [*command, "--arch", "net.py:make"]


@pytest.mark.parametrize("kind", OTHERS)
def test_a_kind_of_tensor_that_is_not_read_is_named(refused: Refused, kind: str) -> None:
    word, make = OTHERS[kind]
    for place in PLACES:
        nets.save(_holding(place, make), "whole.pt")
        nets.save({"model": _state(_holding(place, make))}, "weights.pt")
        assert "suspicious" not in refused("inspect", "whole.pt", "--json", code=3, says=word).err
        for command in COMMANDS:
            said = refused(command[0], "whole.pt", *command[1:], code=3, says=f"holds a {word}")
            assert "run code" not in said.err
            refused(command[0], "weights.pt", *_arch(command[1:]), code=3, says=f"holds a {word}")


@pytest.mark.parametrize("kind", [*OTHERS, *STORED_ONLY])
def test_trust_reads_no_more_of_them(refused: Refused, kind: str) -> None:
    word, make = {**OTHERS, **STORED_ONLY}[kind]
    nets.save(_state(_holding("1.bias", make)), "weights.pt")
    nets.save(_holding("1.bias", make), "whole.pt")
    for command in COMMANDS[:3]:
        trusting = [*command[1:], "--trust-pickle"]
        refused(command[0], "whole.pt", *trusting, code=3, says=word)
        refused(command[0], "weights.pt", *_arch(trusting), code=3, says=f"{word}")


@pytest.mark.parametrize("kind", STORED_ONLY)
def test_a_type_that_is_only_stored_is_named(bntool: Shell, refused: Refused, kind: str) -> None:
    word, make = STORED_ONLY[kind]
    nets.save(_state(_holding("0.weight", make)), "weights.pt")
    nets.save(_holding("0.weight", make), "whole.pt")
    assert word in bntool("inspect", "weights.pt").out
    for command in COMMANDS:
        refused(command[0], "whole.pt", *command[1:], code=3, says=word)
        refused(command[0], "weights.pt", *_arch(command[1:]), code=3, says=word)


class Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch marker",)


def test_code_does_not_hide_behind_a_sparse_tensor(refused: Refused) -> None:
    nets.save({"a": torch.eye(2).to_sparse(), "b": Runs()}, "evil.pt")
    refused("fold", "evil.pt", code=3, says="can run code")
    refused("inspect", "evil.pt", "--json", code=3, says="can run code")
    assert not Path("marker").exists()


@pytest.mark.parametrize("kind", NUMBERS)
def test_numbers_that_no_layer_takes_are_no_bug(bntool: Shell, kind: str) -> None:
    documented = {0, 1, 2, 3, 4, 6, 7}
    for place in PLACES[:2]:
        nets.save(_holding(place, NUMBERS[kind]), "whole.pt")
        assert bntool("inspect", "whole.pt").code == 0
        for command in COMMANDS:
            said = bntool(command[0], "whole.pt", *command[1:])
            assert said.code in documented, said
            assert said.err.count("error: ") == (said.code != 0)
            assert said.code == 0 or "\n  next:  " in said.err


@pytest.mark.parametrize("kind", ["float8", "scales", "int8", "bool", "no values"])
def test_weights_that_are_no_floats_are_no_bug(bntool: Shell, kind: str) -> None:
    nets.save(_state(_holding("1.running_var", NUMBERS[kind])), "weights.pt")
    for command in (COMMANDS[0], COMMANDS[1], COMMANDS[4]):
        said = bntool(command[0], *_arch(["weights.pt", *command[1:]]))
        assert said.code in {0, 2, 3, 7}, said


@pytest.mark.parametrize("kind", ["complex", "conjugate", "complex half"])
@pytest.mark.parametrize("place", PLACES)
def test_half_of_a_complex_number_is_not_dropped(refused: Refused, kind: str, place: str) -> None:
    nets.save(_state(_holding(place, NUMBERS[kind])), "weights.pt")
    for command in COMMANDS:
        refused(command[0], "weights.pt", *_arch(command[1:]), code=3, says=f"{place} is torch.complex")


# -- what must be right --------------------------------------------------------------------------------------


def _expanded(tensor: Tensor) -> Tensor:
    return tensor[:1].expand(tensor.shape)


def _view_of_a_larger_storage(tensor: Tensor) -> Tensor:
    return torch.cat([tensor + 1, tensor, tensor - 1])[len(tensor) : 2 * len(tensor)]


def _strided(tensor: Tensor) -> Tensor:
    return torch.stack([tensor, tensor + 1], dim=-1)[..., 0]


VIEWS = {
    "negative": _negative_view,
    "expanded": _expanded,
    "part": _view_of_a_larger_storage,
    "strided": _strided,
}


@pytest.mark.parametrize("kind", VIEWS)
@pytest.mark.parametrize("place", ["0.weight", "1.running_var"])
def test_views_fold_right(bntool: Shell, kind: str, place: str) -> None:
    model = _holding(place, VIEWS[kind])
    nets.save(model, "whole.pt")
    nets.save(_state(model), "weights.pt")
    x = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    wanted = model(x)
    assert bntool("fold", "whole.pt", *nets.INPUT).code == 0
    assert bntool("fold", *_arch(["weights.pt", *nets.INPUT])).code == 0
    folded = torch.load("whole_folded.pt", weights_only=False)
    torch.testing.assert_close(folded(x), wanted, rtol=1e-4, atol=1e-5)
    bare = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Identity(), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.Identity())
    bare.load_state_dict(torch.load("weights_folded.pt", weights_only=True))
    torch.testing.assert_close(bare(x), wanted, rtol=1e-4, atol=1e-5)


# torch.export.save itself loses the sign of a negative view.
@pytest.mark.parametrize("kind", ["expanded", "part", "strided"])
@pytest.mark.parametrize("place", ["0.weight", "1.running_mean"])
def test_views_in_a_program_fold_right(bntool: Shell, kind: str, place: str) -> None:
    x = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    model = _holding(place, VIEWS[kind])
    torch.export.save(torch.export.export(model, (x,)), "program.pt2")
    assert bntool("fold", "program.pt2").code == 0
    folded = torch.export.load("program_folded.pt2").module()
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.fixture
def plan(bntool: Shell) -> str:
    nets.save(_state(nets.normalised()), "good_weights.pt")
    assert bntool("fold", *_arch(["good_weights.pt", *nets.INPUT])).code == 0
    return "good_weights_folded.pt.bntool.json"


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["complex", "float8", "scales", "int8", "uint64", "bool"])
def test_a_plan_folds_real_numbers_alone(refused: Refused, plan: str, kind: str, place: str) -> None:
    nets.save(_state(_holding(place, NUMBERS[kind])), "weights.pt")
    refused("fold", "weights.pt", "--plan", plan, code=2, says=f"{place} is stored as")


def test_a_plan_reads_views_as_they_are(bntool: Shell, refused: Refused, plan: str) -> None:
    assert bntool("fold", "good_weights.pt", "--plan", plan, "-o", "wanted.safetensors").code == 0
    for kind in ("part", "strided"):
        nets.save(_state(_holding("0.weight", VIEWS[kind])), "weights.pt")
        assert bntool("fold", "weights.pt", "--plan", plan, "-o", f"{kind}.safetensors").code == 0
        assert Path(f"{kind}.safetensors").read_bytes() == Path("wanted.safetensors").read_bytes()
    for place in PLACES:
        nets.save(_state(_holding(place, _negative_view)), "weights.pt")
        refused("fold", "weights.pt", "--plan", plan, code=3, says="as its negative")


@pytest.mark.parametrize("kind", [*OTHERS, "float4"])
def test_data_of_another_kind_is_named(refused: Refused, kind: str) -> None:
    word, make = {**OTHERS, **STORED_ONLY}[kind]
    data = make(torch.ones(4, 3, 12, 12))
    nets.save({"input": data}, "data.pt")
    refused("calibrate", "good.pt", "--data", "data.pt", *nets.INPUT, code=3)
    refused("verify", "good.pt", "same.pt", "--inputs", "data.pt", code=3)
    if kind not in ("quantized", "by channel", "jagged"):  # torch itself refuses those
        refused("calibrate", "good.pt", "--data", "data.pt", *nets.INPUT, code=3, says=word)


def test_statistics_in_a_type_without_comparisons(refused: Refused) -> None:
    nets.save(_holding("1.running_var", NUMBERS["float8"]), "model.pt")
    refused("calibrate", "model.pt", "--data", "data.npy", *nets.INPUT, code=2, says="failed on a batch")
