from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from bntool.cli import run

SAMPLE = Path(__file__).resolve().parents[2] / "samples" / "model.pt"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    np.save("digits.npy", np.random.default_rng(0).random((20, 1, 28, 28)))
    return tmp_path


def untracked():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU(), nn.Flatten()
    ).eval()


def said(capsys, words):
    assert run(words) == 0, capsys.readouterr()
    return capsys.readouterr().out


def test_insert_calibrate_fold(folder, capsys):
    shutil.copyfile(SAMPLE, "model.pt")
    assert run(["insert", "model.pt"]) == 0
    before = Path("model_bn.pt").read_bytes()
    capsys.readouterr()
    out = said(capsys, ["calibrate", "--data", "digits.npy", "--batch-size", "8"])
    assert out.splitlines()[0] == "using model_bn.pt, written by the last bntool insert here"
    assert "BatchNorm layers calibrated on 3 batches" in out
    assert "wrote       model_bn_calibrated.pt" in out
    assert Path("model_bn.pt").read_bytes() == before
    document = json.loads(Path("model_bn_calibrated.pt.bntool.json").read_text())
    assert document["command"] == "calibrate"
    assert not document["plan"]
    assert run(["fold"]) == 0
    assert Path("model_bn_calibrated_folded.pt").exists()


def test_json_is_one_document_and_the_same_each_time(folder, capsys):
    torch.save(untracked(), "net.pt")
    words = [
        "calibrate",
        "net.pt",
        "--input",
        "1x1x28x28",
        "--data",
        "digits.npy",
        "--json",
        "--batches",
        "2",
    ]
    document = json.loads(said(capsys, [*words, "--batch-size", "6"]))
    assert document["status"] == "ok"
    assert document["output"] == "net_calibrated.pt"
    assert document["layers"] == [{"name": "1", "channels": 4, "samples": 12 * 26 * 26, "dead": []}]
    assert document["parameters"]["delta"]["buffers"] == 9
    first = Path("net_calibrated.pt").read_bytes()
    assert run([*words, "--batch-size", "6"]) == 2
    assert run([*words, "--batch-size", "6", "--force"]) == 0
    assert Path("net_calibrated.pt").read_bytes() == first


def test_dry_run_writes_nothing(folder, capsys):
    torch.save(untracked(), "net.pt")
    before = sorted(folder.iterdir())
    out = said(capsys, ["calibrate", "net.pt", "--data", "digits.npy", "--dry-run"])
    assert "1 BatchNorm layer calibrated" in out
    assert sorted(folder.iterdir()) == before


def test_frozen_layers_are_read_back_frozen(folder, capsys):
    torch.save(untracked(), "net.pt")
    said(capsys, ["calibrate", "net.pt", "--data", "digits.npy", "--freeze"])
    out = said(capsys, ["fold"])
    assert "1 of 1 BatchNorm layers folded" in out


def test_a_folder_of_images(folder, capsys):
    image = pytest.importorskip("PIL.Image")
    (folder / "images").mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (30, 40), dtype=np.uint8)
        image.fromarray(pixels).save(folder / "images" / f"{i}.png")
    torch.save(untracked(), "net.pt")
    words = ["calibrate", "net.pt", "--data", "images", "--dry-run", "--json"]
    plain = json.loads(said(capsys, words))
    assert plain["layers"][0]["samples"] == 3 * 26 * 26
    assert any("made 1x1x28x28" in note for note in plain["notes"])
    assert any("--mean and --std" in note for note in plain["notes"])
    sized = json.loads(said(capsys, [*words, "--input", "1x1x12x16", "--mean", "0.5", "--std", "0.25"]))
    assert sized["layers"][0]["samples"] == 3 * 10 * 14
    assert not any("--mean and --std" in note for note in sized["notes"])


def test_weights_alone_cannot_hold_what_layers_do_not(folder, capsys):
    Path("net.py").write_text(
        "from torch import nn\n"
        "def tracked(track=True):\n"
        "    norm = nn.BatchNorm2d(4, track_running_stats=track)\n"
        "    return nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.ReLU())\n"
        "def untracked():\n    return tracked(False)\n"
    )
    torch.save(untracked().state_dict(), "weights.pt")
    base = ["--data", "digits.npy"]
    assert run(["calibrate", "weights.pt", "--arch", "net.py:untracked", *base]) == 2
    assert "holds only weights" in capsys.readouterr().err
    torch.save(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)).state_dict(), "tracked.pt")
    assert run(["calibrate", "tracked.pt", "--arch", "net.py:tracked", *base, "--freeze"]) == 2
    assert "frozen" in capsys.readouterr().err
    assert not list(folder.glob("*_calibrated*"))
    said(capsys, ["calibrate", "tracked.pt", "--arch", "net.py:tracked", *base])
    state = torch.load("tracked_calibrated.pt")
    assert int(state["1.num_batches_tracked"]) == 1
    assert "1 of 1 BatchNorm layers folded" in said(capsys, ["fold"])


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["--data", "missing.npy"], 3, "no such data"),
        (["--data", "wide.npy"], 2, "4x3x28x28, and the model takes"),
        (["--data", "spoiled.npy"], 2, "NaN or infinite"),
        (["--data", "digits.npy", "--batch-size", "0"], 2, "batch size is 0"),
        (["--data", "digits.npy", "--mean", "a"], 2, "--mean a is neither a list"),
        ([], 2, "--data"),
    ],
)
def test_bad_data_leaves_nothing_behind(folder, capsys, words, code, text):
    torch.save(untracked(), "net.pt")
    np.save("wide.npy", np.zeros((4, 3, 28, 28)))
    np.save("spoiled.npy", np.full((4, 1, 28, 28), np.nan))
    assert run(["calibrate", "net.pt", *words]) == code
    assert text in capsys.readouterr().err
    assert not list(folder.glob("*_calibrated*"))


def test_a_model_whose_weights_overflow_is_a_bad_state(folder, capsys):
    model = untracked()
    with torch.no_grad():
        model[0].weight.fill_(float("inf"))
    torch.save(model, "net.pt")
    assert run(["calibrate", "net.pt", "--data", "digits.npy"]) == 7
    assert "1, batch 1" in capsys.readouterr().err


def test_a_model_without_batchnorm(folder, capsys):
    torch.save(nn.Sequential(nn.Conv2d(1, 2, 3)), "net.pt")
    assert run(["calibrate", "net.pt", "--data", "digits.npy"]) == 4
    assert "no BatchNorm" in capsys.readouterr().err
