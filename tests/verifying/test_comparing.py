from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from torch import Tensor

from bntool.core.errors import CheckFailed, StateError
from bntool.core.tolerances import K_NOISE, Limit, Tolerance, rounding_term
from bntool.core.verdicts import Check
from bntool.results.checks import Comparison
from bntool.verifying.comparing import compare, noise_limits
from bntool.verifying.differences import Difference, difference

EPS = torch.finfo(torch.float32).eps
LAYERS = 20


def reference() -> list[dict[str, Tensor]]:
    torch.manual_seed(0)
    return [
        {
            "scores": torch.randn(batch, 6, dtype=torch.float64),
            "maps": torch.randn(batch, 3, 4, 4, dtype=torch.float64) + 1,
        }
        for batch in (1, 2, 3)
    ]


def rounded(outputs: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [{name: t.float() for name, t in row.items()} for row in outputs]


def verdict(candidate: list[dict[str, Tensor]]) -> Check:
    ref = reference()
    limits = noise_limits(ref, rounded(ref), LAYERS, EPS)
    return compare(ref, candidate, limits, stage="fold", device="cpu", provider="torch")


def changed(how) -> list[dict[str, Tensor]]:
    rows = rounded(reference())
    for row in rows:
        how(row)
    return rows


def set_nan(row: dict[str, Tensor]) -> None:
    row["maps"][0, 1, 2, 3] = float("nan")


def swap_channels(row: dict[str, Tensor]) -> None:
    row["maps"] = row["maps"][:, [1, 0, 2]]


def permute_outputs(row: dict[str, Tensor]) -> None:
    row["scores"], row["maps"] = row["maps"], row["scores"]


def forget_bias(row: dict[str, Tensor]) -> None:
    row["maps"] = row["maps"] - torch.tensor([0.0, 0.01, 0.0]).reshape(1, 3, 1, 1)


MUTATIONS = {
    "times 1.001": lambda row: row["maps"].mul_(1.001),
    "plus 1e-3": lambda row: row["scores"].add_(1e-3),
    "two channels swapped": swap_channels,
    "all zero": lambda row: row["maps"].zero_(),
    "one NaN": set_nan,
    "one infinity": lambda row: row["scores"][0].fill_(math.inf),
    "one output dropped": lambda row: row.pop("maps"),
    "one output more": lambda row: row.update(extra=torch.zeros(1)),
    "shape differs": lambda row: row.update(maps=row["maps"][..., :3]),
    "empty": lambda row: row.update(maps=row["maps"][:0]),
    "permuted outputs": permute_outputs,
    "permuted batch": lambda row: row.update(maps=row["maps"].flip(0)) if len(row["maps"]) > 1 else None,
    "bias forgotten": forget_bias,
    "transposed": lambda row: row.update(maps=row["maps"].mT),
    "complex": lambda row: row.update(maps=row["maps"].to(torch.complex64)),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_fails(name):
    check = verdict(changed(MUTATIONS[name]))
    assert not check.passed
    assert not Comparison((check,))


def test_the_same_outputs_pass_and_so_does_a_second_draw_of_the_rounding():
    assert verdict(rounded(reference())).passed
    noisy = changed(lambda row: row["maps"].mul_(1 + 2 * EPS))
    check = verdict(noisy)
    assert check.passed
    assert check.relative <= 3 * EPS  # one rounding to float32, and the two steps added
    assert check.top1 == 1.0
    assert check.cosine == pytest.approx(1.0, abs=1e-6)


def test_output_order_does_not_matter_but_names_do():
    reordered = [dict(reversed(row.items())) for row in rounded(reference())]
    assert verdict(reordered).passed


@pytest.mark.parametrize(
    ("ref", "cand"),
    [
        ([], []),
        ([{}], [{}]),
        ([{"y": torch.ones(2)}], []),
        ([{"y": torch.ones(0, 4)}], [{"y": torch.ones(0, 4)}]),
    ],
)
def test_comparing_nothing_is_an_error(ref, cand):
    limits = {"y": Limit(1e-7, 1e-6)}
    with pytest.raises(CheckFailed, match="nothing to compare"):
        compare(ref, cand, limits, stage="fold", device="cpu", provider="torch")


def test_nan_agrees_only_where_the_reference_has_it_and_is_said():
    ref = torch.tensor([1.0, math.nan, math.inf, -math.inf], dtype=torch.float64)
    agreed = difference(ref, ref.clone())
    assert agreed.relative == 0.0
    assert "3 value(s) not finite" in agreed.problem
    moved = difference(ref, torch.tensor([math.nan, 1.0, math.inf, -math.inf]))
    assert moved.relative == math.inf
    assert moved.index == (0,)
    assert difference(ref, torch.tensor([1.0, math.nan, -math.inf, -math.inf])).relative == math.inf


def test_the_worst_output_and_element_are_named():
    def break_one(row: dict[str, Tensor]) -> None:
        row["maps"][0, 2, 1, 3] += 5

    check = verdict(changed(break_one))
    assert check.worst == ("maps", (0, 2, 1, 3))
    assert check.max_abs == pytest.approx(5.0, abs=1e-5)


def test_integers_must_be_equal():
    ref, same = [{"label": torch.tensor([1, 2, 3])}], [{"label": torch.tensor([1, 2, 3])}]
    limits = noise_limits(ref, same, 1, EPS)
    keys = {"stage": "fold", "device": "cpu", "provider": "torch"}
    assert compare(ref, same, limits, **keys).passed
    assert not compare(ref, [{"label": torch.tensor([1, 2, 4])}], limits, **keys).passed


def test_an_output_that_the_models_own_rounding_decides_is_not_passed():
    ref = [{"y": torch.randn(4, 3, dtype=torch.float64), "n": torch.randn(5, dtype=torch.float64)}]
    own = [{"y": -ref[0]["y"].float(), "n": torch.randn(4)}]
    limits = noise_limits(ref, own, LAYERS, EPS)
    assert "changes this output's shape" in limits["n"].undecidable
    assert "moves this output" in limits["y"].undecidable
    assert limits["y"].limit < 0.01  # capped: a noise of 100 % must not wave everything through
    check = compare(ref, own, limits, stage="fold", device="cpu", provider="torch")
    assert not check.passed
    assert "nothing is proved" in check.detail


def test_tolerances_of_the_user_replace_the_noise_floor():
    ref, cand = [{"y": torch.tensor([1.0, 100.0])}], [{"y": torch.tensor([1.0, 100.5])}]
    limits = noise_limits(ref, ref, 1, EPS)
    keys = {"stage": "export", "device": "cpu", "provider": "torch"}
    assert not compare(ref, cand, limits, **keys).passed
    assert compare(ref, cand, limits, tolerance=Tolerance(rtol=0.01), **keys).passed
    assert compare(ref, cand, limits, tolerance=Tolerance(atol=0.5), **keys).passed
    assert not compare(ref, cand, limits, tolerance=Tolerance(atol=0.4), **keys).passed


def test_the_worst_cosine_and_top_class_of_all_outputs_are_told():
    ref = [{"a": torch.eye(4), "b": torch.eye(4)}, {"a": torch.eye(4), "b": torch.eye(4)}]
    off = [{k: t.clone() for k, t in run.items()} for run in ref]
    off[0]["b"][0] = torch.tensor([0.0, 1.0, 0.0, 0.0])  # one sample of four, of one output, in one batch
    row = compare(ref, off, dict.fromkeys("ab", Limit(1e-7, 1e-6)), **KEYS)
    assert row.top1 == 0.75
    assert row.cosine == 0.75
    assert compare(ref, ref, dict.fromkeys("ab", Limit(1e-7, 1e-6)), **KEYS).cosine == 1.0


def test_a_difference_by_hand():
    found = difference(torch.tensor([[3.0, -4.0], [0.0, 0.0]]), torch.tensor([[3.0, -3.0], [0.0, 2.0]]))
    assert (found.max_abs, found.relative, found.index) == (2.0, 0.5, (1, 1))
    assert found.rms == pytest.approx(math.sqrt(5 / 4), rel=1e-15)
    assert found.cosine == pytest.approx((9 + 12) / (5 * math.sqrt(9 + 9 + 4)), rel=1e-15)
    assert found.top1 == 0.5
    assert difference(torch.tensor([2.0]), torch.tensor([3.0])).relative == 0.5
    zeros = torch.zeros(3)
    assert (difference(zeros, zeros).relative, difference(zeros, zeros).cosine) == (0.0, 1.0)
    assert (difference(zeros, zeros + 1).relative, difference(zeros, zeros + 1).cosine) == (math.inf, 0.0)
    assert difference(zeros + 1, zeros).cosine == 0.0
    assert difference(torch.tensor([1j, 2.0]), torch.tensor([1j, 2.5])).relative == 0.25
    # of integers and booleans it is the share that differs
    assert difference(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 9])).relative == 0.25
    assert difference(torch.tensor([True, False]), torch.tensor([True, True])).relative == 0.5


def test_the_remarks_of_a_row_are_told_once_in_turn():
    ref = [{"y": torch.tensor([1.0, math.nan])}, {"y": torch.tensor([1.0, math.nan])}]
    row = compare(ref, ref, {"y": Limit(1e-7, 1e-6)}, detail="first", **KEYS)
    assert row.detail == "first; y: 1 value(s) not finite in both"
    assert row.batches == 2
    assert compare(ref, ref, {"y": Limit(1e-7, 1e-6)}, **KEYS).detail == "y: 1 value(s) not finite in both"
    finite = [{"y": torch.tensor([1.0, 2.0])}]
    assert compare(finite, finite, {"y": Limit(1e-7, 1e-6, "it is noise")}, **KEYS).detail == ""
    silent = [{"y": torch.ones(2)}]
    told = compare(silent, silent, {"y": Limit(1e-7, 1e-6)}, **KEYS).detail
    assert told == "y: one number everywhere, which proves nothing"
    broken = [{"y": torch.tensor([1.0, 2.0])}, {}]
    row = compare(ref, broken, {"y": Limit(1e-7, 1e-6, "it is noise")}, **KEYS)
    assert row.detail == (
        "y: 1 value(s) wrong, first 2.0 where the reference has nan; y: it is noise, so nothing is proved; "
        "y: the output is missing"
    )
    more = [{"y": ref[0]["y"], "z": torch.zeros(1)}, ref[1]]
    row = compare(ref, more, {"y": Limit(1e-7, 1e-6)}, **KEYS)
    assert (row.passed, "z: an output that the reference does not have" in row.detail) == (False, True)


def test_a_reference_that_is_nowhere_finite_compares_with_nothing():
    nowhere = [{"y": torch.full((3,), math.nan)}]
    with pytest.raises(StateError, match="NaN or infinite everywhere"):
        compare(nowhere, nowhere, {"y": Limit(1e-7, 1e-6)}, **KEYS)
    some = [{"y": torch.full((3,), math.nan), "z": torch.ones(1)}]
    assert compare(some, some, dict.fromkeys("yz", Limit(1e-7, 1e-6)), **KEYS).passed


def test_limits_tell_why_they_decide_nothing():
    """By output: a walk of own rounding, a shape that hangs on it, what own precision cannot hold."""
    ref = [{"far": torch.ones(2).double(), "shape": torch.ones(2), "held": torch.ones(2).double()}]
    own = [{"far": torch.ones(2) * 1.01, "shape": torch.ones(3), "held": torch.tensor([1.0, math.inf])}]
    limits = noise_limits(ref, own, 1, EPS)
    assert limits["far"].undecidable == "the model's own rounding moves this output by 0.01 of its peak"
    assert limits["shape"].undecidable == "the model's own rounding changes this output's shape"
    assert limits["held"].undecidable == "the model's own precision does not hold this output"
    assert limits["far"].noise_floor == math.sqrt(EPS)
    assert limits["far"].limit == K_NOISE * math.sqrt(EPS) + EPS
    assert limits["held"].noise_floor == EPS / 2
    second = noise_limits([*ref, {"late": torch.ones(1)}], [*own, {"late": torch.ones(1)}], 4, EPS)
    assert second["late"] == Limit(EPS / 2, K_NOISE * EPS / 2 + 2 * EPS)


def test_an_empty_output_differs_by_nothing_and_is_within_every_tolerance():
    assert difference(torch.zeros(0, 4), torch.ones(0, 4)) == Difference(0.0, 0.0, 0.0, 1.0)
    ref = [{"boxes": torch.zeros(0, 4), "scores": torch.tensor([1.0, 2.0, 3.0])}]
    limits = dict.fromkeys(ref[0], Limit(1e-7, 1e-6))
    assert compare(ref, ref, limits, tolerance=Tolerance(rtol=0.0), **KEYS).passed
    assert compare(ref, ref, limits, tolerance=Tolerance(atol=1e-9), **KEYS).passed
    assert compare(ref, ref, limits, **KEYS).passed


def test_a_missing_output_is_like_nothing():
    gone = difference(torch.ones(3), None)
    assert (gone.max_abs, gone.relative, gone.rms, gone.cosine) == (math.inf, math.inf, math.inf, 0.0)
    assert gone.top1 is None


def test_one_column_is_no_score_of_classes():
    assert difference(torch.ones(4, 1), torch.ones(4, 1)).top1 is None
    assert difference(torch.ones(4, 2), torch.ones(4, 2)).top1 == 1.0
    assert difference(torch.ones(4, 2, 2), torch.ones(4, 2, 2)).top1 is None
    assert difference(torch.ones(4, 2).long(), torch.ones(4, 2).long()).top1 is None


def test_of_outputs_that_may_not_differ_at_all_the_one_that_does_is_told():
    ref = [{"a": torch.arange(3), "b": torch.arange(3), "c": torch.arange(3)}]
    off = [{"a": torch.arange(3), "b": torch.tensor([0, 1, 7]), "c": torch.arange(3)}]
    row = compare(ref, off, dict.fromkeys("abc", Limit(0.0, 0.0)), **KEYS)
    assert row.worst == ("b", (2,))
    assert (row.relative, row.ratio, row.limit) == (1 / 3, 1 / 3, 0.0)
    ref = [{"a": torch.arange(3), "y": torch.tensor([1.0])}]
    off = [{"a": torch.arange(3), "y": torch.tensor([1.25])}]
    row = compare(ref, off, {"a": Limit(0.0, 0.0), "y": Limit(0.125, 0.5)}, **KEYS)
    assert (row.passed, row.worst[0], row.ratio) == (True, "y", 2.0)


def test_integers_among_the_outputs_stop_no_other_limit():
    """Eight times the noise, as docs/checking.md has it, and a rounding term."""
    ref = [{"n": torch.arange(3), "y": torch.ones(2).double(), "c": torch.ones(2, dtype=torch.complex128)}]
    own = [{"n": torch.arange(3), "y": torch.tensor([1.0, 1.0001]), "c": torch.tensor([1 + 0.0001j, 1])}]
    limits = noise_limits(ref, own, 4, EPS)
    assert list(limits) == ["n", "y", "c"]
    assert limits["n"] == Limit(0.0, 0.0)
    for name in "yc":
        assert limits[name].noise_floor == pytest.approx(1e-4, rel=1e-3)
        assert limits[name].limit == pytest.approx(8 * limits[name].noise_floor + 2 * EPS, rel=1e-9)
        assert not limits[name].undecidable


def test_integers_that_rounding_decides_are_held_to_half_of_them():
    """Eight times a noise of a quarter would let all of them differ."""
    ref = [{"label": torch.arange(8)}]
    own = [{"label": torch.tensor([0, 1, 2, 3, 4, 5, 0, 0])}]
    limit = noise_limits(ref, own, 1, EPS)["label"]
    assert (limit.noise_floor, limit.limit) == (0.25, 0.5)
    assert "25% of these integers" in limit.undecidable
    assert noise_limits(ref, ref, 1, EPS)["label"] == Limit(0.0, 0.0)
    one = [{"label": torch.tensor([*range(31), 0])}]
    assert noise_limits([{"label": torch.arange(32)}], one, 1, EPS)["label"].limit == K_NOISE / 32


KEYS = {"stage": "verify", "device": "cpu", "provider": "torch"}


def test_rtol_is_relative_to_the_peak_of_the_output():
    ref, off = [{"y": torch.tensor([0.0, 0.001, -100.0])}], [{"y": torch.tensor([0.0, 0.501, -100.0])}]
    limits = {"y": Limit(1e-7, 1e-6)}
    assert compare(ref, off, limits, tolerance=Tolerance(rtol=0.01), **KEYS).passed
    assert not compare(ref, off, limits, tolerance=Tolerance(rtol=0.004), **KEYS).passed
    assert compare(
        ref, off, limits, tolerance=Tolerance(atol=0.3, rtol=0.003), **KEYS
    ).passed  # they add up: 0.3 + 0.003 * 100
    assert not compare(ref, off, limits, tolerance=Tolerance(atol=0.1, rtol=0.003), **KEYS).passed
    assert not compare(ref, off, limits, tolerance=Tolerance(atol=0.0), **KEYS).passed


def test_the_peak_is_that_of_each_output_and_leaves_infinity_out():
    ref = [{"large": torch.tensor([1e6]), "small": torch.tensor([1.0, math.inf, math.nan])}]
    off = [{"large": torch.tensor([1e6]), "small": torch.tensor([1.5, math.inf, math.nan])}]
    limits = dict.fromkeys(ref[0], Limit(1e-7, 1e-6))
    assert not compare(ref, off, limits, tolerance=Tolerance(rtol=0.4), **KEYS).passed
    assert compare(ref, off, limits, tolerance=Tolerance(rtol=0.6), **KEYS).passed
    tiny = [{"large": torch.tensor([1e6]), "small": torch.tensor([0.01, math.inf, math.nan])}]
    moved = [{"large": torch.tensor([1e6]), "small": torch.tensor([0.015, math.inf, math.nan])}]
    assert not compare(tiny, moved, limits, tolerance=Tolerance(rtol=0.1), **KEYS).passed
    gone = [{"large": torch.tensor([1e6]), "small": torch.tensor([1.0, 5.0, math.nan])}]
    for tolerance in (1e9, math.inf):  # what is no number is within no tolerance
        assert not compare(
            ref, gone, limits, tolerance=Tolerance(atol=tolerance, rtol=tolerance), **KEYS
        ).passed
    assert not compare(ref, gone, dict.fromkeys(ref[0], Limit(1e-7, math.inf)), **KEYS).passed


def test_an_output_of_zeros_has_no_peak_and_is_held_to_atol():
    ref, off = [{"y": torch.zeros(3)}], [{"y": torch.tensor([0.0, 0.1, 0.0])}]
    limits = {"y": Limit(1e-7, 1e-6)}
    assert not compare(ref, off, limits, tolerance=Tolerance(rtol=10.0), **KEYS).passed
    assert compare(
        ref, off, limits, tolerance=Tolerance(atol=0.2), **KEYS
    ).agrees  # one number everywhere proves nothing
    row = compare(ref, off, limits, tolerance=Tolerance(atol=0.05), **KEYS)
    assert (row.passed, row.limit) == (False, 0.05)
    assert row.relative == row.max_abs == pytest.approx(0.1)


def test_integers_are_held_to_a_tolerance_by_value():
    ref, off = [{"label": torch.tensor([10, 20, 100])}], [{"label": torch.tensor([10, 20, 101])}]
    assert compare(ref, off, {"label": Limit(0.0, 0.0)}, tolerance=Tolerance(atol=1.0), **KEYS).passed
    assert not compare(ref, off, {"label": Limit(0.0, 0.0)}, tolerance=Tolerance(atol=0.5), **KEYS).passed
    assert compare(ref, off, {"label": Limit(0.0, 0.0)}, tolerance=Tolerance(rtol=0.01), **KEYS).passed


def test_the_limit_of_a_row_is_what_decided_and_its_figures_say_whence():
    ref, off = [{"y": torch.tensor([1.0, 100.0])}], [{"y": torch.tensor([1.0, 100.5])}]
    limits = {"y": Limit(1e-7, 1e-6)}
    row = compare(ref, off, limits, tolerance=Tolerance(rtol=0.004), **KEYS)
    assert (row.limit, row.relative, row.noise_floor) == (0.004, 0.005, 1e-7)
    assert row.figures == "relative error 0.005, allowed 0.004 by rtol 0.004"
    row = compare(ref, off, limits, tolerance=Tolerance(atol=0.4, rtol=0.0), **KEYS)
    assert row.figures == "relative error 0.005, allowed 0.004 by atol 0.4, rtol 0"
    assert row.to_dict()["tolerance"] == "atol 0.4, rtol 0"
    own = compare(ref, off, limits, **KEYS)
    assert own.figures == "relative error 0.005, allowed 1e-06"


def test_the_output_that_is_told_is_the_one_farthest_beyond_its_tolerance():
    """By its noise floor `noisy` is within, and `quiet` beyond; by atol it is the other way round."""
    ref = [{"noisy": torch.tensor([100.0]), "quiet": torch.tensor([1.0])}]
    off = [{"noisy": torch.tensor([101.0]), "quiet": torch.tensor([1.1])}]
    limits = {"noisy": Limit(0.1, 0.8), "quiet": Limit(1e-7, 1e-6)}
    assert compare(ref, off, limits, **KEYS).worst[0] == "quiet"
    assert compare(ref, off, limits, tolerance=Tolerance(atol=0.5), **KEYS).worst[0] == "noisy"


def test_the_limit_is_k_times_the_noise_plus_the_rounding_term():
    ref = reference()
    own = rounded(ref)
    limit = noise_limits(ref, own, LAYERS, EPS)["maps"]
    e0 = max(difference(r["maps"], o["maps"]).relative for r, o in zip(ref, own, strict=True))
    assert limit.noise_floor == max(e0, EPS / 2)
    assert limit.limit == K_NOISE * limit.noise_floor + EPS * math.sqrt(LAYERS)
    assert rounding_term(EPS, 0) == EPS


def test_json_has_no_number_that_json_does_not_know():
    check = verdict(changed(MUTATIONS["one NaN"]))
    data = json.loads(json.dumps(Comparison((check,)).to_dict(), allow_nan=False))
    row = data["checks"][0]
    assert {
        "stage",
        "device",
        "provider",
        "passed",
        "max_abs",
        "relative",
        "noise_floor",
        "ratio",
    } <= row.keys()
    assert row["max_abs"] is None
    assert row["passed"] is False


def test_a_remark_is_told_once_for_all_checks_it_is_about_and_wrapped():
    row = verdict(rounded(reference()))
    driver = "CPU used: " + "a library that is not there, " * 5
    checks = [
        dataclasses.replace(row, stage=stage, detail=detail)
        for stage, detail in (("fold", ""), ("export", driver), ("runtime", driver), ("verify", "alone"))
    ]
    told = str(Comparison(tuple(checks))).splitlines()[6:]
    assert " ".join(line.strip() for line in told[:-1]) == f"export, runtime: {driver.strip()}"
    assert all(len(line) <= 80 for line in told)
    assert all(line.startswith("  ") for line in told[1:-1])
    assert told[-1] == "verify: alone"


def test_a_comparison_prints_its_table_and_is_false_when_empty():
    text = str(Comparison((verdict(rounded(reference())),)))
    assert "passed" in text
    assert "torch" in text
    assert not Comparison(())
    assert "nothing" in str(Comparison(()))
