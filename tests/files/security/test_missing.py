"""Models whose classes are not here can be looked at, and neither run nor changed."""

from __future__ import annotations

import argparse
import datetime as dt
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from bntool.api import load
from bntool.core.errors import LoadError
from tests.files import torch_files as tf


def _net(path: Path, kind: str = "gone.models.Net", **attributes: bytes) -> Path:
    """A whole model of a class that is nowhere, with a ReLU and a buffer inside."""
    names = {"_parameters": tf.EMPTY_DICT, "_buffers": tf.mapping((tf.text("seen"), tf.tensor(tf.storage())))}
    names["_modules"] = tf.mapping((tf.text("act"), tf.module("torch.nn.modules.activation.ReLU")))
    names |= {"training": tf.FALSE, **attributes}
    state = tf.mapping(*((tf.text(n), v) for n, v in names.items()))
    return tf.write_zip(path, tf.pickled(tf.name(kind), tf.EMPTY_TUPLE, tf.NEWOBJ, state, tf.BUILD))


def test_the_tree_and_the_tensors_are_there_and_the_forward_is_not(tmp_path: Path) -> None:
    path = _net(tmp_path / "net.pt")
    with pytest.raises(LoadError, match=r"needs 1 class bntool does not know: gone\.models\.Net"):
        load(path)
    loaded = load(path, stand_ins=True)
    assert [type(m).__name__ for m in loaded.module.modules()] == ["Net", "ReLU"]
    assert list(loaded.module.state_dict()) == ["seen"]
    assert any("gone.models.Net" in note for note in loaded.notes)
    with pytest.raises(LoadError, match=r"gone\.models\.Net is not here"):
        loaded.module(torch.zeros(1))


def test_checkpoints_carry_foreign_objects(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    extras = {
        "args": argparse.Namespace(lr=0.1),
        "where": Path("runs"),
        "when": dt.datetime(2020, 1, 1, tzinfo=dt.timezone.utc),
        "best": np.float64(0.5),
        "curve": np.zeros(3),
    }
    torch.save({"model": model.state_dict(), **extras}, tmp_path / "ck.pt")
    (tmp_path / "net.py").write_text(
        "from torch import nn\ndef make():\n    return nn.Sequential(nn.Conv2d(3, 4, 1))\n"
    )
    arch = f"{tmp_path}/net.py:make"
    with pytest.raises(LoadError):
        load(tmp_path / "ck.pt", arch=arch)
    loaded = load(tmp_path / "ck.pt", arch=arch, stand_ins=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.module.state_dict()[name], tensor)


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "builtins.eval",
        "builtins.getattr",
        "subprocess.Popen",
        "torch.load",
        "torch.jit._script.load",
        "importlib.import_module",
        "operator.attrgetter",
    ],
)
def test_a_stand_in_lets_no_name_through_that_runs_code(tmp_path: Path, name: str) -> None:
    called = tf.call(name, tf.text(f"touch {tmp_path}/marker"))
    tf.write_zip(tmp_path / "evil.pt", tf.pickled(tf.mapping((tf.text("a"), called))))
    with pytest.raises(LoadError, match=r"run code|does not know"):
        load(tmp_path / "evil.pt", stand_ins=True)
    assert not (tmp_path / "marker").exists()


def test_what_hides_a_method_of_a_stand_in_is_refused(tmp_path: Path) -> None:
    path = _net(tmp_path / "net.pt", forward=tf.name("torch.nn.functional.relu"))
    with pytest.raises(LoadError, match=r"hides the method Net\.forward"):
        load(path, stand_ins=True)


def test_a_stand_in_is_made_of_anything_and_keeps_only_its_state(tmp_path: Path) -> None:
    odd = tf.name("gone.Thing") + tf.tup(tf.number(1)) + tf.NEWOBJ
    odd += tf.mapping((tf.text("x"), tf.number(2))) + tf.BUILD
    weights = tf.mapping((tf.text("a"), tf.tensor(tf.storage())))
    held = tf.mapping((tf.text("state_dict"), weights), (tf.text("odd"), odd))
    tf.write_zip(tmp_path / "odd.pt", tf.pickled(held))
    with pytest.raises(LoadError, match="holds only weights"):
        load(tmp_path / "odd.pt", stand_ins=True)
