"""A run in float64 without a copy of the model is the run of a float64 copy."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bntool.core.options import FoldOptions
from bntool.graph.inputs import Inputs
from bntool.subjects.module import ModuleSubject
from bntool.surgery.fold_modules import apply_fold
from bntool.verifying import float64
from bntool.verifying.float64 import Unrounded, run_float64


class Counts(nn.Module):
    """Writes to a buffer of its own type."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 8, 3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        out: Tensor = self.layer(x) * self.seen
        return out


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.embed = nn.Conv2d(3, 8, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        out: Tensor = self.attention(tokens, tokens, tokens)[0]
        return out


def _grouped(groups: int, stride: int = 1, padding: int | str = 1, dilation: int = 1) -> nn.Module:
    return nn.Conv2d(96, 96, 3, stride, padding, dilation, groups=groups)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)),
    "grouped": lambda: nn.Sequential(
        nn.Conv2d(3, 96, 1), _grouped(96), _grouped(96, 2, 1), _grouped(32, 2, 0, 2)
    ),
    "grouped, same": lambda: nn.Sequential(nn.Conv2d(3, 96, 4, 4), _grouped(96, 1, "same")),
    "transposed": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 8, 3, groups=8)),
    "large linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(768, 1500), nn.Linear(1500, 4, bias=False)),
    "attention": Attends,
    "writes": Counts,
    "recurrent": lambda: nn.Sequential(nn.Flatten(2), nn.LSTM(256, 5, batch_first=True)),
    "prelu": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3, padding_mode="reflect", padding=1), nn.PReLU(8), nn.GroupNorm(2, 8)
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_it_computes_what_a_copy_computes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float64, "_MOST_AT_ONCE", 10_000)
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    inputs = Inputs((torch.randn(2, 3, 16, 16),))
    state = {key: (tensor.data_ptr(), tensor.clone()) for key, tensor in model.state_dict().items()}
    (found,), narrow = run_float64(model, [inputs])
    with torch.no_grad():
        out = copy.deepcopy(model).double()(inputs.args[0].double())
    expected = out if isinstance(out, Tensor) else out[0]
    got = next(iter(found.values()))
    assert got.dtype == torch.float64 and not narrow
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-13 * max(float(expected.abs().max()), 1))
    for key, tensor in model.state_dict().items():
        assert tensor.data_ptr() == state[key][0] and torch.equal(tensor, state[key][1])


def test_a_model_that_narrows_inside_says_so() -> None:
    class Narrows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(x).float().to(self.layer.weight.dtype)
            return out

    _, narrow = run_float64(Narrows().eval(), [Inputs((torch.randn(2, 4),))])
    assert narrow == {torch.float32}


def test_numbers_that_were_rounded_run_as_they_were_before() -> None:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    model = nn.Sequential(
        *layers, nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 81, 5), nn.BatchNorm1d(5)
    ).eval()
    for norm in (model[1], model[4], model[7]):
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
        nn.init.normal_(norm.bias)
    inputs = Inputs((torch.randn(2, 3, 9, 9),))
    subject = ModuleSubject(model, inputs)
    plan = subject.plan_fold(FoldOptions(), thorough=False)
    after = subject.folded(plan)

    def no_copy() -> nn.Module:
        raise AssertionError("the numbers are all known")

    def apart(candidate: nn.Module | Unrounded) -> float:
        (found,), _ = run_float64(candidate, [inputs])
        return float((found["output"] - expected["output"]).abs().max())

    (expected,), _ = run_float64(model, [inputs])
    assert len(list(plan.fold_sites)) == 3
    assert apart(Unrounded(after.model, after.numbers, no_copy)) < 1e-13
    assert apart(after.model) > 1e-9
    assert apart(Unrounded(after.model, {}, lambda: apply_fold(model, plan, wide=True))) < 1e-13
