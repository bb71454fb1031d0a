"""Files in which whatever can have a name has one that would take the terminal over."""

from __future__ import annotations

import json
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tests.cli import nets

FAKE = "FAKE LINE"
NAME = f"a\x1b]0;title\x07\x1b[2J\x7f\x9b31m\u202e\u2066\u200b\u2028|`[b](c:d)<i>@you http://x\t\r{FAKE}\n{FAKE}\x85{FAKE}"
"""Title, clear screen, delete, a C1 colour, override, isolate, no width, line separator, Markdown, new lines.

It has no dot, which the name of a layer must not have.
"""
FILE = NAME.replace("/", "")


def make_all() -> None:
    """Every file, into the current folder."""
    _modules()
    _weights()
    _onnx()
    _programs()
    _data()
    _documents()


def _modules() -> None:
    nets.save(_named(nets.normalised()), "m.pt")
    nets.save(_named(nets.plain()), "p.pt")
    nets.save(_named(nets.partly_foldable()), f"{FILE}.pt")
    Path("net.py").write_text(
        "import logging\n"
        f"NAME = {NAME!r}\n"
        "from tests.cli.hostile import _named\n"
        "from tests.cli import nets\n"
        "def noisy():\n"
        "    logging.getLogger(NAME).error(NAME.split(chr(10))[0])\n"
        "    print(NAME.split(chr(10))[0])\n"
        "    return _named(nets.normalised())\n"
        "def norm():\n    return _named(nets.normalised())\n"
        "def bare():\n    return _named(nets.plain())\n"
        "def raising():\n    raise ValueError(NAME)\n"
        "def leaving():\n    raise SystemExit(NAME)\n"
    )


def _named(model: nn.Sequential) -> nn.Sequential:
    made = nn.Sequential()
    for name, layer in model.named_children():
        made.add_module(f"{NAME}{name}", layer)
    return made.eval()


def _weights() -> None:
    from safetensors.torch import save_file

    state = {f"{NAME}{key}": value for key, value in nets.normalised().state_dict().items()}
    torch.save(state, "w.pt")
    torch.save({NAME: state, f"{NAME}2": {"x": torch.zeros(1)}}, "nested.pt")
    torch.save({NAME: torch.zeros(2)}, "caf\udce9.pt")
    torch.save({f"{NAME}\udc80": torch.zeros(2)}, "surrogate.pt")
    save_file(state, "w.safetensors", {NAME: NAME})
    Path("cut.safetensors").write_bytes(Path("w.safetensors").read_bytes()[:-9])


def _onnx() -> None:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    def model(op: str, batch: int | str) -> onnx.ModelProto:
        values = {"w": np.ones((4, 3, 1, 1), "f"), **{n: np.ones(4, "f") for n in ("s", "t", "m", "v")}}
        held = [numpy_helper.from_array(value, NAME + name) for name, value in values.items()]
        convolved = helper.make_node("Conv", [f"{NAME}x", f"{NAME}w"], [f"{NAME}c"], name=f"{NAME}conv")
        norm = ["c", "s", "t", "m", "v"]
        normed = helper.make_node(op, [NAME + n for n in norm], [f"{NAME}n"], name=f"{NAME}norm")
        ended = helper.make_node("Relu", [f"{NAME}n"], [f"{NAME}y"], name=f"{NAME}relu", doc_string=NAME)
        graph = helper.make_graph(
            [convolved, normed, ended],
            NAME,
            [helper.make_tensor_value_info(f"{NAME}x", TensorProto.FLOAT, [batch, 3, 6, 6])],
            [helper.make_tensor_value_info(f"{NAME}y", TensorProto.FLOAT, None)],
            held,
            doc_string=NAME,
        )
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], producer_name=NAME)
        made.ir_version = 8
        made.metadata_props.add(key=NAME, value=NAME)
        return made

    onnx.save(model("BatchNormalization", 1), "m.onnx")
    onnx.save(model("BatchNormalization", 1), "same.onnx")
    onnx.save(model("BatchNormalization", NAME), "open.onnx")
    onnx.save(model(NAME, 1), "unknown.onnx")
    lost = model("BatchNormalization", 1)
    lost.graph.initializer[0].ClearField("raw_data")
    lost.graph.initializer[0].data_location = TensorProto.EXTERNAL
    lost.graph.initializer[0].external_data.add(key="location", value=NAME)
    onnx.save(lost, "lost.onnx")


def _programs() -> None:
    sample = (torch.zeros(1, 3, 12, 12),)
    torch.export.save(torch.export.export(nets.normalised(), sample), "whole.pt2")
    with zipfile.ZipFile("whole.pt2") as old, zipfile.ZipFile("m.pt2", "w") as new:
        for info in old.infolist():
            content = old.read(info)
            if info.filename.endswith(".json"):
                content = content.replace(b"p_0_weight", json.dumps(NAME)[1:-1].encode())
            new.writestr(info, content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls TorchScript old
        torch.jit.save(torch.jit.trace(nets.normalised(), sample), "s.pt", _extra_files={NAME: NAME})


def _data() -> None:
    from PIL import Image

    np.savez("d.npz", **{NAME: np.zeros((4, 3, 12, 12), "f"), f"{NAME}2": np.zeros(4)})
    torch.save({NAME: torch.zeros(4, 3, 12, 12), f"{NAME}2": torch.zeros(4)}, "d.pt")
    for kind in (f"{NAME}1", f"{NAME}2"):
        folder = Path("images") / kind.replace("/", "")
        folder.mkdir(parents=True)
        Image.new("RGB", (12, 12)).save(folder / f"{FILE}.png")
        (folder / f"{FILE}.jpg").write_bytes(b"no picture")


def _documents() -> None:
    from bntool.cli import run

    assert run(["fold", "net.py:norm", *nets.INPUT, "-o", "folded.pt", "--force"]) == 0
    side = Path("folded.pt.bntool.json")
    held = json.loads(side.read_text())
    Path("plan.json").write_text(json.dumps(held["plan"]))
    Path("bad_plan.json").write_text(json.dumps({**held["plan"], NAME: NAME, "action": NAME}))
    Path("sites.json").write_text(json.dumps([NAME, {NAME: NAME}]))
    Path("failed.json").write_text(
        json.dumps(
            {"schema_version": 1, "command": NAME, "status": NAME, "error": {"what": NAME, "where": NAME}}
        )
    )
    Path("doc.json").write_text(json.dumps({**held, "schema_version": 1, "command": "fold"}))
    Path("folded.pt").rename("again.pt")
    Path("again.pt.bntool.json").write_text(
        json.dumps({**held, "notes": [NAME], "command": NAME, "arch": NAME})
    )
