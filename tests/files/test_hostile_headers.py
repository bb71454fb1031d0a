"""Hostile headers of safetensors and external data of ONNX: exit code 3, one clear error, nothing read."""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from bntool.api import load
from bntool.core.errors import LoadError
from bntool.files.onnx_files import open_onnx

GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def _held(header: bytes | Any, data: bytes = bytes(8), length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def _one(**changes: Any) -> bytes:
    return _held({"w": {**GOOD, **changes}})


SAFETENSORS: dict[str, bytes] = {
    "length-of-everything": _held({"w": GOOD}, length=(1 << 64) - 1),
    "length-beyond-the-file": _held({"w": GOOD}, length=90_000_000),
    "length-beyond-the-limit": _held({"w": GOOD}, length=1 << 40),
    "length-too-short": _held({"w": GOOD}, length=5),
    "not-json": _held(b"{not json}"),
    "not-utf-8": _held(b'{"\xff\xfe": 1}'),
    "deep": _held(b'{"w":' + b"[" * 50_000 + b"]" * 50_000 + b"}"),
    "a-number": _held({"w": 1}),
    "a-list": _held({"w": [GOOD]}),
    "no-dtype": _held({"w": {"shape": [2], "data_offsets": [0, 8]}}),
    "no-offsets": _held({"w": {"dtype": "F32", "shape": [2]}}),
    "unknown-dtype": _one(dtype="PICKLE"),
    "dtype-is-code": _one(dtype="__import__('os').system('true')"),
    "negative-shape": _one(shape=[-2]),
    "shape-of-texts": _one(shape=["2"]),
    "shape-overflows": _one(shape=[1 << 62, 1 << 62]),
    "shape-of-terabytes": _one(shape=[1 << 40]),
    "shape-smaller-than-data": _one(shape=[1]),
    "offsets-reversed": _one(data_offsets=[8, 0]),
    "offsets-beyond": _one(data_offsets=[0, 1 << 40]),
    "offsets-negative": _one(data_offsets=[-8, 0]),
    "offsets-of-fractions": _one(data_offsets=[0, 7.5]),
    "offsets-three": _one(data_offsets=[0, 8, 8]),
    "hole": _held({"w": {**GOOD, "data_offsets": [8, 16]}}, bytes(16)),
    "overlap": _held({"a": GOOD, "b": {**GOOD, "data_offsets": [4, 12]}}, bytes(12)),
    "shared": _held({"a": GOOD, "b": GOOD}),
    "trailing": _held({"w": GOOD}, bytes(9)),
    "data-missing": _held({"w": GOOD}, b""),
    "twice-the-same": _held(
        b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"w":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}'
    ),
    "metadata-nested": _held({"__metadata__": {"a": {"b": 1}}, "w": GOOD}),
    "metadata-a-list": _held({"__metadata__": [1], "w": GOOD}),
    "name-leads-out": _held({"../../../tmp/marker": GOOD}),
    "name-with-escapes": _held({"\x1b[2Jw": GOOD}),
    "empty": _held({}, b""),
}


@pytest.mark.parametrize("case", SAFETENSORS)
def test_a_hostile_safetensors_header_is_refused(case: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(SAFETENSORS[case])
    (tmp_path / "net.py").write_text("from torch import nn\n\ndef make():\n    return nn.Linear(2, 1)\n")
    started = time.monotonic()
    with pytest.raises(LoadError) as caught:
        load(path, arch=f"{tmp_path / 'net.py'}:make")
    assert time.monotonic() - started < 20
    assert "model.safetensors" in str(caught.value)
    assert caught.value.next_step
    assert str(caught.value).replace("\n", "").isprintable()
    assert len(str(caught.value)) < 2000


def _onnx(folder: Path, **entries: str) -> Path:
    """A model whose one weight, four floats, lies outside as the entries say."""
    weight = TensorProto(name="w", dims=[4], data_type=TensorProto.FLOAT)
    weight.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        entry = weight.external_data.add()
        entry.key, entry.value = key, value
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [4]) for n in "xy"]
    node = helper.make_node("Add", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "g", ends[:1], ends[1:], [weight])
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 18)])
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def _data(count: int) -> Callable[[Path], object]:
    return lambda folder: (folder / "w.bin").write_bytes(bytes(count))


def _linked(folder: Path) -> None:
    (folder / "w.bin").symlink_to(folder.parent / "secret")


EXTERNAL: dict[str, tuple[dict[str, str], Callable[[Path], object] | None]] = {
    "above": ({"location": "../secret"}, None),
    "above-by-way-of-a-folder": ({"location": "sub/../../secret"}, None),
    "absolute": ({"location": "/etc/hostname"}, None),
    "home": ({"location": "~/../../etc/hostname"}, None),
    "backslashes": ({"location": "..\\secret"}, None),
    "null-byte": ({"location": "w\0.bin"}, None),
    "drive": ({"location": "C:\\secret"}, None),
    "share": ({"location": "\\\\server\\secret"}, None),
    "address": ({"location": "http://127.0.0.1:9/w.bin"}, None),
    "empty": ({"location": ""}, None),
    "the-folder": ({"location": "."}, None),
    "a-folder": ({"location": "sub"}, lambda f: (f / "sub").mkdir()),
    "a-pipe": ({"location": "w.bin"}, lambda f: os.mkfifo(f / "w.bin")),
    "a-link-out": ({"location": "w.bin"}, _linked),
    "a-link-in-a-loop": ({"location": "w.bin"}, lambda f: (f / "w.bin").symlink_to("w.bin")),
    "a-folder-that-leads-out": (
        {"location": "sub/secret"}, lambda f: (f / "sub").symlink_to(f.parent, target_is_directory=True)),
    "missing": ({"location": "w.bin"}, None),
    "no-location": ({"offset": "0"}, None),
    "too-short": ({"location": "w.bin"}, _data(15)),
    "offset-beyond": ({"location": "w.bin", "offset": "8"}, _data(16)),
    "offset-negative": ({"location": "w.bin", "offset": "-8"}, _data(32)),
    "offset-no-number": ({"location": "w.bin", "offset": "x"}, _data(32)),
    "offset-huge": (
        {"location": "w.bin", "offset": str(1 << 70)}, _data(32)),
    "length-beyond": (
        {"location": "w.bin", "length": str(1 << 40)}, _data(16)),
    "length-differs": ({"location": "w.bin", "length": "8"}, _data(16)),
    "length-negative": ({"location": "w.bin", "length": "-1"}, _data(16)),
    "the-model-itself": ({"location": "model.onnx", "offset": "100000"}, None),
}  # fmt: skip


@pytest.mark.parametrize("outputs", ["with", "without"])
@pytest.mark.parametrize("case", EXTERNAL)
def test_hostile_external_data_is_refused(case: str, outputs: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(np.ones(4, np.float32).tobytes())
    entries, prepare = EXTERNAL[case]
    path = _onnx(folder, **entries)
    if outputs == "without":
        # ONNX's own checker is not asked about such a file.
        model = onnx.load(path, load_external_data=False)
        model.graph.output[0].type.tensor_type.ClearField("shape")
        path.write_bytes(model.SerializeToString())
    if prepare is not None:
        prepare(folder)
    with pytest.raises(LoadError) as caught:
        open_onnx(path)
    assert caught.value.exit_code == 3
    assert "model.onnx" in str(caught.value)
    assert caught.value.next_step


def test_honest_external_data_opens(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(8) + np.ones(4, np.float32).tobytes())
    opened = open_onnx(_onnx(tmp_path, location="w.bin", offset="8", length="16"))
    assert opened.model.graph.initializers["w"].const_value.numpy().tolist() == [1, 1, 1, 1]
