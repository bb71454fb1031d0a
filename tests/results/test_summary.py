from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable

import pytest
import torch
import torchinfo
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import bntool
from bntool.graph.inputs import Inputs
from bntool.results.counting import Counts, owned_by_module, parameter_delta
from bntool.results.summary import Summary, summarize
from samples.seed_network import seed_network

Golden = Callable[[str, str], None]


def image(*shape: int) -> Inputs:
    return Inputs((torch.zeros(shape),))


def with_batchnorm() -> nn.Sequential:
    """The small convolutional pair of the tests: a bias before each BatchNorm, one layer frozen."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
    )
    model[3].requires_grad_(False)
    return model


def without_batchnorm() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.ReLU())


def note_layers(summary: Summary, text: str) -> list[str]:
    return [layer for note in summary.notes if text in note.text for layer in note.layers]


def assert_columns_add_up(summary: Summary) -> None:
    document = summary.to_dict()
    for column in ("trainable", "frozen", "buffers"):
        assert sum(layer[column] for layer in document["layers"]) == document["totals"][column]
    totals = document["totals"]
    assert totals["parameters"] == totals["trainable"] + totals["frozen"]


# What it prints


def test_the_sample_network_prints_as_agreed(golden: Golden) -> None:
    summary = summarize(seed_network(), image(1, 1, 28, 28))
    assert_columns_add_up(summary)
    assert summary.totals.trainable == 48_884
    golden("summary_seed.txt", summary.render(80))


def test_frozen_layers_notes_and_the_change_since_a_baseline_print_as_agreed(golden: Golden) -> None:
    summary = bntool.summary(with_batchnorm(), image(1, 3, 8, 8), baseline=without_batchnorm())
    assert_columns_add_up(summary)
    golden("summary_batchnorm.txt", summary.render(80))


def test_no_line_is_wider_than_asked_where_only_names_are_long() -> None:
    inner = nn.Sequential()
    inner.add_module("a_name_that_is_very_much_longer_than_any_sensible_column", nn.BatchNorm2d(3))
    model = nn.Sequential()
    model.add_module("and_it_stands_in_a_module_with_a_long_name_as_well", inner)
    lines = summarize(model, image(1, 3, 8, 8)).render(80).split("note:")[0].splitlines()
    assert max(map(len, lines)) <= 80
    assert any("BatchNorm2d-1" in line and ".." in line for line in lines)


def test_printing_is_plain_80_columns_when_not_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    summary = summarize(seed_network(), image(1, 1, 28, 28))
    assert str(summary) == summary.render(80)
    assert str(summary).isascii()
    assert "\x1b" not in str(summary)


def test_the_document_is_json_with_the_agreed_keys() -> None:
    document = json.loads(json.dumps(summarize(with_batchnorm(), image(2, 3, 8, 8)).to_dict()))
    counts = {"parameters", "trainable", "frozen", "buffers", "constants", "bytes", "mult_adds"}
    held = {"input_bytes", "activations_bytes", "parameters_bytes", "buffers_bytes", "whole_bytes"}
    assert set(document["totals"]) == counts | held
    assert "delta" not in document
    assert document["layers"][1] == {
        "name": "1",
        "type": "BatchNorm2d",
        "input_shape": [2, 8, 6, 6],
        "output_shape": [2, 8, 6, 6],
        "trainable": 16,
        "kernel": None,
        "frozen": 0,
        "buffers": 17,
        "bytes": 4 * 32 + 8,
        "mult_adds": 2 * 16,
        "output_bytes": 4 * 2 * 8 * 6 * 6,
    }


# What it counts


def test_bytes_are_those_of_each_type() -> None:
    model = nn.BatchNorm1d(4)  # 8 parameters, 8 statistics, one int64 counter
    assert parameter_delta(model, model)["before"] == {
        "trainable": 8,
        "frozen": 0,
        "buffers": 9,
        "bytes": 16 * 4 + 8,
    }
    assert parameter_delta(model.half(), model.half())["before"]["bytes"] == 16 * 2 + 8


def test_tied_parameters_count_once_at_the_first_place() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False))
    model[1].weight = model[0].weight
    summary = summarize(model)
    assert [layer.counts.trainable for layer in summary.layers] == [40, 0]
    assert note_layers(summary, "tied") == ["1.weight is 0.weight"]


def test_parameters_over_one_memory_count_once() -> None:
    model = nn.Sequential(nn.Linear(4, 10, bias=False), nn.Linear(10, 4, bias=False))
    model[1].weight = nn.Parameter(model[0].weight.detach().t())
    assert parameter_delta(model, model)["before"]["trainable"] == 40


def test_neighbours_in_one_memory_count_each() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    flat = torch.zeros(32)
    model[0].weight = nn.Parameter(flat[:16].view(4, 4))
    model[1].weight = nn.Parameter(flat[16:].view(4, 4))
    assert parameter_delta(model, model)["before"]["trainable"] == 32


def test_meta_tensors_are_told_apart() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4))
    assert parameter_delta(model, model)["before"]["trainable"] == 16 + 8
    assert not note_layers(summarize(model), "statistics")


def test_a_shared_module_has_one_row() -> None:
    conv = nn.Conv2d(4, 4, 1)
    summary = summarize(nn.Sequential(conv, nn.ReLU(), conv), image(1, 4, 2, 2))
    assert [layer.name for layer in summary.layers] == ["0", "1"]
    assert summary.totals.trainable == 20
    assert note_layers(summary, "shared") == ["2 is 0"]
    assert note_layers(summary, "more than once") == ["0 (2x)"]


class Scaled(nn.Module):
    """Has children and a parameter of its own; takes its input by keyword; gives a mapping."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 2)
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, *, features: Tensor) -> dict[str, Tensor]:
        out = self.inner(input=features)
        return {"scaled": out * self.scale, "plain": out}


def test_a_module_with_children_and_own_tensors_has_its_row() -> None:
    summary = summarize(Scaled(), Inputs(kwargs={"features": torch.zeros(5, 3)}))
    assert [(layer.name, layer.type, layer.counts.trainable) for layer in summary.layers] == [
        ("", "Scaled", 2),
        ("inner", "Linear", 8),
    ]
    assert_columns_add_up(summary)


def test_inputs_by_keyword_and_further_outputs_are_seen() -> None:
    outer, inner = summarize(Scaled(), Inputs(kwargs={"features": torch.zeros(5, 3)})).layers
    assert (inner.input_shape, inner.output_shape) == ((5, 3), (5, 2))
    assert (outer.input_shape, outer.output_shape, outer.more_outputs) == ((5, 3), (5, 2), 1)


def test_parametrized_layers_count_what_they_store() -> None:
    model = weight_norm(nn.Linear(3, 2))  # a magnitude per row, the direction, the bias
    assert summarize(model, image(1, 3)).totals.trainable == 2 + 6 + 2


def test_figures_and_shapes_agree_with_torchinfo() -> None:
    model = seed_network()
    theirs = torchinfo.summary(model, (1, 1, 28, 28), verbose=0, mode="eval")
    ours = summarize(model, image(1, 1, 28, 28))
    assert ours.totals.parameters == theirs.total_params
    rows = [
        (tuple(row.input_size), tuple(row.output_size), row.num_params)
        for row in theirs.summary_list
        if row.is_leaf_layer
    ]
    assert [(x.input_shape, x.output_shape, x.counts.parameters) for x in ours.layers] == rows


# What it leaves alone


class Counting(nn.Module):
    """Writes into a buffer and draws random numbers in its forward pass, whatever the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x += torch.rand_like(x)
        return x


def test_modes_buffers_inputs_and_the_random_state_stay() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(), Counting())
    model.eval()
    model[1].train()
    modes = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    inputs = image(2, 3, 8, 8)
    random_state = torch.get_rng_state()

    summary = summarize(model, inputs)

    assert summary.layers[-1].output_shape == (2, 8, 6, 6)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(inputs.args[0], torch.zeros(2, 3, 8, 8))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(module._forward_hooks for module in model.modules())


def test_lazy_layers_stay_lazy_and_are_named() -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d())
    summary = summarize(model, image(1, 3, 8, 8))
    assert summary.layers[0].output_shape == (1, 4, 6, 6)
    assert note_layers(summary, "not initialised") == ["0", "1"]
    assert model[0].has_uninitialized_params()
    assert model[1].has_uninitialized_params()


# Where the forward pass cannot help


def test_works_without_inputs() -> None:
    summary = summarize(with_batchnorm())
    assert all(layer.input_shape is None and layer.output_shape is None for layer in summary.layers)
    assert_columns_add_up(summary)
    assert "Conv2d-1" in str(summary)


def test_a_failed_forward_is_a_note_and_keeps_the_shapes_up_to_there() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(7, 2, 1))
    summary = summarize(model, image(1, 3, 8, 8))
    assert summary.layers[0].output_shape == (1, 8, 6, 6)
    assert summary.layers[1].output_shape is None
    assert "the forward pass failed" in summary.notes[0].text
    assert_columns_add_up(summary)


def test_a_layer_that_is_not_called_is_named() -> None:
    model = Scaled()
    model.spare = nn.Linear(3, 3)
    summary = summarize(model, Inputs(kwargs={"features": torch.zeros(1, 3)}))
    assert note_layers(summary, "not called") == ["spare"]


# What it says about BatchNorm


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.5])
def test_bad_statistics_are_named(value: float) -> None:
    model = with_batchnorm()
    model[4].running_var[2] = value
    assert note_layers(summarize(model), "not finite or negative") == ["4"]


def test_statistics_that_saw_no_batch_are_named() -> None:
    model = with_batchnorm()
    model[0:2](torch.randn(2, 3, 8, 8))
    assert note_layers(summarize(model), "no batch") == ["4"]


def test_a_bias_before_a_batchnorm_is_named_only_where_it_has_no_effect() -> None:
    given = image(1, 3, 8, 8)
    assert note_layers(bntool.summary(with_batchnorm(), given), "bias without effect") == ["0", "3"]
    apart = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.BatchNorm2d(3))
    unbiased = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3))
    assert not note_layers(bntool.summary(apart, given), "bias without effect")
    assert not note_layers(bntool.summary(unbiased, given), "bias without effect")


# The change since a baseline


def changes(summary: Summary) -> list[tuple[str, str, int, int]]:
    assert summary.delta is not None
    return [
        (x.kind, x.name, x.counts.trainable + x.counts.frozen, x.counts.buffers)
        for x in summary.delta.changes
    ]


def test_inserted_layers_are_added_and_moved_ones_are_not_changed() -> None:
    after = with_batchnorm().requires_grad_(True)
    summary = summarize(after, baseline=summarize(without_batchnorm()))
    assert changes(summary) == [("added", "1", 16, 17), ("added", "4", 8, 9)]
    recount = parameter_delta(without_batchnorm(), after)["delta"]
    assert summary.to_dict()["delta"]["totals"] == {
        "parameters": recount["trainable"] + recount["frozen"],
        **{key: recount[key] for key in ("trainable", "frozen", "buffers", "bytes")},
    }


def test_a_folded_layer_is_removed_and_its_new_bias_is_a_change() -> None:
    before = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    after = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Identity(), nn.ReLU())
    summary = summarize(after, baseline=before)
    assert changes(summary) == [("changed", "0", 8, 0), ("removed", "1", -16, -17)]
    assert parameter_delta(before, after)["delta"]["conv_bias"] == 8


def test_freezing_is_a_change() -> None:
    after = without_batchnorm()
    after[0].requires_grad_(False)
    delta = summarize(after, baseline=without_batchnorm()).delta
    assert delta is not None
    assert [(x.kind, x.name) for x in delta.changes] == [("changed", "0")]
    assert (delta.totals.trainable, delta.totals.frozen) == (-224, 224)


def test_nothing_changed_is_said_in_words() -> None:
    summary = summarize(without_batchnorm(), baseline=without_batchnorm())
    assert "no layer with parameters or buffers changed" in str(summary)
    assert summary.to_dict()["delta"]["layers"] == []


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is")
def test_torchscript_is_counted_by_its_own_class_and_its_shapes_are_said_to_be_missing() -> None:
    scripted = torch.jit.script(nn.Linear(3, 2))
    summary = summarize(nn.Sequential(scripted, nn.ReLU()), image(1, 3))
    assert [(x.type, x.counts.trainable) for x in summary.layers] == [("Linear", 8), ("ReLU", 0)]
    assert summary.layers[1].output_shape == (1, 2)
    assert note_layers(summary, "TorchScript, shapes not seen") == ["0"]


@pytest.mark.filterwarnings("ignore:.torch.jit")
@pytest.mark.parametrize("made", ["script", "trace", "inside"])
def test_the_figures_of_torchscript_are_those_of_its_module(made: str) -> None:
    shape, twice = (2, 3, 8, 8), nn.Conv2d(4, 4, 1)
    model = nn.Sequential(with_batchnorm(), twice, nn.ReLU(), twice, nn.Flatten(), nn.Linear(144, 5)).eval()
    scripts = {
        "script": lambda: torch.jit.script(model),
        "trace": lambda: torch.jit.trace(model, torch.zeros(shape)),
        "inside": lambda: nn.Sequential(torch.jit.script(model[0]), *model[1:]),
    }
    eager, script = bntool.summary(model, shape), bntool.summary(scripts[made](), shape)
    held = [[dataclasses.replace(x, number=0) for x in one.layers if x.counts] for one in (script, eager)]
    assert held[0] == held[1]
    assert (script.mult_adds, script.memory) == (eager.mult_adds, eager.memory)
    assert note_layers(script, "runs more than once") == ["1 (2x)"]
    assert len([note for note in script.notes if "TorchScript" in note.text]) == 1


@pytest.mark.parametrize("name", ["resnet18", "googlenet"])
def test_the_total_is_what_the_modules_add_up_to(name: str) -> None:
    torchvision = pytest.importorskip("torchvision")
    options = {"init_weights": False} if name == "googlenet" else {}
    model = torchvision.models.get_model(name, **options)
    model.fc.weight.requires_grad_(False)
    assert Counts(**parameter_delta(model, model)["before"]) == sum(
        (o.counts for o in owned_by_module(model).values()), Counts()
    )
