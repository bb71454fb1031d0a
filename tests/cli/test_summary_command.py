from __future__ import annotations

import shutil
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

import bntool as package
from tests.cli import nets
from tests.cli.conftest import Shell, contents


def test_the_document(bntool: Shell, folder: Path) -> None:
    nets.save(nets.normalised(), "model.pt")
    before = contents(folder.parent)
    said = bntool("summary", "model.pt", *nets.INPUT, "--json")
    document = said.document
    assert (said.code, said.err, document["status"]) == (0, "", "ok")
    keys = {"name", "type", "input_shape", "output_shape", "trainable", "frozen", "buffers"}
    assert all(keys <= set(layer) for layer in document["layers"])
    first, second = document["layers"][:2]
    assert (first["type"], first["input_shape"], first["output_shape"]) == (
        "Conv2d",
        [1, 3, 12, 12],
        [1, 4, 10, 10],
    )
    assert (second["trainable"], second["buffers"]) == (8, 9)
    parameters, buffers = nets.counted("model.pt")
    totals = document["totals"]
    assert totals["parameters"] == totals["trainable"] == parameters
    assert (totals["frozen"], totals["buffers"]) == (0, buffers)
    # float32 everywhere but in the two int64 counters.
    assert totals["bytes"] == 4 * (parameters + buffers) + 2 * 4
    assert "delta" not in document or document["delta"] is None
    assert contents(folder.parent) == before


def test_the_delta_after_insert_and_after_fold(bntool: Shell) -> None:
    nets.save(nets.plain(), "model.pt")
    assert bntool("insert", "model.pt", *nets.INPUT).code == 0
    after_insert = bntool("summary", "--json").document
    assert after_insert["delta"]["totals"]["trainable"] == 8
    assert after_insert["notes"][:2] == [
        "using model_bn.pt, written by the last bntool insert here",
        "compared with model.pt",
    ]
    assert bntool("fold").code == 0
    after_fold = bntool("summary", "--json").document
    assert after_fold["delta"]["totals"]["trainable"] == -8
    assert after_fold["notes"][1] == "compared with model_bn.pt"


def test_a_baseline_that_is_named(bntool: Shell) -> None:
    nets.save(nets.plain(), "model.pt")
    nets.save(nets.normalised(), "other.pt")
    document = bntool("summary", "other.pt", "--baseline", "model.pt", *nets.INPUT, "--json").document
    before, after = nets.counted("model.pt"), nets.counted("other.pt")
    total = document["delta"]["totals"]
    assert (total["trainable"], total["buffers"]) == (after[0] - before[0], after[1] - before[1])


def test_weights_with_a_baseline_that_bntool_made(bntool: Shell) -> None:
    nets.save(nets.user_model().state_dict(), "w.pt")
    nets.forget("user_net")
    assert bntool("insert", "w.pt", "--arch", "user_net.py:Net", *nets.INPUT).code == 0
    said = bntool("summary", "w.pt", "--arch", "user_net.py:Net", "--baseline", "w_bn.pt", *nets.INPUT)
    assert said.code == 0, said
    assert "removed" in said.out


def test_a_source_that_is_gone_leaves_the_summary(bntool: Shell) -> None:
    nets.save(nets.plain(), "model.pt")
    assert bntool("insert", "model.pt", *nets.INPUT).code == 0
    Path("model.pt").unlink()
    said = bntool("summary")
    assert said.code == 0
    assert "no comparison with" in said.out
    assert "since the baseline" not in said.out


def test_an_output_that_is_gone_is_told(refused: Shell, bntool: Shell) -> None:
    nets.save(nets.plain(), "model.pt")
    assert bntool("insert", "model.pt").code == 0
    Path("model_bn.pt").unlink()
    refused("summary", code=2, says="model_bn.pt")


def test_another_folder_remembers_nothing(bntool: Shell, monkeypatch: object, folder: Path) -> None:
    import os

    nets.save(nets.plain(), "model.pt")
    assert bntool("insert", "model.pt").code == 0
    other = folder.parent / "other"
    shutil.copytree(folder, other)
    os.chdir(other)
    assert bntool("summary").code == 2


def test_bad_statistics_are_a_remark(bntool: Shell) -> None:
    model = nets.normalised()
    model[1].running_var[2] = float("nan")
    nets.save(model, "model.pt")
    said = bntool("summary", "model.pt", *nets.INPUT)
    assert said.code == 0
    assert "running statistics are not finite or negative: 1" in said.out


def test_modes_are_shown_and_kept(bntool: Shell) -> None:
    nets.save(nets.normalised().train(), "model.pt")
    assert bntool("summary", "model.pt", *nets.INPUT).code == 0
    assert torch.load("model.pt", weights_only=False).training


def test_every_kind_and_a_baseline_of_another(bntool: Shell) -> None:
    """The BatchNorm of four channels is 8 parameters, and 9 buffers where one counts batches."""
    plain, model, x = nets.plain(), nets.normalised(), torch.zeros(1, 3, 12, 12)
    nets.save(plain, "plain.pt")
    nets.save(model, "m.pt")
    torch.save(model.state_dict(), "w.pt")
    torch.export.save(torch.export.export(model, (x,)), "m.pt2")
    package.export_onnx(model, (x,), "m.onnx")
    for name, buffers in (("m.pt", 9), ("w.pt", 9), ("m.pt2", 9), ("m.onnx", 8)):
        said = bntool("summary", name, "--baseline", "plain.pt", "--json")
        assert said.code == 0, said
        document = said.document
        (norm,) = [layer for layer in document["layers"] if layer["name"] == "1"]
        assert norm["type"].startswith("BatchNorm"), name
        assert (norm["trainable"] + norm["frozen"], norm["buffers"]) == (8, buffers), name
        change = {row["name"]: row for row in document["delta"]["layers"]}["1"]
        assert (change["change"], change["trainable"], change["buffers"]) == ("added", 8, buffers), name
        assert document["batch_norms"] == 2
    same = bntool("summary", "m.pt2", "--baseline", "m.pt")
    assert "no layer with parameters or buffers changed" in same.out


def test_weights_alone_are_told_alike_by_the_command_and_in_python(bntool: Shell) -> None:
    """In the order of the layers, though a safetensors file is sorted by types and names."""
    wide = nn.Sequential(*(nn.BatchNorm1d(2) if i % 2 else nn.Linear(2, 2) for i in range(12)))
    safetensors.torch.save_file(wide.state_dict(), "w.safetensors")
    torch.save({"state_dict": wide.state_dict()}, "w.pt")
    for name in ("w.safetensors", "w.pt"):
        told = package.summary(name, baseline="w.pt")
        said = bntool("summary", name, "--baseline", "w.pt")
        assert said.out.split("\n", 1)[1].rstrip() == str(told).rstrip()
        assert [layer.name for layer in told.layers] == [str(i) for i in range(12)]
        assert (told.kind, told.totals.parameters, told.batch_norms) == ("weights", 6 * 6 + 6 * 4, 6)


def test_a_class_that_is_not_here_is_looked_at_in_python_too(bntool: Shell) -> None:
    nets.save(nets.user_model(), "m.pt")
    nets.forget("user_net")
    Path("user_net.py").unlink()
    told = package.summary("m.pt")
    assert "not here" in str(told.notes[0])
    assert str(told) in bntool("summary", "m.pt").out


def test_columns_depth_order_and_a_tree(bntool: Shell, refused: Shell) -> None:
    nets.save(nets.normalised(), "m.pt")
    line = ("summary", "m.pt", *nets.INPUT, "--columns", "name,mult-adds,percent")
    rows = [row.split() for row in bntool(*line, "--sort", "mult-adds").out.splitlines()[3:8]]
    assert [row[0] for row in rows[:2]] == ["0", "3"]
    assert rows[0][1:] == ["10,800", f"{108 / 194:.2%}"]
    assert "Sequential, 5 layers" in bntool("summary", "m.pt", "--depth", "0").out
    assert "\n  BatchNorm2d-2" in bntool("summary", "m.pt", "--tree").out
    refused("summary", "m.pt", "--columns", "nonsense", code=2, says="mult-adds")
    refused("summary", "m.pt", "--sort", "nonsense", code=2, says="mult-adds")
    refused("summary", "m.pt", "--depth", "-1", code=2)
    refused("summary", "m.pt", "--tree", "--sort", "name", code=2)


def test_a_size_that_does_not_fit_keeps_what_ran(bntool: Shell) -> None:
    nets.save(nets.plain(), "m.pt")
    said = bntool("summary", "m.pt", "--input", "1x3x3x3", "--json")
    assert (said.code, said.document["status"]) == (2, "usage")
    assert said.document["layers"][0]["output_shape"] == [1, 4, 1, 1]
    assert said.document["layers"][2]["output_shape"] is None
