from __future__ import annotations

import gzip
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from safetensors.torch import save_file
from torch import nn

from bntool.core.errors import LoadError
from bntool.files.detect import Kind, detect
from tests.files.torch_files import write_members


def _script(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), path)


def _export(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),)), path)


def _onnx(path: Path) -> None:
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", value[:1], value[1:])
    onnx.save(helper.make_model(graph), path)


def _tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.add(__file__, "storages")


def _cut_zip(path: Path) -> None:
    torch.save(nn.Linear(2, 2), path)
    path.write_bytes(path.read_bytes()[:300])


MAKERS: dict[str, tuple[Callable[[Path], object], Kind]] = {
    "module": (lambda p: torch.save(nn.Linear(2, 2), p), Kind.TORCH_ZIP),
    "state-dict": (lambda p: torch.save(nn.Linear(2, 2).state_dict(), p), Kind.TORCH_ZIP),
    "legacy": (
        lambda p: torch.save(nn.Linear(2, 2), p, _use_new_zipfile_serialization=False), Kind.TORCH_LEGACY),
    "torchscript": (_script, Kind.TORCHSCRIPT),
    "pt2": (_export, Kind.PT2),
    "pt2-compiled": (
        lambda p: write_members(p, [("archive_format", b"pt2"), ("data/aotinductor/m.so", b"")]),
        Kind.PT2_AOTI),
    "safetensors": (lambda p: save_file({"w": torch.zeros(2)}, p), Kind.SAFETENSORS),
    "onnx": (_onnx, Kind.ONNX),
    "tar": (_tar, Kind.TAR),
    "empty": (lambda p: p.write_bytes(b""), Kind.EMPTY),
    "git-lfs": (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid x\n"), Kind.GIT_LFS),
    "html": (lambda p: p.write_text("\n<!DOCTYPE html><title>404</title>"), Kind.HTML),
    "gzip": (lambda p: p.write_bytes(gzip.compress(b"x")), Kind.GZIP),
    "npz": (lambda p: np.savez(p.open("wb"), a=np.zeros(2)), Kind.NPZ),
    "npy": (lambda p: np.save(p.open("wb"), np.zeros(2)), Kind.NPY),
    "gguf": (lambda p: p.write_bytes(b"GGUF" + bytes(60)), Kind.GGUF),
    "hdf5": (lambda p: p.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(60)), Kind.HDF5),
    "pickle": (lambda p: p.write_bytes(pickle.dumps({"a": 1})), Kind.PICKLE),
    "pickle-of-a-number": (lambda p: p.write_bytes(pickle.dumps(1 << 70, 2)), Kind.PICKLE),
    "one-byte": (lambda p: p.write_bytes(b"\x80"), Kind.PICKLE),
    "cut-zip": (_cut_zip, Kind.ZIP_DAMAGED),
    "other-zip": (lambda p: write_members(p, [("readme.txt", b"hello")]), Kind.ZIP_OTHER),
    "empty-zip": (lambda p: p.write_bytes(b"PK\x05\x06" + bytes(18)), Kind.ZIP_OTHER),
    "text": (lambda p: p.write_text("hello, wörld\n" * 900), Kind.TEXT),
    "noise": (lambda p: p.write_bytes(bytes(range(255, 100, -1))), Kind.UNKNOWN),
    "cut-safetensors": (lambda p: p.write_bytes(struct.pack("<Q", 500) + b'{"a":'), Kind.SAFETENSORS),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("case", MAKERS)
def test_kind_by_content_whatever_the_name(case: str, tmp_path: Path) -> None:
    make, kind = MAKERS[case]
    path = tmp_path / "file.bin"
    make(path)
    found = detect(path)
    assert found.kind is kind
    assert found.description
    loads = kind in (Kind.TORCH_ZIP, Kind.TORCH_LEGACY, Kind.SAFETENSORS)
    assert bool(found.next_step) is not loads


def test_what_is_no_file_is_a_load_error(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, words in (
        (tmp_path, "folder"),
        (tmp_path / "none.pt", "no such"),
        (tmp_path / "pipe", "regular"),
    ):
        with pytest.raises(LoadError, match=words) as caught:
            detect(path)
        assert caught.value.next_step


def test_an_onnx_cut_short_is_not_onnx(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    _onnx(path)
    path.write_bytes(path.read_bytes()[:-5])
    assert detect(path).kind is not Kind.ONNX


def test_no_torch_is_imported_for_what_needs_none() -> None:
    code = (
        "import sys, bntool.files, bntool.files.detect, bntool.files.atomic, bntool.files.sidecar, "
        "bntool.files.memory; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
