"""Arrays of numbers come out as they were saved, whatever the file is called; anything else is one error."""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from bntool.core.errors import LoadError, UsageError
from bntool.data.arrays import arrays_in, tensor_of

ARRAYS = {
    "float32": np.linspace(0, 1, 24, dtype=np.float32).reshape(2, 3, 4),
    "big-endian": np.linspace(0, 1, 24).reshape(2, 3, 4).astype(">f4"),
    "big-endian-integers": np.arange(6).astype(">i8"),
    "big-endian-complex": np.arange(6).astype(">c16"),
    "fortran": np.asfortranarray(np.arange(24.0).reshape(4, 6)),
    "empty": np.zeros((0, 3, 8)),
    "scalar": np.array(3.0),
    "bool": np.array([True, False]),
    "text": np.array(["a", "bc"]),
}


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize(
    "file", ["a.npy", "a.npz", "packed.npz", "npz-called.npy", "npy-called.npz", "a.dat"]
)
def test_arrays_come_back_in_this_machines_byte_order(name: str, file: str, tmp_path: Path) -> None:
    array, path = ARRAYS[name], tmp_path / file
    with path.open("wb") as opened:
        if file in ("a.npy", "npy-called.npz", "a.dat"):
            np.save(opened, array)
        else:
            (np.savez_compressed if file == "packed.npz" else np.savez)(opened, input=array)
    (found,) = arrays_in(path).values()
    assert found.dtype.isnative
    assert found.dtype == array.dtype.newbyteorder("=")
    assert found.shape == array.shape
    assert np.array_equal(found, array)
    if name != "text":
        assert tensor_of(found, file).tolist() == array.tolist()


def test_a_large_array_is_mapped_and_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large.npy"
    np.lib.format.open_memmap(path, "w+", np.float32, (1 << 20, 1 << 12)).flush()
    assert path.stat().st_size > 16 << 30
    assert isinstance(arrays_in(path)["input"], np.memmap)


def _npy(
    shape: str = "(2,)", dtype: str = "'<f4'", data: bytes = bytes(8), version: bytes = b"\1\0"
) -> bytes:
    text = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY" + version + struct.pack("<H" if version[0] == 1 else "<L", len(text)) + text + data


OBJECTS = io.BytesIO()
np.save(OBJECTS, np.array([{"a": 1}]), allow_pickle=True)
BAD = {
    "terabytes": (_npy("(1099511627776,)"), "says that it holds 4.0 TiB"),
    "past-all-numbers": (_npy("(4611686018427387904, 16)"), "says that it holds"),
    "one-more": (_npy("(3,)"), "says that it holds 12 B, and holds 8 B"),
    "one-less": (_npy("(1,)"), "and holds 8 B"),
    "negative": (_npy("(-2,)"), "a size that is none"),
    "negative-twice": (_npy("(-1, -2)"), "a size that is none"),
    "nothing-in-each": (_npy("(1000000000000,)", "'|S0'", b""), "a size that is none"),
    "objects": (OBJECTS.getvalue(), "Python objects"),
    "objects-inside": (_npy("(1,)", "[('a', '<f4'), ('b', '|O')]", bytes(12)), "Python objects"),
    "long-header": (_npy("(2,)" + " " * 20_000), "cannot read data"),
    "header-past-the-end": (b"\x93NUMPY\2\0" + struct.pack("<L", (1 << 32) - 1) + b"{", "cannot read data"),
    "deep-header": (_npy("(" * 5_000 + "2" + ",)" * 1_900), "cannot read data"),
    "no-shape": (_npy("'a'"), "cannot read data"),
    "no-type": (_npy(dtype="'nonsense'"), "cannot read data"),
    "code-in-the-header": (_npy("(__import__('os').system('true'),)"), "cannot read data"),
    "names-in-utf-8": (_npy(version=b"\3\0"), "version 3"),
    "cut": (_npy()[:20], "cannot read data"),
}


@pytest.mark.filterwarnings("ignore:Reading `.npy`:UserWarning")
@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("packed", [None, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_what_is_no_array_of_numbers_is_one_error(case: str, packed: int | None, tmp_path: Path) -> None:
    content, says = BAD[case]
    path = tmp_path / "x.npy"
    if packed is None:
        path.write_bytes(content)
    else:
        with zipfile.ZipFile(path, "w", packed) as archive:
            archive.writestr("x.npy", content)
    with pytest.raises(LoadError) as caught:
        arrays_in(path)
    assert caught.value.what.startswith("cannot read data from x.npy: ")
    assert says in caught.value.what
    assert caught.value.next_step
    assert "\n" not in caught.value.what


def test_an_archive_that_unpacks_to_more_than_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez_compressed(tmp_path / "x.npz", a=np.zeros(1 << 16))
    np.savez(tmp_path / "y.npz", a=np.zeros(1 << 16))
    np.save(tmp_path / "z.npy", np.zeros(1 << 16, ">f8"))
    monkeypatch.setattr("bntool.files.numpy_files.DEFAULT_MAX_SIZE", 1 << 18)
    assert arrays_in(tmp_path / "y.npz")["a"].shape == (1 << 16,)
    for name, why in (("x.npz", "to be unpacked"), ("z.npy", "byte order")):
        with pytest.raises(LoadError, match=f"it needs 512.. KiB .*{why}, and 256.0 KiB are allowed"):
            arrays_in(tmp_path / name)


def test_files_of_tensors_hold_tensors_alone(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(2), "n": 3}, tmp_path / "x.data")
    assert arrays_in(tmp_path / "x.data")["x"].tolist() == [1, 1]
    torch.save([torch.ones(2)], tmp_path / "list.pt", _use_new_zipfile_serialization=False)
    assert list(arrays_in(tmp_path / "list.pt")) == ["0"]
    torch.save(nn.Linear(1, 1), tmp_path / "net.pt")
    with pytest.raises(LoadError, match="it holds a Linear, and no tensors"):
        arrays_in(tmp_path / "net.pt")
    with pytest.raises(UsageError, match="of type <U2"):
        tensor_of(ARRAYS["text"], "x.npy")
