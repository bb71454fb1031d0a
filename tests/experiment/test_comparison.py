from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bntool
from bntool.core.errors import CheckFailed, NothingToDo, UsageError
from bntool.experiment import plots
from bntool.experiment.comparison import compare_training, draw_weights
from bntool.experiment.folder import FILES, RUNS, write_document
from bntool.experiment.plots import write_plots
from bntool.experiment.settings import Settings
from tests.experiment.nets import classifier, thirds

SETTINGS = Settings(epochs=6, batch_size=24, lrs=(0.05, 1e38), repeats=2, watch_every=2)


def test_both_arms_by_rate_and_repeat(tmp_path: Path) -> None:
    model = classifier()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = compare_training(model, thirds(), SETTINGS, tmp_path / "c")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [(run.arm, run.lr, run.seed) for run in found.runs[:3]] == [
        ("plain", 0.05, 0),
        ("batchnorm", 0.05, 0),
        ("plain", 1e38, 0),
    ]
    assert len(found.runs) == 8
    figure = found.figure("batchnorm", 0.05, "test_accuracy")
    values = found.values("batchnorm", 0.05, "test_accuracy")
    assert figure is not None and figure.spread is not None
    assert figure.mean == pytest.approx(sum(values) / 2, rel=1e-15)
    assert figure.spread == pytest.approx(abs(values[0] - values[1]) / 2**0.5, abs=1e-12)
    assert found.best_rate("batchnorm") == 0.05
    assert found.largest_rate("batchnorm") == 0.05
    assert all(run.diverged for run in found.of("plain", 1e38))
    assert not any(run.trains for run in found.of("plain", 1e38))
    text = str(found)
    assert "as it is, rate 1e+38, seed 1: the loss was" in text
    assert "largest rate that trains, with BatchNorm: 0.05" in text
    # Two sites of 4 and 6 channels: γ and β of each.
    assert "(+20 trainable" in text

    written = write_document(tmp_path / "c", found).read_text()
    document = json.loads(written, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert document["schema_version"] == 1
    assert document["parameters"]["delta"]["trainable"] == 20
    assert document["arms"]["batchnorm"]["largest_rate_that_trains"] == 0.05
    assert len(document["watched"]["batchnorm"]) == 12

    files = write_plots(found, tmp_path / "c")
    assert [path.name for path in files] == [
        f"{name}.{kind}"
        for name in ("curves", "distributions", "gradients", "rates")
        for kind in ("png", "svg")
    ]
    assert {path.name for path in (tmp_path / "c").iterdir()} == {*FILES, RUNS}
    first = {path: path.read_bytes() for path in files}
    assert all(
        path.read_bytes() == content for path, content in first.items() if write_plots(found, path.parent)
    )
    assert b">with BatchNorm<" in first[tmp_path / "c" / "distributions.svg"]


def test_both_arms_begin_alike_and_see_the_same_batches(tmp_path: Path) -> None:
    # A rate this small changes nothing: with γ = 1, β = 0 the first losses are those of the start.
    settings = Settings(epochs=1, batch_size=24, lrs=(1e-30,), from_scratch=True, init="identity", seed=5)
    found = compare_training(classifier(), thirds(), settings, tmp_path / "c")
    plain, normed = (found.models[arm].state_dict() for arm in ("plain", "batchnorm"))
    fresh = classifier()
    torch.manual_seed(5)
    draw_weights(fresh)
    assert torch.equal(plain["0.weight"], fresh[0].weight)
    assert torch.equal(plain["7.weight"], fresh[7].weight)
    assert torch.equal(plain["0.weight"], normed["0.weight"])
    assert torch.equal(plain["7.weight"], normed["9.weight"])
    other = compare_training(classifier(), thirds(), dataclasses.replace(settings, seed=6), tmp_path / "c")
    assert not torch.equal(other.models["plain"].state_dict()["0.weight"], fresh[0].weight)


def test_without_from_scratch_both_begin_with_the_models_own_weights(tmp_path: Path) -> None:
    model = classifier()
    found = compare_training(model, thirds(), Settings(epochs=1, lrs=(1e-30,)), tmp_path / "c")
    for trained in found.models.values():
        assert torch.equal(trained.state_dict()["0.weight"], model[0].weight)


def test_the_trained_model_folds_and_keeps_its_accuracy(tmp_path: Path) -> None:
    data = thirds()
    found = compare_training(
        classifier(), data, Settings(epochs=3, batch_size=24, lrs=(0.05,)), tmp_path / "c"
    )
    trained = found.models["batchnorm"]
    folded = bntool.fold(trained, data.test.inputs[:2])
    assert len(folded.sites) == 2
    with torch.no_grad():
        hits = [
            int((model(data.test.inputs).argmax(1) == data.test.labels).sum())
            for model in (trained, folded.model)
        ]
    assert hits[0] == hits[1] == round(48 * found.runs[1].history[-1]["test_accuracy"])
    assert hits[0] > 24


@pytest.mark.parametrize(
    "changed", [{"position": "after"}, {"affine": False}, {"init": "default"}, {"optimizer": "adam"}]
)
def test_the_ways_to_insert(tmp_path: Path, changed: dict[str, Any]) -> None:
    settings = dataclasses.replace(Settings(epochs=1, batch_size=24), **changed)
    found = compare_training(classifier(), thirds(), settings, tmp_path / "c")
    assert found.finished == ["plain", "batchnorm"]
    if settings.position == "after":
        assert len(write_plots(found, tmp_path / "c")) == 6
    assert found.surgery.parameters["delta"]["trainable"] == (0 if "affine" in changed else 20)


def test_more_repeats_and_rates_go_on_and_other_settings_do_not(tmp_path: Path) -> None:
    few = Settings(epochs=1, batch_size=24)
    first = compare_training(classifier(), thirds(), few, tmp_path / "c")
    steps: list[Any] = []
    more = dataclasses.replace(few, repeats=2)
    second = compare_training(
        classifier(), thirds(), more, tmp_path / "c", tell=lambda arm, lr, repeat, *_: steps.append(repeat)
    )
    assert set(steps) == {1}
    assert second.runs[:2] == first.runs
    other = dataclasses.replace(few, momentum=0.5)
    with pytest.raises(UsageError, match=r"another momentum: 0\.9 there, 0\.5 here") as caught:
        compare_training(classifier(), thirds(), other, tmp_path / "c")
    assert "--force" in caught.value.next_step
    with pytest.raises(UsageError, match="another model"):
        compare_training(classifier(seed=1), thirds(), few, tmp_path / "c")
    with pytest.raises(UsageError, match="another data"):
        compare_training(classifier(), thirds(95), few, tmp_path / "c")
    compare_training(classifier(), thirds(), other, tmp_path / "c", force=True)
    assert len(list((tmp_path / "c" / "runs").glob("*.pt"))) == 2


def test_a_folder_that_is_no_comparison_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="is no comparison"):
        compare_training(classifier(), thirds(), Settings(epochs=1), tmp_path, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_where_nothing_trains_it_is_an_error_that_says_where(tmp_path: Path) -> None:
    settings = Settings(epochs=1, batch_size=24, lrs=(1e30,))
    with pytest.raises(CheckFailed, match=r"nothing trained: the loss was .* at step \d+ \(epoch 1\)"):
        compare_training(classifier(), thirds(), settings, tmp_path / "c")


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = classifier()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(x) * self.scale
        return out


@pytest.mark.parametrize(
    ("model", "changed", "error", "says"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(81, 3)), {}, NothingToDo, "no place for a BatchNorm"),
        (nn.Sequential(*classifier()[:-1], nn.Linear(6, 2)), {}, UsageError, "labels go up to 2"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), {}, UsageError, "fails on samples of shape 1x9x9"),
        (classifier()[:4], {}, UsageError, r"puts out \[2, 6, 5, 5\] for 2 samples"),
        (classifier().requires_grad_(False), {}, UsageError, "no parameter of the model is trainable"),
        (Own(), {"from_scratch": True}, UsageError, "a Own holds parameters"),
    ],
)
def test_models_that_cannot_be_compared(
    tmp_path: Path, model: nn.Module, changed: dict[str, Any], error: Any, says: str
) -> None:
    with pytest.raises(error, match=says):
        compare_training(model, thirds(), Settings(epochs=1, **changed), tmp_path / "c")


def test_a_softmax_at_the_end_is_remarked(tmp_path: Path) -> None:
    model = nn.Sequential(*classifier(), nn.Softmax(1))
    found = compare_training(model, thirds(), Settings(epochs=1), tmp_path / "c")
    assert "leave its softmax out" in found.notes[0]


def test_a_single_point_is_seen_and_a_panel_without_data_says_so(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    once = dataclasses.replace(SETTINGS, epochs=1, lrs=(0.05,), repeats=1, watch_every=1000)
    found = compare_training(classifier(), thirds(), once, tmp_path / "c")
    (first,), (second,) = (found.watched(arm).progress.records for arm in ("plain", "batchnorm"))
    for layer in second["values"].values():
        layer["quantiles"] = [None] * 5  # as where the numbers ran away
    figure = plots.distributions(found)
    assert figure is not None
    plain, batchnorm = figure.axes[0], figure.axes[len(second["values"])]
    assert plain.lines[0].get_marker() == "."
    assert not plain.texts
    assert [text.get_text() for text in batchnorm.texts] == ["nothing seen"]
    layer = next(iter(first["gradients"]))
    first["gradients"][layer] = second["gradients"][layer] = 0.0
    assert write_plots(found, tmp_path / "c")
    for record in (first, second):
        record["gradients"] = dict.fromkeys(record["gradients"], 0.0)
    gradients = plots.gradients(found)
    assert gradients is not None
    assert {text.get_text() for axis in gradients.axes for text in axis.texts} == {"no gradient seen"}
    assert write_plots(found, tmp_path / "c")
