"""What is loaded is what was judged: whatever happens to the file, or to its name, in between."""

from __future__ import annotations

import io
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bntool.api import load
from bntool.core.errors import LoadError
from bntool.files.security.pinned import Pinned
from bntool.files.stored import open_stored
from tests.files import torch_files as tf


def test_pinned_bytes_stay_and_others_are_the_files() -> None:
    file = io.BytesIO(bytes(range(100)))
    pinned = Pinned(file)
    assert pinned.pin(10, 5) == pinned.pin(10, 5) == bytes(range(10, 15))
    assert pinned.pin(50, 10) == bytes(range(50, 60))
    file.getbuffer()[:] = bytes(100)
    expected = bytearray(100)
    expected[10:15], expected[50:60] = range(10, 15), range(50, 60)
    assert pinned.read() == bytes(expected)
    draw = random.Random(0)
    for _ in range(300):
        start, length = draw.randrange(110), draw.randrange(60)
        pinned.seek(start)
        assert pinned.read(length) == bytes(expected[start : start + length])
        assert pinned.tell() == min(start + length, max(start, 100))
    assert pinned.pin(10, 5) == bytes(range(10, 15))
    assert b"".join(pinned.chunks(8, 60)) == bytes(expected[8:68])


def test_it_is_as_long_as_it_was_opened() -> None:
    file = io.BytesIO(b"0123456789")
    pinned = Pinned(file)
    pinned.pin(2, 3)
    file.seek(0, io.SEEK_END)
    file.write(b"more")
    assert pinned.seek(0, io.SEEK_END) == 10
    pinned.seek(0)
    assert pinned.readall() == b"0123456789"
    file.truncate(7)
    pinned.seek(0)
    assert pinned.read(20) == b"0123456"
    assert pinned.pin(8, 0) == b""


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()


def _program(path: Path, net: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(net, (torch.zeros(1, 3, 8, 8),)), path)


def _script(path: Path, net: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(net, torch.zeros(1, 3, 8, 8)), path)


KINDS: dict[str, tuple[Callable[[Path, nn.Module], object], Any, str, str]] = {
    "module": (lambda p, net: torch.save(net, p), torch, "load", "data.pkl"),
    "program": (_program, torch.export, "load", "model.json"),
    "script": (_script, torch.jit, "load", "data.pkl"),
}


def _rename_over(path: Path, make: Callable[[Path, nn.Module], object]) -> None:
    make(path.with_name("other"), nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval())
    path.with_name("other").replace(path)


def _write_into(path: Path, start: int, length: int) -> None:
    with path.open("r+b") as file:
        file.seek(start)
        file.write(b"\xff" * length)


@pytest.mark.parametrize(
    "way", ["renamed-over", "deleted", "structure-written-into", "directory-written-into"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_swap_between_judging_and_loading_changes_nothing(
    kind: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, owner, name, structure = KINDS[kind]
    path, net, real = tmp_path / "net.pt", _net(), getattr(owner, name)
    make(path, net)
    content = path.read_bytes()
    swapped = []

    def swap_first(*args: Any, **kwargs: Any) -> Any:
        if not swapped:
            swapped.append(way)
            if way == "renamed-over":
                _rename_over(path, make)
            elif way == "deleted":
                path.unlink()
            elif way == "structure-written-into":
                _write_into(path, content.index(structure.encode()) - 20, 200)
            else:
                _write_into(path, len(content) - 600, 600)
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, swap_first)
    loaded = load(path).model if way != "deleted" else _loaded_without_hash(path, monkeypatch)
    assert swapped
    weights = loaded.state_dict() if isinstance(loaded, nn.Module) else loaded.state_dict
    for key, value in net.state_dict().items():
        assert torch.equal(dict(weights)[key], value), key


def _loaded_without_hash(path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    # The hash of the source is taken from the file by its name, afterwards.
    monkeypatch.setattr("bntool.files.loading.sha256_of", lambda path: "")
    return load(path).model


def test_the_older_format_is_loaded_from_the_judged_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "arch.py").write_text("from torch import nn\nmake = lambda: nn.Linear(2, 2)\n")
    path, net, real = tmp_path / "w.pt", nn.Linear(2, 2), torch.load
    torch.save(net.state_dict(), path, _use_new_zipfile_serialization=False)
    marker = tmp_path / "marker"

    def swap_first(*args: Any, **kwargs: Any) -> Any:
        tf.write_legacy(path, tf.pickled(tf.call("builtins.exec", tf.text(f"open({str(marker)!r}, 'w')"))))
        return real(*args, **{**kwargs, "weights_only": False})

    monkeypatch.setattr(torch, "load", swap_first)
    loaded = load(path, arch=f"{tmp_path / 'arch.py'}:make").module
    assert torch.equal(loaded.state_dict()["weight"], net.weight)
    assert not marker.exists()


def test_weights_read_one_at_a_time_are_those_of_the_judged_file(tmp_path: Path) -> None:
    path, weights = tmp_path / "w.pt", {"a": torch.arange(4.0), "b": torch.ones(2)}
    torch.save(weights, path)
    stored = open_stored(path)
    assert torch.equal(stored.read("a"), weights["a"])
    torch.save({"a": torch.zeros(4), "b": torch.ones(2)}, tmp_path / "other")
    (tmp_path / "other").replace(path)
    with pytest.raises(LoadError, match="has changed while it was read"):
        stored.read("b")
