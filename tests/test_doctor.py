from __future__ import annotations

import json

import pytest
import torch

from bntool import doctor
from bntool.doctor import Diagnosis, Row, diagnose
from bntool.errors import DeviceError


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


def test_both_wheels_at_once_are_a_failure(monkeypatch):
    monkeypatch.setattr(doctor, "installed_version", lambda name: "9.9.9")
    found = diagnose()
    row = rows(found)["onnxruntime wheels"]
    assert row.status == "fail"
    assert "pip uninstall" in row.fix
    assert not found


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
