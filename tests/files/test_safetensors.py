"""Safetensors by their headers, in one file and in several, read and written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bntool.api import load
from bntool.core.errors import LoadError, UsageError
from bntool.files.safetensors_files import layout, read_header, read_index, torch_name, write_safetensors
from bntool.files.saving import save_model

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
    torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64,
    torch.uint16, torch.uint32, torch.uint64,
]  # fmt: skip


def _tensors() -> dict[str, Tensor]:
    made = {str(d): torch.arange(6).reshape(2, 3).to(d) for d in DTYPES}
    return {**made, "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), 'ä"\\': torch.ones(1)}


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def test_the_header_says_what_the_library_wrote(tmp_path: Path) -> None:
    tensors = _tensors()
    save_file(tensors, tmp_path / "a.safetensors", {"format": "pt", "author": "me"})
    header = read_header(tmp_path / "a.safetensors")
    assert header.metadata == {"format": "pt", "author": "me"}
    assert header.entries.keys() == tensors.keys()
    for name, tensor in tensors.items():
        read = header.read(name)
        assert read.dtype == tensor.dtype and read.shape == tensor.shape
        assert torch.equal(_bytes(read), _bytes(tensor))


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    tensors = _tensors()
    entries = layout((n, torch_name(t), tuple(t.shape)) for n, t in tensors.items())
    write_safetensors(tmp_path / "b.safetensors", entries, {"k": "v"}, tensors.values())
    read = load_file(tmp_path / "b.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape
        assert torch.equal(_bytes(read[name]), _bytes(tensor))
    header = read_header(tmp_path / "b.safetensors")
    assert header.metadata == {"k": "v"}


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A network of two convolutions in two files, and the module that makes it."""
    (tmp_path / "net.py").write_text(
        "from torch.nn import *\ndef make():\n    return Sequential(Conv2d(3, 4, 1), Conv2d(4, 2, 1))\n"
    )
    torch.manual_seed(0)
    state = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)).state_dict()
    places = {}
    for i in (0, 1):
        name = f"model-0000{i + 1}-of-00002.safetensors"
        part = {n: t for n, t in state.items() if n.startswith(str(i))}
        save_file(part, tmp_path / name, {"format": "pt"})
        places |= dict.fromkeys(part, name)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 104, "by": "me"}, "weight_map": places}))
    return index


def test_a_sharded_model_goes_in_and_out(sharded: Path, tmp_path: Path) -> None:
    loaded = load(sharded, arch=f"{tmp_path}/net.py:make")
    assert loaded.kind == "safetensors"
    with torch.no_grad():
        loaded.module[1].bias.fill_(7)
    out = tmp_path / "out.safetensors.index.json"
    digest = save_model(loaded, loaded.model, out)
    index = read_index(out)
    assert index.metadata == {"total_size": 104, "by": "me"}
    assert [len(h.entries) for h in index.shards.values()] == [2, 2]
    again = load(out, arch=f"{tmp_path}/net.py:make")
    for name, tensor in loaded.module.state_dict().items():
        assert torch.equal(again.module.state_dict()[name], tensor)
    assert again.source_hash == digest
    # The same model has the same bytes under the same names.
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    save_model(loaded, loaded.model, out, force=True)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before


def test_replaced_shards_go_and_others_stay(sharded: Path, tmp_path: Path) -> None:
    loaded = load(sharded, arch=f"{tmp_path}/net.py:make")
    out = tmp_path / "out.safetensors.index.json"
    save_model(loaded, loaded.model, out)
    first = set(read_index(out).shards)
    with torch.no_grad():
        loaded.module[1].bias.fill_(7)
    with pytest.raises(UsageError, match="exists already"):
        save_model(loaded, loaded.model, out)
    save_model(loaded, loaded.model, out, force=True)
    second = set(read_index(out).shards)
    assert len(first & second) == 1  # the file of the layer that did not change
    on_disk = {p.name for p in tmp_path.glob("out-*")}
    assert on_disk == second
    assert not list(tmp_path.glob(".*"))
    assert read_index(sharded).shards.keys() == {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}


def test_the_input_itself_is_never_replaced(sharded: Path, tmp_path: Path) -> None:
    loaded = load(sharded, arch=f"{tmp_path}/net.py:make")
    with pytest.raises(UsageError, match="is the input itself"):
        save_model(loaded, loaded.model, sharded, force=True)
    with pytest.raises(UsageError, match="under the name of its index"):
        save_model(loaded, loaded.model, tmp_path / "one.safetensors")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m.update({"0.bias": "../up.safetensors"}), "outside its folder"),
        (lambda m: m.update({"0.bias": "/etc/passwd"}), "outside its folder"),
        (lambda m: m.update({"0.bias": "gone.safetensors"}), "not there"),
        (lambda m: m.update({"0.bias": m["1.bias"]}), "not in the file that the index names"),
        (lambda m: m.update({"more": m["1.bias"]}), "not in the file that the index names"),
        (lambda m: m.pop("0.bias"), "not in the file that the index names"),
        (lambda m: m.update({"0.bias": 3}), "does not name a file"),
        (lambda m: m.clear(), "does not name a file"),
    ],
)
def test_an_index_that_lies(sharded: Path, change, says: str) -> None:
    document = json.loads(sharded.read_text())
    change(document["weight_map"])
    sharded.write_text(json.dumps(document))
    with pytest.raises(LoadError, match=says):
        load(sharded, arch="torchvision:resnet18")
