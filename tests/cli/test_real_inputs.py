"""`--inputs FILE`: every command, and every kind of model, works on what the user gives it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

import bntool as package
from bntool.core.errors import UsageError
from tests.cli.conftest import Shell
from tests.exports import export_onnx

pytestmark = pytest.mark.filterwarnings("ignore")
KINDS = {"module": "m.pt", "program": "m.pt2", "script": "s.pt", "onnx": "m.onnx"}


@pytest.fixture(autouse=True)
def files(folder: Path) -> None:
    """A net of every kind that answers to bright images alone, and seven of them."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 3), nn.ReLU()
    ).eval()
    net[0].weight.data.fill_(1.0)
    net[0].bias.data.fill_(-90.0)
    net[3].weight.data.abs_()
    net[3].bias.data.fill_(-0.5)
    images = np.random.default_rng(0).uniform(20, 60, (7, 1, 8, 8)).astype(np.float32)
    np.save("real.npy", images)
    x = torch.zeros(2, 1, 8, 8)
    torch.save(net, "m.pt")
    torch.export.save(torch.export.export(net, (x,)), "m.pt2")
    torch.jit.script(net).save("s.pt")
    export_onnx(net, (x,), folder / "m.onnx")


@pytest.mark.parametrize("kind", KINDS)
def test_the_way_out_of_undecided_works_where_it_is_typed(kind: str, bntool: Shell, refused: Shell) -> None:
    name, new = KINDS[kind], f"new{Path(KINDS[kind]).suffix}"
    shape = ["--input", "1x1x8x8"] if name.endswith(".pt") else []
    assert bntool("fold", name, "-o", new, *shape).code == 10
    said = bntool("fold", name, "-o", new, "--force", "--inputs", "real.npy", "--json")
    assert said.code == 0, said
    assert all(row["passed"] for row in said.document["checks"] if row["precision"] != "float64")
    assert bntool("verify", name, new, "--inputs", "real.npy").code == 0
    if kind != "script":
        inserted = bntool("insert", name, "-o", f"i{new}", "--inputs", "real.npy", "--json")
        assert (inserted.code, inserted.document["checks"][0]["passed"]) == (0, True)
    for bad, code, says in (
        ("wide.npy", 2, "takes" if kind == "onnx" else "does not run on wide.npy"),
        ("complex.npy", 2, "holds input as torch.complex64, and the model takes torch.float32"),
        ("none.npy", 3, "no such file"),
        ("empty.npy", 2, "holds no"),
    ):
        np.save("wide.npy", np.zeros((4, 3, 8, 8), np.float32))
        np.save("complex.npy", np.zeros((4, 1, 8, 8), np.complex64))
        np.save("empty.npy", np.zeros((0, 1, 8, 8), np.float32))
        refused("fold", name, "-o", "x", "--inputs", bad, code=code, says=says)
    refused("fold", name, "--inputs", "real.npy", "--input", "1x1x8x8", code=2)


@pytest.mark.parametrize("name", ["m.pt", "m.onnx"])
def test_commands_that_only_look_heed_them_too(name: str, bntool: Shell) -> None:
    np.save("wide.npy", np.full((5, 1, 12, 10), 30, np.uint8))
    layers = bntool("summary", name, "--inputs", "wide.npy", "--json")
    if name == "m.pt":
        assert layers.document["layers"][0]["input_shape"] == [1, 1, 12, 10]
        timed = bntool("bench", name, "m.onnx", "--inputs", "real.npy", "--rounds", "11", "--json")
        assert [row["batch"] for row in timed.document["latency"]["rows"]] == [1, 1, 8, 8]
        exported = bntool("export", name, "-o", "e.onnx", "--inputs", "real.npy", "--json")
        assert [row["batches"] for row in exported.document["checks"]] == [4, 4]
    else:  # which declares 8 x 8
        assert (layers.code, layers.document["error"]["next"]) == (2, "its inputs are input; ? is any length")
        converted = bntool("export", name, "--opset", "19", "-o", "o.onnx", "--inputs", "real.npy", "--json")
        assert [row["batches"] for row in converted.document["checks"]] == [4, 4]


def several(axes: list[int | str] | None = None) -> None:
    """A net of an image, a state whose samples lie along its second axis, and a number."""
    weight = numpy_helper.from_array(np.ones((3, 1, 3, 3), np.float32), "W")
    norm = [
        numpy_helper.from_array(np.full(3, n, np.float32), k)
        for k, n in zip("gbmv", (2, 0, 1, 1), strict=True)
    ]
    nodes = [
        helper.make_node("Conv", ["image", "W"], ["c"]),
        helper.make_node("BatchNormalization", ["c", *"gbmv"], ["d"], name="bn"),
        helper.make_node("Transpose", ["state"], ["t"], perm=[1, 0]),
        helper.make_node("ReduceSum", ["t"], ["r"], keepdims=0, axes=[1]),
        helper.make_node("Unsqueeze", ["r"], ["u"], axes=[1, 2, 3]),
        helper.make_node("Cast", ["rate"], ["f"], to=1),
        helper.make_node("Mul", ["d", "f"], ["e"]),
        helper.make_node("Add", ["e", "u"], ["y"]),
    ]
    inputs = [
        helper.make_tensor_value_info("image", 1, axes or ["n", 1, "h", "w"]),
        helper.make_tensor_value_info("state", 1, [2, "n"]),
        helper.make_tensor_value_info("rate", 7, []),
    ]
    graph = helper.make_graph(
        nodes, "g", inputs, [helper.make_tensor_value_info("y", 1, None)], [weight, *norm]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 12)], ir_version=7)
    onnx.save(model, "several.onnx")


def test_arrays_by_name_whole_where_samples_lie_elsewhere(bntool: Shell, refused: Shell) -> None:
    several()
    r = np.random.default_rng(0)
    image = r.normal(size=(4, 1, 9, 7)).astype(np.float32)
    state = r.normal(size=(2, 4)).astype(np.float32)
    np.savez("three.npz", rate=np.int64(3), state=state, image=image)
    said = bntool("fold", "several.onnx", "--inputs", "three.npz", "--json")
    assert (said.code, said.document["bn_folded"]) == (0, 1), said
    assert "inputs 4x1x9x7, 2x4, scalar" in said.document["checks"][0]["detail"]
    for arrays, says in (
        ({"picture": image, "state": state, "rate": np.int64(3)}, "takes image, state, rate"),
        ({"image": image, "state": state}, "takes image, state, rate"),
        ({"image": image, "state": state, "rate": np.float32(3)}, "holds rate as torch.float32"),
        ({"image": image[0], "state": state, "rate": np.int64(3)}, "the file takes ?x1x?x?"),
        ({"image": image[:3], "state": state, "rate": np.int64(3)}, "does not run on bad.npz"),
    ):
        np.savez("bad.npz", **arrays)
        refused("fold", "several.onnx", "-o", "x.onnx", "--inputs", "bad.npz", code=2, says=says)


def test_a_fixed_batch_is_cut_into_such_batches(bntool: Shell) -> None:
    several([2, 1, 9, 9])
    r = np.random.default_rng(0)
    arrays = {
        "image": r.normal(size=(2, 1, 9, 9)).astype(np.float32),
        "state": r.normal(size=(2, 2)).astype(np.float32),
        "rate": np.int64(2),
    }
    np.savez("fixed.npz", **arrays)
    assert bntool("fold", "several.onnx", "--inputs", "fixed.npz").code == 0
    given = {name: torch.as_tensor(array) for name, array in arrays.items()}
    result = package.fold("several.onnx", ((), given))
    assert "inputs 2x1x9x9, 2x2, scalar" in result.checks[0].detail
    with pytest.raises(UsageError, match="the file takes image, state, rate"):
        package.fold("several.onnx", torch.zeros(1))
