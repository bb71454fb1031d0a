"""`bntool inspect` on every kind of file, honest, hostile and damaged."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import struct
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from torch import nn

from bntool.files.security.containers import PICKLED, Container
from bntool.files.security.stand_ins import Picture, pictured_tensors
from tests.cli import nets
from tests.cli.conftest import Shell
from tests.files import torch_files as tf


class Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return open, ("marker", "w")


def _script(path: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(nets.plain(), torch.zeros(1, 3, 16, 16)), path)


def _program(path: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(nets.plain(), (torch.zeros(1, 3, 16, 16),)), path)


def _onnx(path: str, **external: str) -> None:
    weight = numpy_helper.from_array(torch.zeros(4, 3, 1, 1).numpy(), "w")
    if external:
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        for key, value in external.items():
            weight.external_data.add(key=key, value=value)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 8, 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4, 8, 8])
    graph = helper.make_graph([helper.make_node("Conv", ["x", "w"], ["y"])], "g", [x], [y], [weight])
    Path(path).write_bytes(helper.make_model(graph).SerializeToString())


KINDS: dict[str, Callable[[str], Any]] = {
    "torch-zip": lambda p: nets.save(nets.plain(), p),
    "torch-legacy": lambda p: torch.save(nets.plain().state_dict(), p, _use_new_zipfile_serialization=False),
    "safetensors": lambda p: save_file(nets.plain().state_dict(), p),
    "torchscript": _script,
    "pt2": _program,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_tells_its_tensors_exactly(bntool: Shell, kind: str) -> None:
    KINDS[kind]("file")
    said = bntool("inspect", "file", "--json")
    document = said.document
    assert (said.code, document["status"], document["kind"]) == (0, "ok", kind)
    state = nets.plain().state_dict()
    found = {row["name"]: (row["dtype"], tuple(row["shape"]), row["bytes"]) for row in document["tensors"]}
    assert found == {n: (str(t.dtype)[6:], tuple(t.shape), t.nbytes) for n, t in state.items()}
    assert document["tensor_bytes"] == sum(t.nbytes for t in state.values())
    assert document["suspicious"] == []
    assert "suspicious: nothing" in bntool("inspect", "file").out


def test_an_onnx_file_tells_what_it_needs_and_holds(bntool: Shell) -> None:
    _onnx("net.onnx")
    facts = bntool("inspect", "net.onnx", "--json").document["facts"]
    assert facts["inputs"] == {"x": "FLOAT batchx3x8x8"}
    assert facts["outputs"] == {"y": "FLOAT batchx4x8x8"}
    assert facts["nodes"] == {"Conv": 1}
    assert facts["opsets"] == {"ai.onnx": onnx.defs.onnx_opset_version()}
    assert facts["ir_version"] >= 10


@pytest.mark.parametrize(
    ("external", "says"),
    [
        ({"location": "../w.bin"}, "outside its folder"),
        ({"location": "/etc/passwd"}, "outside its folder"),
        ({"location": "link.bin"}, "through a link out of its folder"),
        ({"location": "w.bin", "offset": "40"}, "beyond the end"),
        ({"location": "w.bin", "length": "1000"}, "beyond the end"),
        ({"location": "w.bin", "offset": "x"}, "no number"),
    ],
)
def test_external_data_that_is_not_what_it_should_be(bntool: Shell, external: Any, says: str) -> None:
    Path("w.bin").write_bytes(bytes(48))
    Path("../w.bin").write_bytes(bytes(48))
    Path("link.bin").symlink_to("../w.bin")
    _onnx("net.onnx", **external)
    said = bntool("inspect", "net.onnx", "--json")
    assert said.code == 3
    assert says in said.document["suspicious"][0]


def test_a_model_without_its_data_is_no_suspect(bntool: Shell) -> None:
    _onnx("net.onnx", location="w.bin")
    said = bntool("inspect", "net.onnx", "--json")
    assert (said.code, said.document["suspicious"]) == (3, [])
    assert "a file that is not there: w.bin" in said.document["error"]["what"]
    Path("other.bin").write_bytes(bytes(48))
    os.link("other.bin", "w.bin")
    said = bntool("inspect", "net.onnx", "--json")
    assert (said.code, said.document["suspicious"]) == (3, [])
    assert "a hard link" in said.document["error"]["what"]


@pytest.mark.parametrize("name", ["w.bin", "link.bin"])
def test_honest_external_data_is_measured(bntool: Shell, name: str) -> None:
    Path("w.bin").write_bytes(bytes(48))
    Path("link.bin").symlink_to("w.bin")
    _onnx("net.onnx", location=name, offset="0", length="48")
    said = bntool("inspect", "net.onnx", "--json")
    assert said.code == 0
    assert said.document["facts"]["external_data"] == {name: 48}


@pytest.mark.parametrize(
    ("how", "protocol"),
    # torch.save writes no protocol before 2
    [("bare", n) for n in range(6)] + [(how, n) for how in ("zip", "legacy") for n in range(2, 6)],
)
def test_hostile_pickles_are_read_and_not_run(bntool: Shell, how: str, protocol: int) -> None:
    payload = {"weights": Runs(), "more": {1, 2}}
    if how == "bare":
        Path("evil.pt").write_bytes(pickle.dumps(payload, protocol))
    else:
        torch.save(payload, "evil.pt", pickle_protocol=protocol, _use_new_zipfile_serialization=how == "zip")
    said = bntool("inspect", "evil.pt", "--json")
    assert said.code == 3
    refused = [c["name"] for c in said.document["classes"] if c["standing"] == "refused"]
    assert refused in (["io.open"], ["_io.open"], ["builtins.open"])
    assert any("can run code" in why for why in said.document["suspicious"])
    assert not Path("marker").exists()


def test_classes_are_named_with_what_becomes_of_them(bntool: Shell) -> None:
    module = tf.module("mypkg.Net", ("act", tf.module("torch.nn.modules.activation.ReLU")))
    tf.write_zip(Path("net.pt"), tf.pickled(module))
    said = bntool("inspect", "net.pt", "--json")
    assert said.code == 0
    standing = {c["name"]: c["standing"] for c in said.document["classes"]}
    assert standing["mypkg.Net"] == "unknown"
    assert standing["torch.nn.modules.activation.ReLU"] == "known"
    assert "mypkg.Net  [not known here: --allow]" in bntool("inspect", "net.pt").out


def test_a_damaged_file_still_says_what_could_be_said(bntool: Shell) -> None:
    whole = io.BytesIO()
    torch.save(nets.plain().state_dict(), whole, _use_new_zipfile_serialization=False)
    Path("cut.pt").write_bytes(whole.getvalue()[:700])
    said = bntool("inspect", "cut.pt", "--json")
    assert (said.code, said.document["status"]) == (3, "cannot-load")
    assert said.document["tensors"]
    assert said.document["tensors"][0]["name"] == next(iter(nets.plain().state_dict()))


def test_every_cut_and_every_flipped_byte_is_told_in_words(bntool: Shell) -> None:
    for make in (KINDS["torch-zip"], KINDS["torch-legacy"], KINDS["safetensors"], _onnx):
        make("good")
        content = Path("good").read_bytes()
        step = max(len(content) // 12, 1)
        for at in range(0, len(content), step):
            Path("bad").write_bytes(content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :])
            assert bntool("inspect", "bad").code in (0, 3)
            Path("bad").write_bytes(content[:at])
            assert bntool("inspect", "bad").code == 3


def test_mishaps_are_named(bntool: Shell) -> None:
    for content, says in (
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<!doctype html><html>", "download it again"),
        (b"", "an empty file"),
        (b"GGUF" + bytes(40), "GGUF"),
    ):
        Path("file").write_bytes(content)
        said = bntool("inspect", "file")
        assert said.code == 3
        assert says in said.err


def _header(document: Any, data: int = 0) -> bytes:
    raw = json.dumps(document).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(data)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (struct.pack("<Q", 1 << 20) + b"{}", "claims"),
        (_header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, 4), "holds 4"),
        (_header({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, 8), "described"),
        (_header({"a": {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 8]}}, 8), "agree"),
        (_header({"a": {"dtype": "X", "shape": [2], "data_offsets": [0, 8]}}, 8), "unknown dtype"),
        (_header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, 8), "does not begin"),
        (
            _header({"__metadata__": {"a": {}}, "b": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}),
            "texts",
        ),
        (struct.pack("<Q", 6 * 10**4) + b'{"a":' * 10**4 + bytes(10**4), "no plain JSON"),
    ],
)
def test_a_hostile_safetensors_header(bntool: Shell, content: bytes, says: str) -> None:
    Path("bad.safetensors").write_bytes(content)
    for command in ("inspect", "summary"):
        said = bntool(command, "bad.safetensors")
        assert said.code == 3
        assert "damaged" in said.err
    assert says in bntool("inspect", "bad.safetensors").err


def test_a_checkpoint_with_foreign_objects_and_a_model_without_its_class(bntool: Shell) -> None:
    state = nets.plain().state_dict()
    torch.save({"model": state, "args": argparse.Namespace(lr=0.1), "where": Path("runs")}, "ck.pt")
    document = bntool("inspect", "ck.pt", "--json").document
    assert document["facts"]["holds"] == "a dict of model, args, where"
    assert {row["name"] for row in document["tensors"]} == {f"model.{name}" for name in state}


def test_buffers_of_the_model_itself_have_their_names() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    net.register_buffer("seen", torch.zeros(3, dtype=torch.int16))
    buffer = io.BytesIO()
    torch.save(net, buffer)
    picture = Picture(Container(buffer, PICKLED).read("data.pkl")).read_all()
    found = {t.name: (t.dtype, t.shape) for t in pictured_tensors(picture.value)}
    assert found == {n: (str(t.dtype)[6:], tuple(t.shape)) for n, t in net.state_dict().items()}


@pytest.mark.parametrize(
    "structure",
    [
        b"N" + b"\x85" * 300_000,  # tuples in tuples
        b"]" * 100_000 + b"a" * 99_999,  # lists in lists
        b"]q\x00h\x00a",  # a list in itself
        b")" + b"2\x86" * 200 + b"}" + b")" + b"2\x86" * 200 + b"Ns",  # a key whose hash takes 2^200 steps
        b"\x96" + (1 << 40).to_bytes(8, "little"),  # a terabyte of bytes to come
        b"Nr\xff\xff\xff\xff",  # a memo of four billion places
    ],
)
def test_deep_cyclic_and_endless_pickles_take_no_time(bntool: Shell, structure: bytes) -> None:
    tf.write_zip(Path("net.pt"), tf.pickled(structure))
    before = time.monotonic()
    assert bntool("inspect", "net.pt").code in (0, 3)
    assert bntool("summary", "net.pt").code == 3
    assert time.monotonic() - before < 20


def test_what_belongs_together_has_a_subtotal(bntool: Shell) -> None:
    model = nets.normalised()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 3, 12, 12)).sum().backward()
    optimizer.step()
    state = model.state_dict()
    averaged = torch.optim.swa_utils.AveragedModel(model).state_dict()
    torch.save({"epoch": 1, "net": state, "ema": averaged, "optimizer": optimizer.state_dict()}, "c.pt")
    said = bntool("inspect", "c.pt", "--json").document
    found = {g["name"]: (g["what"], g["tensors"], g["copy_of"]) for g in said["groups"]}
    parameters = len(list(model.parameters()))
    assert found == {
        "net": ("weights", len(state), ""),
        "ema": ("averaged weights", len(averaged), "net"),
        **{
            f"optimizer.state.*.{name}": ("optimizer state", parameters, "")
            for name in ("step", "exp_avg", "exp_avg_sq")
        },
    }
    assert sum(g["bytes"] for g in said["groups"]) == said["tensor_bytes"]
    out = bntool("inspect", "c.pt", "-q").out
    assert "averaged weights, as net" in out
    # a file of weights is one group, whatever its layers are called
    torch.save({"stem.weight": torch.zeros(3), "head.weight": torch.zeros(3)}, "w.pt")
    assert len(bntool("inspect", "w.pt", "--json").document["groups"]) == 1


def test_two_weights_of_equal_names_are_no_groups_of_one_layer(bntool: Shell) -> None:
    """Layers of a Sequential repeat their names, and are no copies of a model."""
    nets.save(nets.plain().state_dict(), "w.pt")
    assert len(bntool("inspect", "w.pt", "--json").document["groups"]) == 1
