from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from bntool.core.errors import CheckFailed, DeviceError, ExportError
from bntool.core.tolerances import ALGEBRA_LIMIT, Tolerance
from bntool.graph.inputs import Inputs
from bntool.results.checks import Comparison
from bntool.verifying.algebra import Redone
from bntool.verifying.checking import check_surgery, seeded_batches
from bntool.verifying.conditions import Conditions
from bntool.verifying.export_checking import check_onnx, named_as
from bntool.verifying.reference import Reference
from tests.exports import export_onnx


def randomised(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    return model.eval()


def folded(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Each Conv2d and the BatchNorm2d defined right after it, folded in float64 and cast once."""
    model = copy.deepcopy(model).double()
    conv = None
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Conv2d):
            conv = module
        elif isinstance(module, nn.BatchNorm2d):
            conv.weight, conv.bias = fuse_conv_bn_weights(
                conv.weight, conv.bias, module.running_mean, module.running_var, module.eps, module.weight,
                module.bias,
            )  # fmt: skip
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, nn.Identity())
    return model.to(dtype)


def small_net() -> nn.Module:
    return randomised(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
        )
    )  # fmt: skip


IMAGE = Inputs((torch.zeros(1, 3, 12, 12),))


class Counted(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.calls = [0]

    def __deepcopy__(self, memo: dict) -> Counted:
        other = Counted(copy.deepcopy(self.inner, memo))
        other.calls = self.calls
        return other

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls[0] += 1
        return self.inner(x)


def test_a_correct_fold_of_resnet18_passes_and_proves_the_algebra():
    models = pytest.importorskip("torchvision").models
    model = randomised(models.resnet18())
    checks = check_surgery(
        Reference(model, seeded_batches(Inputs((torch.zeros(1, 3, 64, 64),)))),
        folded(model, torch.float32),
        stage="fold",
        redone=Redone(folded(model, torch.float64)),
    )
    assert [check.passed for check in checks] == [True, True]
    row, algebra = checks
    assert (row.stage, row.device, row.provider, row.batches) == ("fold", "cpu", "torch", 3)
    assert 0 < row.noise_floor < 1e-5
    assert row.top1 == 1.0
    assert algebra.limit == ALGEBRA_LIMIT
    assert algebra.relative < 1e-13


def forget_bias(model: nn.Module) -> None:
    nn.init.zeros_(model[0].bias)


def scale_weight(model: nn.Module) -> None:
    model[3].weight.data.mul_(1.001)


def swap_channels(model: nn.Module) -> None:
    model[0].weight.data = model[0].weight.data[[1, 0, *range(2, 8)]]


def wrong_eps(model: nn.Module) -> None:
    model[3].weight.data.mul_((1 + 1e-3) ** 0.5)


@pytest.mark.parametrize("mutate", [forget_bias, scale_weight, swap_channels, wrong_eps])
def test_a_wrong_fold_fails(mutate):
    model = small_net()
    candidate = folded(model, torch.float32)
    mutate(candidate)
    (check,) = check_surgery(Reference(model, seeded_batches(IMAGE)), candidate, stage="fold")
    assert not check.passed
    assert check.ratio > 8


def test_wrong_algebra_below_the_float32_noise_fails_in_float64():
    model = small_net()
    candidate64 = folded(model, torch.float64)
    candidate64[3].weight.data.mul_(1 + 1e-8)
    row, algebra = check_surgery(
        Reference(model, seeded_batches(IMAGE)),
        folded(model, torch.float32),
        stage="fold",
        redone=Redone(candidate64),
    )
    assert row.passed
    assert not algebra.passed
    assert not Comparison((row, algebra))


class Chaotic(nn.Module):
    """The logistic map, which doubles an error at each step: a rounding becomes about eps * 2^steps."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.sigmoid(x)
        for _ in range(self.steps):
            x = 4 * x * (1 - x)
        return x


def chaotic_net(steps: int) -> nn.Module:
    conv_and_norm = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))
    return randomised(nn.Sequential(*conv_and_norm, Chaotic(steps)))


def test_a_model_that_amplifies_rounding_is_held_to_its_own_rounding_in_float64():
    model = chaotic_net(24)  # 2.2e-16 * 2^24 = 4e-9, above what the algebra of other models is held to
    (*_, check) = check_surgery(
        Reference(model, seeded_batches(IMAGE)),
        folded(model, torch.float32),
        stage="fold",
        changed_parts={"0", "1"},
        redone=Redone(folded(model, torch.float64)),
    )
    assert check.passed
    assert ALGEBRA_LIMIT < check.relative < check.limit < 1e-6  # a wrong bit of float32 shows above 1e-6
    assert "own rounding in float64" in check.detail


def test_wrong_algebra_of_a_model_that_amplifies_rounding_fails():
    model = chaotic_net(24)
    candidate64 = folded(model, torch.float64)
    candidate64[0].weight.data.mul_(1 + 1e-12)  # ten thousand roundings
    (*_, algebra) = check_surgery(
        Reference(model, seeded_batches(IMAGE)),
        folded(model, torch.float32),
        stage="fold",
        changed_parts={"0", "1"},
        redone=Redone(candidate64),
    )
    assert not algebra.passed


@pytest.mark.parametrize(("factor", "passes"), [(1.0, True), (1.01, False)])
def test_where_rounding_decides_every_output_the_parts_that_stay_are_compared(factor, passes):
    layers = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3)
    model = randomised(nn.Sequential(*layers, Chaotic(24)))
    candidate = folded(model, torch.float32)
    candidate[0].weight.data.mul_(factor)
    row, algebra = check_surgery(
        Reference(model, seeded_batches(IMAGE)),
        candidate,
        stage="fold",
        changed_parts={"0", "1"},
        redone=Redone(folded(model, torch.float64)),
    )
    assert algebra.passed
    assert row.passed is passes


def lucky_reference(model: nn.Module) -> Reference:
    """A reference whose own run happened to make no error but the last rounding."""
    reference = Reference(model, seeded_batches(IMAGE))
    lucky = [{name: t.float() for name, t in outputs.items()} for outputs in reference.exact]
    reference.__dict__["_own_runs"] = list(zip(reference.inputs, lucky, strict=True))
    return reference


def test_one_lucky_draw_of_the_noise_fails_no_right_fold():
    model = chaotic_net(8)
    reference = lucky_reference(model)
    row, algebra = check_surgery(
        reference, folded(model, torch.float32), stage="fold", redone=Redone(folded(model, torch.float64))
    )
    assert row.relative > max(limit.limit for limit in reference.limits.values())
    assert (row.passed, algebra.passed) == (True, True)


def test_a_wrong_fold_fails_against_more_draws_too():
    model = chaotic_net(8)
    candidate = folded(model, torch.float32)
    candidate[0].weight.data.mul_(1 + 1e-4)
    (row,) = check_surgery(lucky_reference(model), candidate, stage="fold")
    assert not row.passed


def test_one_lucky_draw_of_the_noise_fails_no_right_file(tmp_path):
    model = chaotic_net(8)
    path = export_onnx(model, IMAGE, tmp_path / "m.onnx").path
    reference = lucky_reference(model)
    rows = check_onnx(reference, path)
    assert all(row.passed for row in rows)
    assert any(row.relative > max(limit.limit for limit in reference.limits.values()) for row in rows)


def test_a_tolerance_is_not_widened_by_more_draws(tmp_path):
    model = chaotic_net(8)
    path = export_onnx(model, IMAGE, tmp_path / "m.onnx").path
    reference = lucky_reference(model)
    rows = check_onnx(reference, path, how=Conditions(tolerance=Tolerance(atol=1e-12)))
    candidate = folded(model, torch.float32)
    rows += check_surgery(reference, candidate, stage="fold", how=Conditions(tolerance=Tolerance(rtol=1e-12)))
    assert not any(row.passed for row in rows)
    assert "redrawn_limits" not in reference.__dict__
    assert all("tol 1e-12" in row.figures for row in rows)


def test_no_model_runs_twice_on_the_same_inputs(tmp_path):
    model = Counted(small_net())
    inputs = seeded_batches(IMAGE)
    reference = Reference(model, inputs)
    check_surgery(reference, folded(model.inner, torch.float32), stage="fold")
    assert model.calls == [6]  # three batches, each in float32 and in float64
    path = export_onnx(model.inner, IMAGE, tmp_path / "m.onnx").path
    check_onnx(reference, path)
    assert model.calls == [6]


def test_export_and_runtime_have_their_own_rows(tmp_path):
    model, said = small_net(), []
    path = export_onnx(model, IMAGE, tmp_path / "m.onnx").path
    checks = check_onnx(
        Reference(model, seeded_batches(IMAGE), progress=said.append),
        path,
        how=Conditions(progress=said.append),
    )
    assert [(c.stage, c.passed, c.device, c.provider, c.batches) for c in checks] == [
        ("export", True, "cpu", "CPUExecutionProvider", 3),
        ("runtime", True, "cpu", "CPUExecutionProvider", 3),
    ]
    assert any("float64" in text for text in said)


def test_a_file_of_another_model_fails(tmp_path):
    model = small_net()
    other = copy.deepcopy(model)
    scale_weight(other)
    path = export_onnx(other, IMAGE, tmp_path / "m.onnx").path
    assert not any(c.passed for c in check_onnx(Reference(model, seeded_batches(IMAGE)), path))


def test_a_file_of_fixed_shape_is_checked_where_it_fits(tmp_path):
    model = small_net()
    path = export_onnx(
        model, Inputs((torch.zeros(2, 3, 12, 12),)), tmp_path / "m.onnx", dynamic_batch=False
    ).path
    checks = check_onnx(Reference(model, seeded_batches(IMAGE)), path)
    assert all(c.passed and c.batches == 1 and "only 1 of 3" in c.detail for c in checks)
    with pytest.raises(CheckFailed, match="takes none of these inputs"):
        check_onnx(Reference(model, seeded_batches(IMAGE, (1, 3))), path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_is_never_replaced_by_the_cpu(tmp_path):
    model = small_net()
    path = export_onnx(model, IMAGE, tmp_path / "m.onnx").path
    with pytest.raises(DeviceError):
        check_onnx(Reference(model, seeded_batches(IMAGE)), path, how=Conditions("cuda"))
    with pytest.raises(DeviceError):
        check_surgery(Reference(model, seeded_batches(IMAGE)), model, stage="fold", how=Conditions("cuda"))
    rows = check_onnx(Reference(model, seeded_batches(IMAGE)), path, how=Conditions("auto"))
    assert all(row.device == "cpu" and "CPU used: " in row.detail for row in rows)


def test_a_model_with_its_own_casts_is_held_to_a_derived_limit():
    class Casts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x.float())

    model, wrong = Casts(), Casts()
    wrong.load_state_dict(model.state_dict())
    wrong.linear.bias.data.add_(1e-3)
    inputs = seeded_batches(Inputs((torch.zeros(1, 4),)))
    (same,) = check_surgery(Reference(model, inputs), copy.deepcopy(model), stage="fold")
    assert same.passed
    assert "does not run in float64" in same.detail
    assert not check_surgery(Reference(model, inputs), wrong, stage="fold")[0].passed


def test_a_model_that_narrows_inside_is_said_to():
    class Narrows(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).float().to(x.dtype) * 2

    model = Narrows(4, 4)
    checks = check_surgery(
        Reference(model, seeded_batches(Inputs((torch.zeros(1, 4),)))),
        copy.deepcopy(model),
        stage="fold",
        redone=Redone(copy.deepcopy(model).double()),
    )
    assert all(c.passed for c in checks)
    assert "casts to float32 inside" in checks[0].detail
    assert "narrows inside" in checks[1].detail


class Chooses(nn.Module):
    """As a detection model: how many rows come out hangs on the last bits of the input's rounding."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        third = x * self.factor / 3.0
        return {"features": third, "kept": third[third * 3.0 != x]}


def test_an_output_decided_by_rounding_is_left_to_the_algebra():
    inputs = seeded_batches(Inputs((torch.zeros(1, 500),)))
    model = Chooses()
    row, algebra = check_surgery(
        Reference(model, inputs), Chooses(1.0 + 2e-7), stage="fold", redone=Redone(Chooses().double())
    )
    assert row.passed
    assert "own rounding changes this output's shape, decided in float64" in row.detail
    assert algebra.passed
    (alone,) = check_surgery(Reference(model, inputs), Chooses(1.0 + 2e-7), stage="fold")
    assert not alone.passed
    assert "nothing is proved" in alone.detail
    _, wrong = check_surgery(
        Reference(model, inputs),
        Chooses(1.0 + 2e-7),
        stage="fold",
        redone=Redone(Chooses(1.0 + 1e-6).double()),
    )
    assert not wrong.passed


def test_inputs_that_the_original_cannot_run_are_left_out_and_said():
    class OnlyTwo(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.reshape(2, 4))

    model = OnlyTwo(4, 3)
    (check,) = check_surgery(
        Reference(model, seeded_batches(Inputs((torch.zeros(1, 4),)))), copy.deepcopy(model), stage="fold"
    )
    assert check.passed
    assert check.batches == 1
    assert "cannot run 1x4, left out" in check.detail
    with pytest.raises(CheckFailed, match="nothing to compare"):
        Reference(model, seeded_batches(Inputs((torch.zeros(1, 4),)), (3,))).outputs  # noqa: B018
    with pytest.raises(CheckFailed, match="nothing to compare"):
        Reference(model, []).outputs  # noqa: B018


def test_a_candidate_that_does_not_run_is_named_with_its_stage():
    with pytest.raises(CheckFailed, match="after insert does not run"):
        check_surgery(
            Reference(nn.Linear(4, 4), seeded_batches(Inputs((torch.zeros(1, 4),)))),
            nn.Linear(5, 4),
            stage="insert",
        )


def test_every_batch_has_numbers_of_its_own():
    """A row that two batches share would be checked once."""
    one, two, three = (inputs.args[0] for inputs in seeded_batches(Inputs((torch.zeros(1, 3, 16, 16),))))
    rows = [*one, *two, *three]
    assert not any(torch.equal(a, b) for i, a in enumerate(rows) for b in rows[:i])
    again = seeded_batches(Inputs((torch.zeros(1, 3, 16, 16),)), seed=1)
    assert not torch.equal(again[0].args[0], one)


@pytest.mark.parametrize(
    ("how", "twice", "smaller"),
    [
        (Conditions(), False, True),
        (Conditions(twice=True), True, False),
        (Conditions(tolerance=Tolerance(atol=1e-3)), False, False),
    ],
)
def test_what_rounding_does_may_be_seen_on_smaller_inputs_and_the_rows_tell_on_which(how, twice, smaller):
    """Not where the candidate runs twice, or the user says what it may differ by."""
    model = small_net()
    large, small = [*seeded_batches(IMAGE, (1, 2))], seeded_batches(Inputs((torch.zeros(1, 3, 8, 8),)), (1,))
    row, algebra = check_surgery(
        Reference(model, large, floor=Reference(model, small)),
        folded(model, torch.float32),
        stage="fold",
        redone=Redone(folded(model, torch.float64)),
        how=how,
    )
    assert (row.passed, algebra.passed) == (True, True)
    assert row.inputs == ("1x3x12x12", "2x3x12x12")
    assert algebra.inputs == (("1x3x8x8",) if smaller else ("2x3x12x12",))
    assert ("a second run gives the same bits" in row.detail) == twice


def test_outputs_are_matched_by_name_and_where_no_name_fits_by_order():
    a, b = torch.zeros(1), torch.ones(1)
    expected = {"first": a, "second": b}
    assert named_as(expected, {"second": b, "first": a}) == {"second": b, "first": a}
    assert named_as(expected, {"x": a, "y": b}) == expected
    assert named_as(expected, {"x": a}) == {"x": a}
    assert named_as(expected, {"x": a, "y": b, "z": a}) == {"x": a, "y": b, "z": a}


def test_nested_inputs_keep_their_shapes():
    example = Inputs(([torch.zeros(3, 8, 9), torch.zeros(3, 5, 5)],))
    first, second, third = seeded_batches(example)
    assert first.shapes() == second.shapes() == third.shapes() == example.shapes()
    assert not torch.equal(first.tensors()["input.0"], second.tensors()["input.0"])
    assert seeded_batches(example)[0].tensors()["input.1"].equal(first.tensors()["input.1"])


def test_an_unusable_file_is_an_export_error(tmp_path):
    with pytest.raises(ExportError):
        check_onnx(Reference(small_net(), seeded_batches(IMAGE)), tmp_path / "none.onnx")
