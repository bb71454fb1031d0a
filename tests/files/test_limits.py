"""Files that ask for more than they should: refused by one bound, in little time and memory."""

from __future__ import annotations

import json
import resource
import struct
import time
from pathlib import Path

import pytest
import torch

from bntool.api import load
from bntool.core.errors import LoadError, UsageError
from bntool.core.limits import DEFAULT_MAX_SIZE, Limit, parse_size
from tests.files import torch_files as tf

SECONDS = 5.0
BYTES = 300 << 20


def _many_tensors(path: Path, count: int) -> Path:
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    raw = json.dumps({f"tensor_number_{i}": entry for i in range(count)}).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw)
    return path


def _sparse(path: Path, size: int) -> Path:
    """A file of one tensor that claims `size` bytes and takes no block of the disk for them."""
    raw = json.dumps({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + size)
    return path


def _refused(path: Path, max_size: int = DEFAULT_MAX_SIZE) -> str:
    """What `load` says, after making sure that it took little time and little memory."""
    before, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(LoadError) as caught:
        load(path, max_size=max_size)
    assert time.process_time() - before < SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024 < BYTES
    return str(caught.value)


def test_three_hundred_thousand_tensors(tmp_path: Path) -> None:
    said = _refused(_many_tensors(tmp_path / "many.safetensors", 300_000))
    assert "too large" in said
    assert "--max-size" in said


def test_a_file_larger_than_the_bound_and_a_bound_raised(tmp_path: Path) -> None:
    path = _sparse(tmp_path / "huge.safetensors", 20 << 30)
    assert "20.0 GiB of tensors" in _refused(path)
    path = _sparse(tmp_path / "small.safetensors", 1 << 20)
    assert "1.0 MiB of tensors" in _refused(path, max_size=1 << 20)
    with pytest.raises(LoadError, match="holds only weights"):
        load(path, max_size=4 << 20)


def test_a_header_that_claims_gigabytes(tmp_path: Path) -> None:
    path = tmp_path / "header.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 90_000_000) + b"{")
        file.truncate(100_000_000)
    assert "of structure" in _refused(path)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_of_endless_lists(tmp_path: Path, legacy: bool) -> None:
    structure = tf.pickled(tf.EMPTY_LIST * (1 << 21), tf.NONE)
    path = tmp_path / "lists.pt"
    if legacy:
        tf.write_legacy(path, structure)
    else:
        tf.write_zip(path, structure)
    assert "of structure" in _refused(path, max_size=256 << 20)


def test_storages_that_add_up_to_more_than_the_bound(tmp_path: Path) -> None:
    torch.save({str(i): torch.zeros(1 << 18) for i in range(4)}, tmp_path / "sum.pt")
    assert "4.0 MiB of tensors" in _refused(tmp_path / "sum.pt", max_size=4 << 20)


def test_a_program_whose_graph_is_larger_than_the_bound(tmp_path: Path) -> None:
    program = torch.export.export(torch.nn.Linear(3, 2), (torch.zeros(1, 3),))
    torch.export.save(program, tmp_path / "net.pt2")
    assert "of structure" in _refused(tmp_path / "net.pt2", max_size=64 << 10)
    assert load(tmp_path / "net.pt2", max_size=64 << 20).kind == "program"


def test_strides_that_claim_terabytes(tmp_path: Path) -> None:
    wide = tf.tensor(tf.storage(), (1 << 20, 1 << 20), (0, 0))
    path = tf.write_zip(tmp_path / "wide.pt", tf.pickled(tf.mapping((tf.text("a"), wide))))
    assert "makes a tensor of 4398046511104 bytes from 16 bytes of data" in _refused(path)


def test_many_views_that_are_each_allowed(tmp_path: Path) -> None:
    views = [(tf.text(str(i)), tf.tensor(tf.storage(), (1 << 25,), (0,))) for i in range(9)]
    few = tf.write_zip(tmp_path / "few.pt", tf.pickled(tf.mapping(*views[:8])))
    assert "tensors of" not in _refused(few)
    many = tf.write_zip(tmp_path / "many.pt", tf.pickled(tf.mapping(*views)))
    assert "makes tensors of over 1073741824 bytes from far fewer bytes of data" in _refused(many)


def test_a_zip_directory_that_fills_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "directory.pt"
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 1 << 30, 4, 0)
    with path.open("wb") as file:
        file.write(b"PK\x03\x04")
        file.truncate(4 + (1 << 30))
        file.seek(0, 2)
        file.write(end)
    assert "directory" in _refused(path)


def test_an_honest_file_is_far_from_the_bound(tmp_path: Path) -> None:
    torch.save({f"layer{i}.weight": torch.zeros(8, 8) for i in range(500)}, tmp_path / "net.pt")
    with pytest.raises(LoadError, match="holds only weights"):
        load(tmp_path / "net.pt", max_size=64 << 20)


def test_sizes_are_written_as_people_write_them() -> None:
    sizes = {"40G": 40 << 30, "512 MiB": 512 << 20, "1.5tb": 3 << 39, "1000": 1000, "2k": 2048}
    assert {text: parse_size(text) for text in sizes} == sizes
    for text in ("", "0", "-1G", "G", "1P", "1e3", "nan"):
        with pytest.raises(UsageError):
            parse_size(text)


def test_the_cost_counts_data_tensors_and_structure() -> None:
    limit = Limit(1 << 20)
    limit.require("x", data=1 << 20, where="")
    limit.require("x", tensors=16, where="")
    limit.require("x", structure=4096, where="")
    for cost in ({"data": (1 << 20) + 1}, {"tensors": 17}, {"structure": 4097}):
        with pytest.raises(LoadError, match="too large"):
            limit.require("x", **cost, where="")
