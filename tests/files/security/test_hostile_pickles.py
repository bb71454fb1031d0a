"""No file of the corpus makes its marker; each is refused in bounded time, with one clear error."""

from __future__ import annotations

import collections
import contextlib
import io
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bntool.api import load
from bntool.cli import run
from bntool.core.errors import LoadError
from tests.files.security.hostile_pickles import ARMED, CORPUS, RELU, as_zip, later
from tests.files.torch_files import EMPTY_LIST, call, mapping, module, number, storage, tensor, text

pytest.importorskip("torchvision")


def test_the_corpus_covers_what_is_known() -> None:
    counts = collections.Counter(case.partition("/")[0] for case in CORPUS)
    assert sum(counts.values()) >= 150
    wanted = """direct network nested place opcode protocol attributes partial hooks hidden build stack
    archive legacy polyglot"""
    assert set(counts) == set(wanted.split())
    assert min(counts.values()) >= 10


@pytest.mark.parametrize("case", CORPUS)
def test_nothing_of_the_corpus_runs(case: str, tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "model.pt"
    CORPUS[case](path, marker)
    started = time.monotonic()
    with pytest.raises(LoadError) as caught:
        load(path)
    # The slowest takes a fraction of a second; a shared machine gets ample room.
    assert time.monotonic() - started < 20
    error = caught.value
    assert error.exit_code == 3
    assert "model.pt" in error.what + error.where
    assert "holds only weights" not in error.what
    assert "\n" not in error.what
    assert len(error.what) < 1500
    assert error.next_step
    assert str(error).replace("\n", "").isprintable()
    assert not marker.exists()


@pytest.mark.parametrize("case", ARMED)
def test_the_corpus_is_no_dud(case: str, tmp_path: Path) -> None:
    marker = tmp_path / "marker"

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, pid: Any, /) -> Any:
            return None

    with contextlib.suppress(Exception):
        Unpickler(io.BytesIO(ARMED[case](marker))).load()
    assert marker.exists()


@pytest.mark.parametrize("case", ["direct/os.system", "archive/cut-at-4", "hidden/forward", "polyglot/tar"])
@pytest.mark.parametrize("command", ["summary", "insert", "fold"])
def test_the_command_line_refuses_with_exit_code_3(
    case: str,
    command: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    marker, path = tmp_path / "marker", tmp_path / "model.pt"
    CORPUS[case](path, marker)
    assert run([command, str(path)]) == 3
    shown = capsys.readouterr()
    assert "Traceback" not in shown.out + shown.err
    assert shown.err.count("model.pt") >= 1
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "state") == ["model.pt"]


def test_what_looks_like_it_and_is_honest_loads(tmp_path: Path) -> None:
    norm = "torch.nn.modules.normalization.LayerNorm"
    pair = EMPTY_LIST + text("w") + b"a" + tensor(storage()) + b"a"
    body = module(
        RELU,
        ("norm_layer", later(norm, number(8), kwargs=mapping((text("eps"), number(1))))),
        ("from_python_2", call("collections.OrderedDict", EMPTY_LIST + pair + b"a")),
        ("counter", call("collections.Counter", mapping((text("a"), number(2))))),
        ("names", call("builtins.set", EMPTY_LIST + text("a") + b"a")),
    )
    model = load(as_zip(tmp_path / "model.pt", body)).module
    assert model.norm_layer().eps == 1
    assert torch.equal(model.from_python_2["w"], torch.zeros(4))
    assert (model.counter["a"], model.names) == (2, {"a"})


def test_recurrent_and_quantizable_models_load(tmp_path: Path) -> None:
    from torchvision.models.quantization import mobilenet_v2

    for model in (nn.GRU(3, 4, num_layers=2), mobilenet_v2(weights=None, quantize=False)):
        torch.save(model, tmp_path / "model.pt")
        assert load(tmp_path / "model.pt").module.state_dict().keys() == model.state_dict().keys()
