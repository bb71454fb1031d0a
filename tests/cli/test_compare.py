"""`bntool compare` as it is typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bntool.experiment import training
from bntool.report.chapters import chapters_of
from bntool.report.reading import as_document
from tests.experiment.nets import NET_CODE, write_npz

LINE = ("compare", "net.py:net", "--data", "data.npz", "--batch-size", "24", "--lr", "0.05")


@pytest.fixture
def ready(folder: Path) -> Path:
    (folder / "net.py").write_text(NET_CODE)
    write_npz(folder)
    return folder


def test_compare_then_fold(bntool, ready: Path) -> None:
    said = bntool(*LINE, "--epochs", "2")
    assert said.code == 0, said
    assert "with BatchNorm, rate 0.05, seed 0, epoch 2: loss" in said.out
    assert "after 2 epochs, 1 repeat" in said.out
    out = ready / "net_compare"
    assert sorted(path.name for path in out.iterdir()) == [
        "compare.json",
        *(f"{name}.{kind}" for name in ("curves", "distributions", "gradients") for kind in ("png", "svg")),
        *(f"net_{name}.pt{end}" for name in ("bn_trained", "trained") for end in ("", ".bntool.json")),
        "runs",
        "settings.json",
    ]
    folded = bntool("fold")
    assert folded.code == 0
    assert "using net_compare/net_bn_trained.pt, written by the last bntool compare here" in folded.out
    assert "2 of 2 BatchNorm layers folded" in folded.out

    before = (out / "compare.json").read_bytes()
    again = bntool(*LINE, "--epochs", "2", "--json")
    assert again.code == 0
    assert (out / "compare.json").read_bytes() == before
    assert again.document["arms"] == json.loads(before)["arms"]
    assert again.document["folder"] == "net_compare"
    (drawn,) = chapters_of([as_document(again.document, "x.json")])
    sites = again.document["sites"]  # a layer that moved up neither lost nor gained
    changed = {row["what"]: row["change"] for row in drawn.charts["layers"].spec["data"]["values"]}
    assert changed == {site["bn"]: 2 * site["channels"] for site in sites}


@pytest.fixture
def no_plots(monkeypatch) -> None:
    """Drawing takes most of the time of so small a comparison."""
    monkeypatch.setattr("bntool.experiment.plots.write_plots", lambda found, folder: [])


def test_a_run_that_was_interrupted_says_how_to_go_on(bntool, ready: Path, monkeypatch) -> None:
    real = training.write_checkpoint

    def once(*given):
        real(*given)
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "write_checkpoint", once)
    said = bntool(*LINE, "--epochs", "2")
    assert said.code == 130
    assert "the same command goes on from the last checkpoint in net_compare" in said.out
    monkeypatch.setattr(training, "write_checkpoint", real)
    monkeypatch.setattr("bntool.experiment.plots.write_plots", lambda found, folder: [])
    rest = bntool(*LINE, "--epochs", "2")
    assert rest.code == 0
    assert "as it is, rate 0.05, seed 0, epoch 1" not in rest.out
    assert "as it is, rate 0.05, seed 0, epoch 2" in rest.out


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("--epochs", "0"), 2, "epochs is 0"),
        (("--epochs", "1", "--lr", "a,b"), 2, "is not a list of numbers"),
        (("--epochs", "1", "--data", "nothing.npz"), 3, "no such data"),
        (("--epochs", "1", "--data", "mnist"), 3, "cannot read mnist"),
        (("--epochs", "1", "--mean", "0.5"), 2, "for a folder of images"),
        (("--epochs", "1", "--activation", "silu"), 4, "no place for a BatchNorm"),
        ((), 2, "Missing option '--epochs'"),
    ],
)
def test_bad_input(refused, ready: Path, words, code: int, says: str) -> None:
    refused(*LINE, *words, code=code, says=says)


def test_a_gpu_that_is_not_there(refused, ready: Path, monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    refused(*LINE, "--epochs", "1", "--device", "cuda", code=5, says="CUDA was asked for")


def test_without_matplotlib_it_is_said_before_the_training(refused, ready: Path, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    refused(*LINE, "--epochs", "1", code=3, says="pip install 'bntool[compare]'")


@pytest.mark.usefixtures("no_plots")
def test_other_settings_in_the_same_folder(bntool, refused, ready: Path) -> None:
    assert bntool(*LINE, "--epochs", "1", "-q").code == 0
    refused(*LINE, "--epochs", "2", code=2, says="another epochs: 1 there, 2 here")
    assert bntool(*LINE, "--epochs", "2", "-q", "--force").code == 0


def test_nothing_trained(bntool, ready: Path) -> None:
    said = bntool(*LINE, "--epochs", "1", "--lr", "1e30", "--json")
    assert said.code == 1
    assert "nothing trained: the loss was" in said.document["error"]["what"]
