from __future__ import annotations

import copy
import dataclasses
import io
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from bntool.core.activations import ACTIVATIONS
from bntool.core.errors import StateError, UsageError
from bntool.core.plan import Plan
from bntool.core.reasons import Reason
from bntool.core.sites import InsertSite
from bntool.graph.inputs import Inputs, outputs_of
from bntool.inserting import InsertOptions, plan_insert, sequential_names
from bntool.layers import NORMED, ConvBN2d
from bntool.observe.eager import observe
from bntool.subjects.insertion import insert_observed
from bntool.surgery.insert_modules import apply_insert
from tests.insert_zoo import WRITTEN_OUT, ZOO, FunctionalRelu, Net, ReluModule, TiedWeights, conv

_UNBROKEN = [name for name, net in ZOO.items() if net.sites and not net.ends]


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def _inputs(net: Net) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    return Inputs((torch.randn(net.shape, generator=generator).to(net.dtype),), origin="test")


def _built(name: str) -> tuple[Net, nn.Module, Inputs]:
    torch.manual_seed(0)
    net = ZOO[name]
    return net, net.build().eval(), _inputs(net)


def _plan(model: nn.Module, inputs: Inputs, **options: Any) -> Plan:
    return plan_insert(observe(model, inputs).graph, InsertOptions(**options))


def _run(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    with torch.no_grad():
        return outputs_of(model(*inputs.map(torch.clone).args))


def _require_same_outputs(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def _snapshot(model: nn.Module) -> tuple[dict[str, Tensor], list[tuple[str, type, bool, list[str]]]]:
    state = {k: v.clone() for k, v in model.state_dict().items()}
    tree = [(n, type(m), m.training, sorted(vars(m))) for n, m in model.named_modules(remove_duplicate=False)]
    return state, tree


def _forms(plan: Plan) -> dict[str, str]:
    return {site.conv: site.form for site in plan.insert_sites}


# -- the plan -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ZOO)
def test_the_plan_is_the_one_beside_the_net(name: str) -> None:
    net, model, inputs = _built(name)
    plan = _plan(model, inputs, **net.options)
    assert _forms(plan) == net.sites
    assert {skip.name: skip.reason for skip in plan.skips} == net.skips
    assert len(plan.sites) + len(plan.skips) == len(net.sites) + len(net.skips)
    assert all(skip.detail for skip in plan.skips)
    channels = {site.conv: site.channels for site in plan.insert_sites}
    layers = dict(model.named_modules())
    for layer, found in channels.items():
        stock = layers[layer]
        made = stock.out_features if isinstance(stock, nn.Linear) else stock.out_channels
        assert found == net.channels.get(layer, made)


def test_the_zoo_has_a_site_of_every_form_and_every_reason_of_insertion() -> None:
    forms = {form for net in ZOO.values() for form in (*net.sites.values(), *net.ends.values())}
    assert forms == {"identity", "sequential", "wrap", "subclass", ""}
    reasons = {reason for net in ZOO.values() for reason in net.skips.values()}
    insertion = list(Reason)[: list(Reason).index(Reason.BATCH_STATISTICS)]
    # the one that only shows once every form has been tried has a test of its own below
    assert reasons >= set(insertion) - {Reason.FORM_BROKE_MODEL}


@pytest.mark.parametrize("name", _UNBROKEN)
def test_planning_and_applying_leave_the_model_alone(name: str) -> None:
    net, model, inputs = _built(name)
    model.train()
    before_state, before_tree = _snapshot(model)
    tensors = {n: id(t) for n, t in model.state_dict(keep_vars=True).items()}
    apply_insert(model, _plan(model, inputs, **net.options))
    after_state, after_tree = _snapshot(model)
    assert before_tree == after_tree
    assert {n: id(t) for n, t in model.state_dict(keep_vars=True).items()} == tensors
    assert all(torch.equal(before_state[k], after_state[k]) for k in before_state | after_state)


# -- what is applied ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", _UNBROKEN)
def test_the_output_in_eval_mode_is_the_same_to_the_last_bit(name: str) -> None:
    net, model, inputs = _built(name)
    modified = apply_insert(model, _plan(model, inputs, **net.options))
    assert type(modified) is type(model)
    assert not any(m.training for m in modified.modules())
    _require_same_outputs(_run(model, inputs), _run(modified, inputs))


@pytest.mark.parametrize("name", _UNBROKEN)
def test_every_batchnorm_stands_alone_between_its_layer_and_the_activation(name: str) -> None:
    net, model, inputs = _built(name)
    plan = _plan(model, inputs, **net.options)
    graph = observe(apply_insert(model, plan), inputs).graph
    norms = {op.scope: op for op in graph.of_kind("batch_norm")}
    sites = {site.bn: site for site in plan.insert_sites}
    assert norms.keys() >= sites.keys()
    assert len(sites) == len(plan.sites)
    for bn, site in sites.items():
        op = norms[bn]
        source = graph.producer(graph.input(op))
        assert source is not None
        (reader,) = [graph.ops[r] for r, _ in graph.input(op).readers]
        followers = [graph.ops[r].kind for r, _ in graph.output(op).readers]
        assert reader is op
        if plan.options["position"] == "before":
            assert source.kind in ("conv", "linear")
            # an activation written out reads it several times, and nobody else reads it
            assert followers == WRITTEN_OUT.get(name, [site.activation_kind])
        else:
            assert source.kind == site.activation_kind or (name in WRITTEN_OUT and source.kind == "mul")


@pytest.mark.parametrize("name", _UNBROKEN)
def test_a_second_insertion_finds_nothing_left_to_do(name: str) -> None:
    net, model, inputs = _built(name)
    modified = apply_insert(model, _plan(model, inputs, **net.options))
    again = _plan(modified, inputs, **net.options)
    assert not again
    reasons = [skip.reason for skip in again.skips]
    assert reasons.count(Reason.ALREADY_NORMALISED) >= len(net.sites)


@pytest.mark.parametrize("name", _UNBROKEN)
def test_the_trained_part_of_the_copy_learns(name: str) -> None:
    net, model, inputs = _built(name)
    modified = apply_insert(model, _plan(model, inputs, **net.options)).train()
    norms = [m for m in modified.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    sum(t.float().sum() for t in outputs_of(modified(*inputs.args)).values() if t.requires_grad).backward()
    assert norms
    for norm in norms:
        assert norm.weight.grad is not None
        assert bool((norm.running_mean != 0).any())
        assert int(norm.num_batches_tracked) == 1


# -- keys -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", _UNBROKEN)
def test_an_old_checkpoint_loads(name: str) -> None:
    net, model, inputs = _built(name)
    plan = _plan(model, inputs, **net.options)
    modified = apply_insert(model, plan)
    old = {k: torch.zeros_like(v) for k, v in model.state_dict().items()}
    renamed = {plan.key_map.get(k, k): v for k, v in old.items()}
    assert set(plan.key_map) <= set(old), "a key map is about keys"
    assert len(renamed) == len(old)
    fresh = copy.deepcopy(modified) if net.pickles else modified
    result = fresh.load_state_dict(renamed, strict=False)
    assert result.unexpected_keys == []
    own = tuple(f"{site.bn}." for site in plan.insert_sites)
    norms = {id(m) for n, m in fresh.named_modules() if n in {s.bn for s in plan.insert_sites}}
    aliases = [f"{n}." for n, m in fresh.named_modules(remove_duplicate=False) if id(m) in norms]
    assert all(key.startswith((*own, *aliases)) for key in result.missing_keys)
    assert all(torch.equal(v, fresh.state_dict()[k]) for k, v in renamed.items())
    fresh.load_state_dict(renamed, strict=True)
    if plan.key_map == {}:
        fresh.load_state_dict(old, strict=True)
    if "sequential" not in net.sites.values() or net.options.get("keep_keys"):
        assert plan.key_map == {}
        assert set(old) <= set(fresh.state_dict())


def test_loading_an_old_checkpoint_keeps_the_callers_dict_and_a_new_one_is_checked() -> None:
    _, model, inputs = _built("FunctionalRelu")
    modified = apply_insert(model, _plan(model, inputs))
    old = model.state_dict()
    keys = list(old)
    modified.load_state_dict(old, strict=True)
    assert list(old) == keys
    modified.load_state_dict(old, strict=True, assign=True)
    partly = modified.state_dict()
    del partly["conv1.bn.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*conv1\.bn\.weight"):
        modified.load_state_dict(partly, strict=True)


def test_a_numbered_sequential_is_numbered_anew_and_the_key_map_says_how() -> None:
    _, model, inputs = _built("nested_sequential")
    plan = _plan(model, inputs)
    assert [site.bn for site in plan.insert_sites] == ["0.1", "0.3.1", "1.1"]
    assert plan.key_map == {
        "0.2.0.weight": "0.3.0.weight",
        "0.2.0.bias": "0.3.0.bias",
        "1.2.weight": "1.3.weight",
        "1.2.bias": "1.3.bias",
    }


def test_kept_keys_and_named_children_name_the_newcomer_after_its_layer() -> None:
    _, model, inputs = _built("sequential_with_kept_keys")
    plan = _plan(model, inputs, keep_keys=True)
    assert [site.bn for site in plan.insert_sites] == ["0_bn", "2_bn"]
    assert list(apply_insert(model, plan)._modules) == ["0", "0_bn", "1", "2", "2_bn", "3", "4"]
    _, model, inputs = _built("named_sequential")
    plan = _plan(model, inputs)
    assert [site.bn for site in plan.insert_sites] == ["stem_bn_"], "stem_bn was taken"
    assert list(apply_insert(model, plan)._modules) == ["stem", "stem_bn_", "act", "stem_bn", "head"]


def test_sequential_names_number_only_what_was_numbered() -> None:
    assert sequential_names(("0", "1", "2"), {"0", "1"}, keep_keys=False) == (
        {"0": "0", "1": "2", "2": "4"},
        {"0": "1", "1": "3"},
    )
    assert sequential_names(("0", "2"), {"0"}, keep_keys=False) == ({}, {"0": "0_bn"})


@pytest.mark.parametrize("name", ["vgg11", "vgg13"])
def test_a_vgg_becomes_torchvisions_own_with_batchnorm(name: str) -> None:
    with torch.device("meta"):
        model = getattr(torchvision.models, name)().eval()
        twin = getattr(torchvision.models, f"{name}_bn")().eval()
        image = torch.zeros(1, 3, 32, 32)
    plan = plan_insert(observe(model, Inputs((image,))).graph, InsertOptions())
    modified = apply_insert(model, plan)
    shapes = [(k, v.shape) for k, v in modified.state_dict().items()]
    assert shapes == [(k, v.shape) for k, v in twin.state_dict().items()]
    assert repr(modified) == repr(twin)
    assert {skip.name for skip in plan.skips} == set()


@pytest.mark.parametrize("name", [name for name in _UNBROKEN if ZOO[name].pickles])
def test_a_modified_model_can_be_copied_and_saved_whole(name: str) -> None:
    net, model, inputs = _built(name)
    modified = apply_insert(model, _plan(model, inputs, **net.options))
    expected = _run(modified, inputs)
    _require_same_outputs(expected, _run(copy.deepcopy(modified), inputs))
    buffer = io.BytesIO()
    torch.save(modified, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert repr(loaded) == repr(modified)
    _require_same_outputs(expected, _run(loaded, inputs))


@pytest.mark.parametrize("name", ["DictOutput", "nested_sequential", "IdentitySlot", "Fire"])
def test_a_plan_replays_from_json_on_a_fresh_model(name: str) -> None:
    net, model, inputs = _built(name)
    plan = _plan(model, inputs, **net.options)
    read = Plan.from_json(plan.to_json())
    assert read == plan
    torch.manual_seed(5)
    fresh = net.build().eval()
    _require_same_outputs(_run(fresh, inputs), _run(apply_insert(fresh, read), inputs))


# -- forms that break the model -------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, net in ZOO.items() if net.ends])
def test_a_form_that_breaks_the_model_gives_way_to_the_next(name: str) -> None:
    net, model, inputs = _built(name)
    plan, modified, check = insert_observed(model, observe(model, inputs), InsertOptions(**net.options))
    ends = {**net.sites, **net.ends}
    assert _forms(plan) == {layer: form for layer, form in ends.items() if form}
    given_up = {skip.name for skip in plan.skips if skip.reason is Reason.FORM_BROKE_MODEL}
    assert given_up == {layer for layer, form in ends.items() if not form}
    assert (check is not None and check.passed) or not plan
    _require_same_outputs(_run(model, inputs), _run(modified, inputs))


def test_a_model_without_numbers_has_none_to_keep() -> None:
    model = nn.Sequential(conv(), nn.ReLU(), conv(4, 2)).to("meta")
    with pytest.raises(StateError, match="meta device"):
        insert_observed(
            model, observe(model, Inputs((torch.empty(2, 3, 8, 8, device="meta"),))), InsertOptions()
        )


class TakesOneClassOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([conv(), conv(4, 4), conv(4, 4), conv(4, 4)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.convs:
            x = layer(x).relu()
        return x if type(self.convs[2]) is nn.Conv2d else x + 1


@pytest.mark.parametrize("portable", [False, True])
def test_one_layer_that_takes_no_form_costs_no_other_its_batchnorm(portable: bool) -> None:
    options = InsertOptions(portable=portable)
    plan, _, check = insert_observed(model := TakesOneClassOnly(), observe(model, Inputs((X,))), options)
    assert set(_forms(plan)) == {"convs.0", "convs.1", "convs.3"}
    assert [skip.name for skip in plan.skips if skip.reason is Reason.FORM_BROKE_MODEL] == ["convs.2"]
    assert check is not None
    assert check.passed


class ReadsALayersWeight(nn.Module):
    """By number, and in a way that no look at the source finds; renumbered, it is the weight of another."""

    def __init__(self) -> None:
        super().__init__()
        layers = [m for _ in range(4) for m in (conv(3, 3), nn.ReLU())]
        self.features = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        features = self.features
        return features(x) * features[6].weight.sum()


@pytest.mark.parametrize("options", [{}, {"init": "default"}, {"drop_bias": True}])
def test_a_form_is_judged_whatever_the_new_layers_start_as(options: dict[str, Any]) -> None:
    model = ReadsALayersWeight()
    plan, modified, _ = insert_observed(model, observe(model, Inputs((X,))), InsertOptions(**options))
    assert set(_forms(plan).values()) == {"wrap"}
    assert bool(plan.dropped) == ("drop_bias" in options)
    started = {float(m.running_var[0]) for m in modified.modules() if isinstance(m, nn.BatchNorm2d)}
    assert started == ({1.0} if "init" in options else {float(torch.tensor(1 - 1e-5))})


def test_banned_forms_are_not_tried_again() -> None:
    _, model, inputs = _built("plain_sequential")
    banned = {"0": frozenset({"sequential"}), "2": frozenset({"sequential", "wrap"})}
    assert _forms(_plan(model, inputs, banned=banned)) == {"0": "wrap", "2": "subclass"}
    banned["0"] |= {"wrap", "subclass"}
    plan = _plan(model, inputs, banned=banned)
    assert next((s.name, s.reason) for s in plan.skips) == ("0", Reason.FORM_BROKE_MODEL)


# -- options --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 1e-3, 0.1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_identity_init_is_exact_for_every_eps_and_type(eps: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = ReluModule().to(dtype).eval()
    with torch.no_grad():
        model.conv1.weight *= 50  # large and small values, both signs
    inputs = Inputs((torch.randn(2, 3, 8, 8).to(dtype),))
    modified = apply_insert(model, _plan(model, inputs, eps=eps))
    _require_same_outputs(_run(model, inputs), _run(modified, inputs))


def test_identity_init_holds_without_affine_parameters() -> None:
    _, model, inputs = _built("Fire")
    modified = apply_insert(model, _plan(model, inputs, affine=False, eps=1e-3, momentum=0.3))
    norms = [m for m in modified.modules() if isinstance(m, nn.BatchNorm2d)]
    assert [(n.affine, n.eps, n.momentum, n.weight) for n in norms] == [(False, 1e-3, 0.3, None)] * 3
    _require_same_outputs(_run(model, inputs), _run(modified, inputs))


def test_default_init_is_pytorchs_own() -> None:
    _, model, inputs = _built("ReluModule")
    modified = apply_insert(model, _plan(model, inputs, init="default"))
    expected = nn.BatchNorm2d(4).state_dict()
    found = {k.removeprefix("act.0."): v for k, v in modified.state_dict().items() if k.startswith("act.0.")}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], expected[k]) for k in expected)


def test_the_newcomer_takes_the_layers_type_device_and_mode() -> None:
    model = FunctionalRelu().to(torch.float64).train()
    model.conv1.eval()
    modified = apply_insert(model, _plan(model, Inputs((torch.randn(2, 3, 8, 8, dtype=torch.float64),))))
    norm = modified.conv1.bn
    assert norm.weight.dtype == norm.running_var.dtype == torch.float64
    assert not norm.training
    assert modified.training
    assert modified.head.training


def test_sync_makes_sync_batchnorms() -> None:
    _, model, inputs = _built("plain_sequential")
    modified = apply_insert(model, _plan(model, inputs, sync=True))
    assert isinstance(modified[1], nn.SyncBatchNorm)
    _require_same_outputs(_run(model, inputs), _run(modified, inputs))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"activations": ("rellu",)}, "did you mean relu"),
        ({"activations": ("zzz",)}, "there are celu, clamp"),
        ({"activations": "relu"}, "not one string"),
        ({"include": "conv1"}, "not one string"),
        ({"position": "middle"}, "'before' or 'after'"),
        ({"init": "zeros"}, "'identity' or 'calibrate' or 'default'"),
        ({"eps": 0.0}, "between 0 and 1"),
        ({"eps": float("nan")}, "between 0 and 1"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        InsertOptions(**options).validate()
    assert words in str(caught.value)


def _layers_of_activations() -> dict[str, nn.Module]:
    return {
        "relu": nn.ReLU(),
        "relu6": nn.ReLU6(),
        "silu": nn.SiLU(),
        "gelu": nn.GELU(),
        "hardswish": nn.Hardswish(),
        "hardsigmoid": nn.Hardsigmoid(),
        "sigmoid": nn.Sigmoid(),
        "tanh": nn.Tanh(),
        "leaky_relu": nn.LeakyReLU(0.1),
        "elu": nn.ELU(),
        "selu": nn.SELU(),
        "celu": nn.CELU(),
        "mish": nn.Mish(),
        "prelu": nn.PReLU(),
        "softplus": nn.Softplus(),
        "hardtanh": nn.Hardtanh(),
        "logsigmoid": nn.LogSigmoid(),
        "threshold": nn.Threshold(0.1, 0.0),
        "hardshrink": nn.Hardshrink(),
        "softshrink": nn.Softshrink(),
        "rrelu": nn.RReLU(),
        "glu": nn.GLU(1),
    }


def test_every_activation_that_can_be_asked_for_can_be_found() -> None:
    # clamp is a function, and has its nets in the zoo
    assert _layers_of_activations().keys() | {"clamp"} == ACTIVATIONS


@pytest.mark.parametrize("kind", _layers_of_activations())
def test_an_activation_module_is_found_by_its_name(kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(conv(), _layers_of_activations()[kind], nn.Flatten()).eval()
    inputs = Inputs((torch.randn(2, 3, 8, 8),))
    plan = _plan(model, inputs, activations=(kind,))
    assert [site.activation_kind for site in plan.insert_sites] == [kind]
    _require_same_outputs(_run(model, inputs), _run(apply_insert(model, plan), inputs))


# -- small things ---------------------------------------------------------------------------------------


def test_shared_weights_stay_shared() -> None:
    model = TiedWeights().eval()
    modified = apply_insert(model, _plan(model, Inputs((torch.randn(2, 3, 8, 8),))))
    assert modified.conv1.weight is modified.conv2.weight
    assert modified.conv1.bn is not modified.conv2.bn


def test_the_layer_that_holds_its_norm_is_still_that_layer() -> None:
    model = FunctionalRelu().eval()
    model.conv1.note = "mine"
    modified = apply_insert(model, _plan(model, Inputs((torch.randn(2, 3, 8, 8),))))
    layer = modified.conv1
    assert type(layer) is ConvBN2d
    assert isinstance(layer, nn.Conv2d)
    assert (layer.out_channels, layer.note) == (4, "mine")
    assert layer.weight is model.conv1.weight
    assert repr(layer).startswith("ConvBN2d(\n  3, 4, kernel_size=(3, 3)")


def test_every_stock_layer_has_its_class_with_a_norm() -> None:
    for stock, normed in NORMED.items():
        assert issubclass(normed, stock)
        assert normed.__doc__
        assert normed.__mro__.index(stock) > 1, "its own forward comes first"


def test_a_plan_says_where_the_newcomer_stands() -> None:
    _, model, inputs = _built("Fire")
    plan = _plan(model, inputs)
    assert plan.sites[0] == InsertSite(
        conv="squeeze",
        activation="squeeze_act",
        bn="squeeze_act.0",
        channels=4,
        form="wrap",
        dims=2,
        activation_kind="relu",
        slot="squeeze_act",
    )
    assert plan.model_class == "tests.insert_zoo.Fire"
    assert plan.signature == {n: tuple(t.shape) for n, t in model.state_dict().items()}
    assert dataclasses.replace(plan, sites=()) != plan


@pytest.mark.parametrize("options", [{"eps": 0.0}, {"eps": 2.0}, {"momentum": 7.0}, {"momentum": -0.1}])
def test_a_number_out_of_range_is_refused(options):
    with pytest.raises(UsageError, match=r"eps must lie between 0 and 1|momentum is .* must be from 0 to 1"):
        InsertOptions(**options).validate()


class IndexedInTraining(nn.Module):
    """Takes a child of its Sequential by number where the example input, in eval mode, does not lead."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.features[2](self.features[0](x)) if self.training else self.features(x)


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.features(x)
        return out


class IndexedFromOutside(nn.Module):
    """The same by a class that does not own the Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Holder()

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.body.features[2](self.body.features[0](x))
        out: Tensor = self.body(x)
        return out


@pytest.mark.parametrize("build", [IndexedInTraining, IndexedFromOutside])
def test_a_sequential_that_code_indexes_keeps_its_numbers(build: type[nn.Module]) -> None:
    model = build()
    plan, inserted, check = insert_observed(
        model, observe(model, Inputs.of(torch.randn(1, 3, 8, 8))), InsertOptions()
    )
    assert {site.form for site in plan.insert_sites} == {"wrap"}
    assert check is not None
    assert check.passed
    image = torch.randn(2, 3, 8, 8)
    assert torch.equal(model.train()(image), inserted.train()(image))
