"""Shared layers: refused by default; with `unshare` each call site that needs it gets a clone, and pays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

import bntool
from bntool.core.plan import Plan
from bntool.core.reasons import Reason
from bntool.folding.norms import find_norms, why_unfit
from bntool.folding.traversal import Take, Way
from bntool.folding.weight_edits import Claims
from bntool.graph.inputs import Inputs
from bntool.laws import Refused
from bntool.observe.eager import observe
from bntool.pipeline.onnx_folding import fold_exported, fold_onnx, plan_fold_onnx
from bntool.surgery.fold_onnx import apply_fold_onnx
from bntool.surgery.fold_program import apply_fold_program
from tests.fold_zoo import FOLDED, ZOO, bn, conv, enliven
from tests.fold_zoo import Net as FoldNet
from tests.folding.test_folding import assert_same, run, verdicts_of
from tests.onnx_zoo import OnnxNet
from tests.program_zoo import PROGRAM_ZOO, ProgramNet, decomposed, plan_fold_program

IMAGE = (2, 4, 8, 8)
WEIGHT = 6 * 4 * 3 * 3


def build(run: Callable[..., Any], parts: Mapping[str, Any], tie: Callable[[Any], Any] | None = None) -> Any:
    torch.manual_seed(0)
    model = FoldNet(run, parts)
    if tie is not None:
        tie(model)
    return enliven(model.double().eval())


def image(seed: int = 1, shape: tuple[int, ...] = IMAGE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one_weight(m: Any) -> None:
    m.d.weight = m.c.weight


def one_bias(m: Any) -> None:
    m.d.bias = m.c.bias


def two(norm: Callable[[int], nn.Module] = bn, **options: Any) -> dict[str, Any]:
    return {"c": conv(**options), "d": conv(**options), "a": norm(6), "b": norm(6)}


def both(m: Any, x: Tensor) -> Tensor:
    return m.a(m.c(x)) + m.b(m.d(x + 1))


def fold(model: nn.Module, x: Tensor | None = None) -> Any:
    """Folded with clones and proved; then the promises that every fold keeps are checked here too."""
    x = image() if x is None else x
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = bntool.fold(model, x, unshare=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert_same(run(model, (x,)), run(result.model, (x,)))
    replayed = bntool.apply(model, Plan.from_json(result.plan.to_json()), x).model
    ours, theirs = result.model.state_dict(), replayed.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert added(result, model) == result.plan.unshared.parameters
    return result


def added(result: Any, model: nn.Module) -> int:
    """What the recount finds besides biases that folds made and the affine of BatchNorms that went."""
    state, known, made = result.model.state_dict(), set(model.state_dict()), 0
    for edit in (edit for site in result.plan.fold_sites for edit in site.edits):
        if edit.bias not in known and edit.kind != "unshare":
            made += state[edit.bias].numel() if edit.bias else 0
        known.add(edit.bias)
    norms = {model.get_submodule(site.bn) for site in result.plan.fold_sites}
    affine = sum(p.numel() for norm in norms for p in norm.parameters())
    grown = result.parameters["delta"]
    return int(grown["trainable"] + grown["frozen"] + affine - made)


def folds_all(result: Any, *layers: str) -> bool:
    return not result.skips and result.plan.unshared.layers == layers


# -- two modules, one parameter --------------------------------------------------------------------------


def test_a_weight_tied_across_two_layers_is_cloned_once() -> None:
    model = build(both, two(), one_weight)
    assert {s.reason for s in bntool.plan_fold(model, image()).skips} == {Reason.WEIGHT_SHARED}
    result = fold(model)
    assert folds_all(result, "c")
    assert result.plan.unshared.to_dict() == {"layers": ["c"], "parameters": WEIGHT, "bytes": 8 * WEIGHT}
    assert f"unshared 1 layer: +{WEIGHT} parameters, +1.7 KiB" in str(result)
    assert result.to_dict()["unshared"]["parameters"] == WEIGHT
    assert result.model.c.weight is not result.model.d.weight
    assert model.c.weight is model.d.weight
    gone = {name for name in model.state_dict() if name.startswith(("a.", "b."))}
    assert result.model.state_dict().keys() == model.state_dict().keys() - gone


def test_the_layer_that_is_not_folded_into_keeps_the_old_weight() -> None:
    for taker in ("c", "d"):
        model = build(
            lambda m, x, t=taker: m.a(getattr(m, t)(x)) + getattr(m, "d" if t == "c" else "c")(x + 1),
            two(),
            one_weight,
        )
        result = fold(model)
        assert result.plan.unshared.layers == (taker,)
        other = result.model.get_submodule("d" if taker == "c" else "c")
        assert torch.equal(other.weight, model.c.weight)


def test_a_shared_bias_is_cloned_and_the_weights_are_not() -> None:
    result = fold(build(both, two(), one_bias))
    assert folds_all(result, "c")
    assert result.plan.unshared.parameters == 6


def test_a_tie_with_another_bias_or_none_is_parted() -> None:
    same_norm = lambda m, x: m.a(m.c(x)) + m.a(m.d(x + 1))  # noqa: E731
    for options in ({}, {"bias": False}):
        parts = two(**options)
        del parts["b"]
        result = fold(build(same_norm, parts, one_weight))
        assert folds_all(result, *result.plan.unshared.layers)
        assert result.plan.unshared.parameters == WEIGHT


def test_a_tie_to_a_layer_that_did_not_run_is_parted() -> None:
    model = build(lambda m, x: m.a(m.c(x)), two(), one_weight)
    result = fold(model)
    assert result.plan.unshared.layers == ("c",)
    assert torch.equal(result.model.d.weight, model.d.weight)


def test_three_ties_cost_two_clones() -> None:
    def tie(m: Any) -> None:
        m.d.weight = m.e.weight = m.c.weight

    parts = {**two(), "e": conv(), "f": bn()}
    result = fold(build(lambda m, x: both(m, x) + m.f(m.e(x + 2)), parts, tie))
    assert folds_all(result, "c", "d")
    assert result.plan.unshared.parameters == 2 * WEIGHT


def test_what_agrees_is_folded_without_a_clone() -> None:
    entry = next(entry for entry in ZOO if entry.name == "block_twice")
    result = fold(entry.build())
    assert folds_all(result)
    plain = bntool.fold(entry.build(), image())
    assert "unshared" not in str(plain)
    assert plain.plan.sites == result.plan.sites


@pytest.mark.parametrize(
    ("kind", "ties"),
    [
        (lambda: nn.Conv2d(4, 6, 3, groups=2), one_weight),
        (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), one_weight),
        (lambda: nn.ConvTranspose2d(4, 6, 3), one_weight),
        (lambda: nn.Conv2d(4, 6, 3, bias=False), one_weight),
    ],
    ids=["grouped", "grouped transposed", "transposed", "no bias"],
)
def test_every_layout(kind: Callable[[], nn.Module], ties: Callable[[Any], None]) -> None:
    assert folds_all(fold(build(both, {"c": kind(), "d": kind(), "a": bn(), "b": bn()}, ties)), "c")


@pytest.mark.parametrize("norm", [nn.SyncBatchNorm, nn.BatchNorm2d], ids=["sync", "plain"])
def test_downstream_into_one_of_two_ties(norm: Callable[[int], nn.Module]) -> None:
    """The maps meet the weight on its input axis; with a shift the biases of both must differ too."""
    parts = {"c": conv(), "d": conv(), "a": norm(4), "b": norm(4)}
    result = fold(build(lambda m, x: m.c(m.a(x.relu())) + m.d(m.b(x.sigmoid())), parts, one_weight))
    assert folds_all(result, "c")


def test_linear_layers() -> None:
    parts = {"c": nn.Linear(5, 6), "d": nn.Linear(5, 6), "a": nn.BatchNorm1d(6), "b": nn.BatchNorm1d(6)}
    assert folds_all(fold(build(both, parts, one_weight), image(shape=(3, 5))), "c")


def test_an_edit_that_both_asked_for_is_in_both_copies() -> None:
    """The first BatchNorm goes into the shared weight, the second parts it: nothing of the first is lost."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.b(m.c(m.a(x.relu()))) + m.d(m.a(x.sigmoid()))

    for order in ("ab", "ba"):
        parts = {"c": conv(bias=False), "d": conv(bias=False), "a": nn.BatchNorm2d(4), "b": bn()}
        parts = {name: parts[name] for name in ("c", "d", *order)}
        model = build(forward, parts, one_weight)
        with torch.no_grad():
            model.a.bias.copy_(model.a.running_mean / (model.a.running_var + 1e-5).sqrt() * model.a.weight)
        assert not fold(model).skips


# -- one module under two names ---------------------------------------------------------------------------


def one_module(**options: Any) -> dict[str, Any]:
    parts = two(**options)
    return {**parts, "d": parts["c"]}


@pytest.mark.parametrize("options", [{}, {"bias": False}], ids=["bias", "no bias"])
def test_a_module_under_two_names_becomes_two(options: dict[str, Any]) -> None:
    model = build(both, one_module(**options))
    assert {s.reason for s in bntool.plan_fold(model, image()).skips} == {Reason.CALLED_MORE_THAN_ONCE}
    result = fold(model)
    assert folds_all(result, "c")
    assert result.model.c is not result.model.d
    assert model.c is model.d
    again = bntool.fold(result.model, image(), unshare=True)
    assert not again.modified
    assert again.plan.unshared.layers == ()


def test_one_name_with_a_norm_and_one_without() -> None:
    for taker, other in (("c", "d"), ("d", "c")):
        parts = one_module()
        del parts["b"]
        model = build(lambda m, x, t=taker, o=other: m.a(getattr(m, t)(x)) + getattr(m, o)(x + 1), parts)
        assert folds_all(fold(model), taker)


def test_two_names_that_agree_stay_one_module() -> None:
    model = build(
        lambda m, x: m.a(m.c(x)) + m.a(m.d(x + 1)),
        {k: v for k, v in one_module(bias=False).items() if k != "b"},
    )
    result = fold(model)
    assert folds_all(result)
    assert result.model.c is result.model.d


def test_a_block_under_two_names_parts_only_the_layer_that_needs_it() -> None:
    block = nn.Sequential(conv(4, 4, padding=1), bn(4), nn.ReLU(), conv())
    parts = {"one": block, "other": block, "a": bn(), "b": bn()}
    result = fold(build(lambda m, x: m.a(m.one(x)) + m.b(m.other(x + 1)), parts))
    assert folds_all(result, "one.3")
    assert result.model.one is not result.model.other
    assert result.model.one[0] is result.model.other[0]


def test_a_module_in_a_list_thrice() -> None:
    """Heads on several levels share their convolutions and keep a BatchNorm each."""
    shared = conv(4, 4, padding=1)
    heads = nn.ModuleList(nn.Sequential(shared, bn(4), nn.ReLU()) for _ in range(3))
    result = fold(
        build(lambda m, x: sum(head(x * (i + 1)) for i, head in enumerate(m.heads)), {"heads": heads})
    )
    assert folds_all(result, "heads.0.0", "heads.1.0")


def test_names_within_names() -> None:
    shared = conv(4, 4, padding=1)
    block = nn.ModuleDict({"p": shared, "q": shared})
    norms = nn.ModuleList(bn(4) for _ in range(4))

    def forward(m: Any, x: Tensor) -> Tensor:
        calls = (m.one["p"], m.one["q"], m.two["p"], m.two["q"])
        return sum(norm(call(x + i)) for i, (norm, call) in enumerate(zip(m.norms, calls, strict=True)))

    result = fold(build(forward, {"one": block, "two": block, "norms": norms}))
    assert not result.skips
    assert result.plan.unshared.parameters == 3 * (4 * 4 * 9 + 4)


def test_a_bias_made_for_both_names_is_there_after_they_part() -> None:
    """The first BatchNorm gives the one module a bias; then the module becomes two."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.b(m.c(m.a(x.relu()))) + m.d(m.a(x.sigmoid()))

    parts = {**one_module(bias=False), "a": nn.BatchNorm2d(4)}
    result = fold(build(forward, parts))
    assert not result.skips
    assert result.plan.unshared.parameters == WEIGHT + 6


# -- what a module tree cannot express --------------------------------------------------------------------


def twice(m: Any, x: Tensor) -> Tensor:
    return m.bn(m.conv(x)) + m.conv(x + 1)


def pair(**options: Any) -> dict[str, Any]:
    return {"conv": conv(**options), "bn": bn()}


def run_ort(path: Path) -> Any:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: image().float().numpy()})[0]


def test_one_attribute_called_twice_is_left_to_the_graph(tmp_path: Path) -> None:
    model = build(twice, pair())
    result = bntool.fold(model, image(), unshare=True)
    (skip,) = result.skips
    assert skip.reason is Reason.CALLED_MORE_THAN_ONCE
    assert "--unshare --export onnx" in skip.detail
    exported = bntool.api.exported(model.float(), image().float(), tmp_path / "m.onnx")
    before = run_ort(exported.path)
    assert fold_exported(exported).nodes["BatchNormalization"] == 1
    made = fold_exported(exported, unshare=True)
    assert "BatchNormalization" not in made.nodes
    assert made.unshared.parameters == WEIGHT + 6
    after = onnx.load(made.path)
    assert "conv.weight_unshared" in {t.name for t in after.graph.initializer}
    # two sums of 36 products in another order
    assert abs(run_ort(made.path) - before).max() <= 72 * np.finfo(np.float32).eps * abs(before).max()


def test_a_weight_read_through_another_layer_is_left_to_the_graph() -> None:
    model = build(lambda m, x: m.bn(m.conv(x)) + F.conv2d(x + 1, m.conv.weight), pair())
    (skip,) = bntool.fold(model, image(), unshare=True).skips
    assert skip.reason is Reason.WEIGHT_SHARED
    assert "--unshare --export onnx" in skip.detail


def test_gamma_is_not_cloned() -> None:
    entry = next(entry for entry in ZOO if entry.name == "gamma_tied_to_another_bn")
    plan = bntool.plan_fold(entry.build(), entry.inputs(), unshare=True)
    assert verdicts_of(plan) == dict(entry.verdicts)


# -- one edit is one reading --------------------------------------------------------------------------------


def test_two_layouts_of_one_weight_never_share_an_edit() -> None:
    """A convolution and a transposed one: the output axis of one is the input axis of the other."""
    parts = {"c": nn.Conv2d(4, 4, 3, padding=1), "d": nn.ConvTranspose2d(4, 4, 3, padding=1), "bn": bn(4)}

    def tie(m: Any) -> None:
        m.d.weight, m.d.bias = m.c.weight, m.c.bias

    model = build(lambda m, x: m.bn(m.c(x)) + m.bn(m.d(x)), parts, tie)
    (skip,) = bntool.plan_fold(model, image()).skips
    assert skip.reason is Reason.WEIGHT_SHARED
    assert folds_all(fold(model), "d")


def test_two_groupings_of_one_weight_never_share_an_edit() -> None:
    parts = {"c": nn.Conv2d(2, 6, 1), "d": nn.Conv2d(4, 6, 1, groups=2), "bn": bn()}

    def tie(m: Any) -> None:
        m.d.weight, m.d.bias = m.c.weight, m.c.bias

    model = build(lambda m, x: m.bn(m.c(x[:, :2])) + m.bn(m.d(x)), parts, tie)
    graph = observe(model, Inputs((image(),))).graph
    (norm,) = find_norms(graph)
    (skip,) = bntool.plan_fold(model, image()).skips
    assert skip.reason is Reason.WEIGHT_SHARED
    # the claims themselves refuse it, whatever front end the graph came from
    assert why_unfit(norm, graph, {op.id: norm for op in norm.ops}, ("*",), ()) is None
    vector = norm.affine
    assert vector is not None
    takes = [Take(op, "output", vector) for op in graph.of_kind("conv")]
    with pytest.raises(Refused, match="shares"):
        Claims(graph, {}).edits(norm, Way(takes, []))
    assert folds_all(fold(model), "d")


# -- ONNX ---------------------------------------------------------------------------------------------------


ONE_IMAGE = {"x": IMAGE}


def onnx_net(body: str, tensors: Mapping[str, Any], inputs: Mapping[str, Any] = ONE_IMAGE) -> onnx.ModelProto:
    return OnnxNet("n", {}, body, tensors, inputs, ("y",), 17, 8, {}, True).model(np.float64)


def run_onnx(model: onnx.ModelProto, feeds: Mapping[str, Any]) -> Any:
    return ReferenceEvaluator(model).run(["y"], dict(feeds))[0]


def fold_in_memory(
    model: onnx.ModelProto, inputs: Mapping[str, Any] = ONE_IMAGE
) -> tuple[Plan, onnx.ModelProto]:
    """Folded with clones; the same to 1e-10 in float64, checked, and with nothing left for a second fold."""
    opened = ir.from_proto(model)
    plan, observed = plan_fold_onnx(opened, unshare=True)
    apply_fold_onnx(observed, plan)
    after = ir.to_proto(opened)
    onnx.checker.check_model(after, full_check=True)
    feeds = {name: image(shape=shape).numpy() for name, shape in inputs.items()}
    expected, found = run_onnx(model, feeds), run_onnx(after, feeds)
    assert abs(found - expected).max() <= 1e-10 * abs(expected).max()
    assert not plan_fold_onnx(ir.from_proto(after), unshare=True)[0].sites
    return plan, after


W = (6, 4, 3, 3)


def test_onnx_calls_of_one_layer_get_their_own() -> None:
    model = onnx_net(
        "a = Conv(x, w, o)\nn = BN(a)\ns = Sigmoid(x)\nb = Conv(s, w, o)\nm = BN(b)\nr = Conv(s, w, o)\n"
        "p = Add(n, m)\ny = Add(p, r)",
        {"w": W, "o": (6,), "n": 6, "m": 6},
    )
    assert set(verdicts_of(plan_fold_onnx(ir.from_proto(model))[0]).values()) == {
        Reason.CALLED_MORE_THAN_ONCE
    }
    plan, after = fold_in_memory(model)
    assert set(verdicts_of(plan).values()) == {FOLDED}
    assert plan.unshared.layers == ("a", "b")
    assert plan.unshared.parameters == 2 * (WEIGHT + 6)
    names = {t.name for t in after.graph.initializer}
    assert names == {"w", "o", "w_unshared", "w_unshared_2", "o_unshared", "o_unshared_2"}


SETTINGS = {
    "groups": (
        "a = Conv(z, w, o)\nn = BN(a)\nb = Conv<group=2>(x, w, v)\nm = BN(b)\ny = Add(n, m)",
        {"w": (6, 2, 1, 1), "o": (6,), "v": (6,), "n": 6, "m": 6},
        {"x": IMAGE, "z": (2, 2, 8, 8)},
    ),
    "kind of node": (
        "a = Conv(x, w)\nn = BN(a)\nb = ConvTranspose(x, w)\ny = BN(b)\nz = Sigmoid(n)",
        {"w": (4, 4, 3, 3), "n": 4, "y": 4},
        {"x": IMAGE},
    ),
    "factors of a Gemm": (
        "a = Gemm<alpha=2.0>(x, w)\nn = BN(a)\nb = Gemm<alpha=3.0>(x, w)\nm = BN(b)\ny = Add(n, m)",
        {"w": (5, 6), "n": 6, "m": 6},
        {"x": (3, 5)},
    ),
    "with and without a bias": (
        "a = Gemm(x, w, o)\nn = BN(a)\nb = MatMul(x, w)\nm = BN(b)\ny = Add(n, m)",
        {"w": (5, 6), "o": (6,), "n": 6, "m": 6},
        {"x": (3, 5)},
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_onnx_layers_that_read_one_weight_each_in_its_own_way(name: str) -> None:
    """Alike BatchNorms tempt to one edit for both layers; there is none, with clones or without."""
    body, tensors, inputs = SETTINGS[name]
    model = onnx_net(body, tensors, inputs)
    assert set(verdicts_of(plan_fold_onnx(ir.from_proto(model))[0]).values()) == {Reason.WEIGHT_SHARED}
    plan, _ = fold_in_memory(model, inputs)
    assert set(verdicts_of(plan).values()) == {FOLDED}
    assert plan.unshared.parameters == int(np.prod(tensors["w"]))


@pytest.mark.parametrize("nodes", [("Gemm<alpha=2.0>", "Gemm<alpha=3.0>"), ("Gemm", "MatMul")])
def test_onnx_one_demand_on_two_layers_of_one_weight_is_two_edits(nodes: tuple[str, str]) -> None:
    """What stands before both asks the same of both; still each must write its own numbers."""
    first, second = nodes
    body = f"s = Sigmoid(x)\nn = BN(s)\na = {first}(n, w)\nb = {second}(n, w)\ny = Add(a, b)"
    inputs = {"x": (3, 5)}
    model = onnx_net(body, {"w": (5, 6), "n": 5}, inputs)
    assert not plan_fold_onnx(ir.from_proto(model))[0].sites
    plan, _ = fold_in_memory(model, inputs)
    assert verdicts_of(plan) == {"n": FOLDED}
    assert plan.unshared.parameters == 30


def test_onnx_a_weight_that_something_else_reads_stays_as_it_is() -> None:
    model = onnx_net(
        "a = Conv(x, w)\nn = BN(a)\nv = Sigmoid(w)\nb = Conv(x, v)\nt = Sigmoid(b)\ny = Add(n, t)",
        {"w": W, "n": 6},
    )
    assert [skip.reason for skip in plan_fold_onnx(ir.from_proto(model))[0].skips] == [Reason.WEIGHT_SHARED]
    plan, after = fold_in_memory(model)
    assert plan.unshared.layers == ("a",)
    before = {t.name: t for t in model.graph.initializer}
    assert next(t for t in after.graph.initializer if t.name == "w").raw_data == before["w"].raw_data


def test_onnx_a_weight_that_a_caller_may_give_is_no_constant() -> None:
    model = onnx_net("a = Conv(x, w)\nn = BN(a)\nb = Conv(x, w)\ny = Add(n, b)", {"w": W, "n": 6})
    model.graph.input.append(onnx.helper.make_tensor_value_info("w", onnx.TensorProto.DOUBLE, W))
    plan, _ = plan_fold_onnx(ir.from_proto(model), unshare=True)
    assert [skip.reason for skip in plan.skips] == [Reason.WEIGHT_COMPUTED]


def test_onnx_file_from_end_to_end(tmp_path: Path) -> None:
    body = "a = Conv(x, w)\nn = BN(a)\ns = Sigmoid(x)\nb = Conv(s, w)\nm = BN(b)\ny = Add(n, m)"
    onnx.save(onnx_net(body, {"w": W, "n": 6, "m": 6}), tmp_path / "m.onnx")
    assert not fold_onnx(tmp_path / "m.onnx", None, unshare=False).modified
    result = fold_onnx(tmp_path / "m.onnx", tmp_path / "out.onnx")
    assert result.to_dict()["unshared"] == {"layers": ["a"], "parameters": WEIGHT, "bytes": 8 * WEIGHT}
    # one weight and two biases come, two BatchNorms go
    assert result.parameters["delta"]["frozen"] == WEIGHT + 2 * 6 - 2 * 4 * 6


# -- exported programs --------------------------------------------------------------------------------------

PROGRAMS = {
    "tied": next(net for net in PROGRAM_ZOO if net.name == "weight_tied"),
    "twice": next(net for net in PROGRAM_ZOO if net.name == "conv_called_twice"),
    "returned": next(net for net in PROGRAM_ZOO if net.name == "weight_returned"),
    "linear twice": ProgramNet(
        "linear_twice",
        {},
        lambda m, x: m.a(m.c(x.flatten(1))) + m.b(m.c(x.flatten(1) + 1)),
        lambda: {"c": nn.Linear(256, 6, bias=False), "a": nn.BatchNorm1d(6), "b": nn.BatchNorm1d(6)},
    ),
    "an agreed bias first": ProgramNet(
        "agreed",
        {},
        lambda m, x: m.b(m.c(m.a(x.relu()))) + m.c(m.a(x.sigmoid())),
        lambda: {"c": conv(bias=False), "a": bn(4), "b": bn()},
    ),
}


@pytest.mark.parametrize("lowered", [False, True], ids=["as exported", "decomposed"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_programs(name: str, lowered: bool) -> None:
    net = PROGRAMS[name]
    program = decomposed(net.program()) if lowered else net.program()
    result = bntool.fold(program, unshare=True)
    assert result.modified
    assert not result.plan.skips
    assert all(check.passed for check in result.checks)
    assert len(result.plan.unshared.layers) == 1
    size = {"linear twice": 256 * 6, "an agreed bias first": WEIGHT + 6}.get(name)
    assert result.plan.unshared.parameters in ({size} if size else {WEIGHT, WEIGHT + 6})
    assert not bntool.fold(result.program, unshare=True).modified
    replayed = Plan.from_json(result.plan.to_json())
    again = apply_fold_program(plan_fold_program(program)[1], replayed).state_dict
    assert all(torch.equal(again[key], tensor) for key, tensor in result.program.state_dict.items())


def test_a_program_of_tied_layers_keeps_its_names() -> None:
    state = bntool.fold(PROGRAMS["tied"].program(), unshare=True).program.state_dict
    assert {"c.weight", "d.weight"} <= set(state)
    assert not any("unshared" in name for name in state)
    twice = bntool.fold(PROGRAMS["twice"].program(), unshare=True).program.state_dict
    assert {name for name in twice if "unshared" in name} == {"conv.weight_unshared", "conv.bias_unshared"}


# -- range ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("taker", ["a", "b"])
def test_a_clone_begins_where_the_folds_before_have_left_the_tensor(taker: str) -> None:
    """Downstream the first BatchNorm makes the shared float16 weight large; the clone would overflow."""

    def forward(m: Any, x: Tensor) -> Tensor:
        first, second = m.c(m.n(x.relu())), m.d(m.n(x.sigmoid()))
        return m.a(first) + second if taker == "a" else first + m.a(second)

    parts = {"c": conv(1, 1, 1), "n": bn(1), "a": bn(1)}
    model = build(forward, {**parts, "d": parts["c"]})
    with torch.no_grad():
        model.c.weight.fill_(2.0)
        for norm in (model.n, model.a):
            norm.weight.copy_(250.0 * (norm.running_var + norm.eps).sqrt())
            norm.running_mean.zero_()
            norm.bias.zero_()
    plan = bntool.plan_fold(model.half(), image(shape=(1, 1, 4, 4)).half(), unshare=True)
    # 2 · 250 · 250 = 125,000 is beyond 65,504, and 2 · 250 is not
    assert verdicts_of(plan) == {"n": FOLDED, "a": Reason.OVERFLOW}
    assert plan.unshared.layers == ()
