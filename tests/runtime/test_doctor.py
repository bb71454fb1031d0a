from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from bntool.core.errors import DeviceError
from bntool.runtime import doctor
from bntool.runtime.doctor import Diagnosis, Row, diagnose


def rows(diagnosis: Diagnosis) -> dict[str, Row]:
    return {row.name: row for row in diagnosis.rows}


def test_this_machine_is_diagnosed_by_really_running():
    found = diagnose()
    by_name = rows(found)
    assert {
        "python",
        "torch",
        "cuda driver",
        "onnx",
        "onnx-ir",
        "onnxscript",
        "onnxruntime",
    } <= by_name.keys()
    assert by_name["CPU provider"].detail == "a convolution ran on CPUExecutionProvider"
    assert torch.__version__ in by_name["torch"].detail
    assert bool(found) is all(row.status != "fail" for row in found.rows)
    assert json.loads(json.dumps(found.to_dict()))["ok"] is bool(found)
    assert all(row.fix for row in found.rows if row.status != "ok")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_cuda_is_a_warning_with_its_reason():
    row = rows(diagnose())["CUDA provider"]
    assert row.status == "warn"
    assert row.detail not in ("", "listed, but not usable: ")
    assert row.fix


def _install(folder, name, size):
    """What pip leaves of a wheel that brings an `onnxruntime` module."""
    info = folder / f"{name.replace('-', '_')}-9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.9\n")
    library = "onnxruntime/capi/onnxruntime_pybind11_state.so"
    (info / "RECORD").write_text(f"onnxruntime/__init__.py,,\n{library},,{size}\n{info.name}/METADATA,,\n")


@pytest.mark.parametrize("size", [100, 200, 300])
def test_every_wheel_that_brings_the_module_is_told_and_which_one_won(monkeypatch, tmp_path, size):
    for name, own in (("onnxruntime-openvino", 100), ("ort-nightly", 200)):
        _install(tmp_path, name, own)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    library = tmp_path / "onnxruntime" / "capi" / "onnxruntime_pybind11_state.so"
    library.parent.mkdir(parents=True)
    library.write_bytes(bytes(size))
    ort = SimpleNamespace(__file__=str(tmp_path / "onnxruntime" / "__init__.py"), __version__="9.9")
    monkeypatch.setattr(doctor, "onnxruntime", lambda: ort)
    both, won = doctor._runtime_wheels()
    winner = {100: "onnxruntime-openvino", 200: "ort-nightly"}.get(size, "")
    assert (both.name, both.status, won.status) == ("onnxruntime wheels", "fail", "ok")
    assert "onnxruntime-openvino and ort-nightly are installed together" in both.detail
    assert both.detail.endswith(winner or "more than one")
    assert both.fix.endswith(f"pip install {winner or 'onnxruntime-gpu'}")
    assert (winner or "another build") in won.detail


def test_old_and_missing_packages_fail_with_their_fix(monkeypatch):
    versions = {"onnxscript": "0.5.6", "onnx": None}
    monkeypatch.setattr(doctor, "installed_version", lambda name: versions.get(name, "9.9"))
    by_name = rows(diagnose())
    assert by_name["onnxscript"].status == "fail"
    assert "0.5.7" in by_name["onnxscript"].fix
    assert by_name["onnx"].fix == "pip install onnx"


def test_no_onnxruntime_is_one_row_and_no_crash(monkeypatch):
    def missing() -> None:
        raise DeviceError("ONNX Runtime cannot be imported", next_step="pip install onnxruntime-gpu")

    monkeypatch.setattr(doctor, "onnxruntime", missing)
    by_name = rows(diagnose())
    assert by_name["onnxruntime"].status == "fail"
    assert "CPU provider" not in by_name


def test_a_cuda_that_is_listed_and_works_or_does_not(monkeypatch):
    monkeypatch.setattr(doctor, "why_no_cuda", lambda: "")
    assert rows(diagnose())["CUDA provider"].status == "ok"
    monkeypatch.setattr(doctor, "why_no_cuda", lambda: "libcublasLt.so.13 not found")
    assert "libcublasLt.so.13" in rows(diagnose())["CUDA provider"].detail


@pytest.mark.parametrize(
    ("text", "numbers"), [("2.14.1+cu130", (2, 14, 1)), ("0.5.7.dev1", (0, 5, 7)), ("3.12.0rc1", (3, 12, 0))]
)
def test_versions_are_read(text, numbers):
    assert doctor._numbers(text)[:3] == numbers


def test_it_prints_what_to_do():
    text = str(Diagnosis((Row("torch", "ok", "2.14"), Row("CUDA provider", "fail", "none", "install it"))))
    assert text.splitlines()[0].startswith("ok    torch")
    assert "fix: install it" in text


@pytest.mark.parametrize(
    ("driver", "status", "says"),
    [
        (None, "warn", "none found"),
        ((12, 8), "fail", "too old: it runs CUDA 12.8"),
        ((13, 0), "ok", "runs CUDA 13.0"),
        ((13, 2), "ok", "runs CUDA 13.2"),
    ],
)
def test_the_driver_is_held_against_what_is_needed(monkeypatch, driver, status, says):
    monkeypatch.setattr(doctor, "driver_cuda", lambda: driver)
    monkeypatch.setattr(doctor, "_runtime_cuda", lambda: (13, 0))
    found = {row.name: row for row in doctor._cuda("13.0")}
    row = found["cuda driver"]
    assert (row.status, row.detail.startswith(says)) == (status, True)
    assert "torch needs 13.0, onnxruntime needs 13.0" in row.detail
    assert ("580" in row.fix) is (status != "ok")
    assert ("torch on CUDA" in found) is (driver is not None)


def test_without_a_driver_no_package_mends_a_provider(monkeypatch):
    monkeypatch.setattr(doctor, "driver_cuda", lambda: None)
    monkeypatch.setattr(doctor, "onnxruntime", _Providers)
    monkeypatch.setattr(doctor, "why_no_cuda", lambda: "libcuda.so.1 not found")
    monkeypatch.setattr(doctor, "run_tiny_convolution", _no_convolution)
    found = {row.name: row for row in doctor._providers()}
    assert {found[name].fix for name in ("CUDA provider", "Tensorrt provider")} == {
        "the NVIDIA driver first, or use --device cpu"
    }
    assert found["CoreML provider"].fix == "pip install what it needs"
    monkeypatch.setattr(doctor, "driver_cuda", lambda: (13, 0))
    found = {row.name: row for row in doctor._providers()}
    assert found["CUDA provider"].fix == doctor.GPU_EXTRA
    assert found["Tensorrt provider"].fix == "pip install what it needs"


class _Providers:
    def get_available_providers(self) -> list[str]:
        return [f"{name}ExecutionProvider" for name in ("Tensorrt", "CUDA", "CoreML", "CPU")]


def _no_convolution(ort: object, device: str) -> str:
    raise DeviceError("no", where="a library is missing", next_step="pip install what it needs")


def test_two_versions_of_cuda_and_libraries_that_are_missing_or_old_are_told(monkeypatch):
    monkeypatch.setattr(doctor, "driver_cuda", lambda: None)
    monkeypatch.setattr(doctor, "_runtime_cuda", lambda: (12, 4))
    versions = {"nvidia-cuda-runtime": None, "nvidia-cudnn": "8.9.7"}
    monkeypatch.setattr(doctor, "wheel_version", lambda stem, major: versions[stem])
    found = {row.name: row for row in doctor._cuda("13.0")}
    assert found["cuda versions"].status == "warn"
    assert found["cuda libraries"].detail.startswith("CUDA 12 needed; no Python package")
    assert found["cudnn"].detail == "cuDNN 9 needed, 8.9.7 found"
    assert all(row.fix for row in found.values())
    monkeypatch.setattr(doctor, "_runtime_cuda", lambda: None)
    assert "CPU builds" in next(doctor._cuda(None)).detail


def test_a_convolution_in_torch_is_run_and_looked_at():
    class Torch:
        def __init__(self, result: object) -> None:
            self.nn = self.functional = self.cuda = self
            self._result = result

        def ones(self, *shape: int, device: str) -> None: ...

        def conv2d(self, *tensors: object) -> object:
            if isinstance(self._result, Exception):
                raise self._result
            return self._result

        def get_device_name(self, index: int) -> str:
            return "a card"

    assert doctor._torch_convolution(Torch(9.0)) == Row("torch on CUDA", "ok", "a convolution ran on a card")
    assert doctor._torch_convolution(Torch(8.0)).status == "fail"
    refused = doctor._torch_convolution(Torch(RuntimeError("no kernel image is available\nmore")))
    assert refused.detail == "no convolution runs: no kernel image is available"
    assert refused.fix


def test_versions_of_wheels_by_either_name(monkeypatch):
    from bntool.runtime import cuda_versions

    installed = {"nvidia-cudnn-cu13": "9.24.0", "nvidia-cuda-runtime": "13.0.96"}

    def version(name: str) -> str:
        if name not in installed:
            raise cuda_versions.importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(cuda_versions.importlib.metadata, "version", version)
    assert cuda_versions.wheel_version("nvidia-cudnn", 13) == "9.24.0"
    assert cuda_versions.wheel_version("nvidia-cuda-runtime", 13) == "13.0.96"
    assert cuda_versions.wheel_version("nvidia-cuda-runtime", 12) is None
    assert cuda_versions.built_for("13.0") == (13, 0)
    assert cuda_versions.built_for(None) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_every_provider_that_is_listed_gets_its_row():
    from bntool.runtime.providers import onnxruntime

    by_name = rows(diagnose())
    for name in onnxruntime().get_available_providers():
        row = by_name[f"{name.removesuffix('ExecutionProvider')} provider"]
        assert (row.status == "ok") is (name == "CPUExecutionProvider")
        assert bool(row.fix) is (row.status != "ok")
