from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bntool.runtime.libraries import CUDA, TENSORRT
from tools.measures import gpu_check, gpu_rows
from tools.measures.gpu_page import page

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_exits_5_and_writes_nothing():
    files = [ROOT / "docs" / name for name in ("gpu.md", "gpu.json")]
    before = [f.read_bytes() if f.exists() else None for f in files]
    done = subprocess.run(
        [sys.executable, "-m", "tools.measures.gpu_check", "--require-gpu"],
        capture_output=True, text=True, cwd=ROOT, check=False, env={"PYTHONPATH": str(ROOT), "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 5, done.stderr
    assert done.stderr.startswith("a GPU was promised, and there is none: torch cannot use CUDA")
    assert [f.read_bytes() if f.exists() else None for f in files] == before


def test_a_rehearsal_walks_one_network_and_claims_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "facts", lambda: {"torch": "as it is"})
    monkeypatch.setattr(gpu_check, "PRECISIONS", ("fp32",))
    assert gpu_check.main(["--rehearse", "--to", str(tmp_path), "sample"]) == 0
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert [row["status"] for row in record["rows"]] == ["rehearsed"] * 3
    assert {row["check"]["device"] for row in record["rows"]} == {"cpu"}
    assert {r["device"] for row in record["rows"] for r in row["latency"]} == {"cpu"}
    text = (tmp_path / "gpu.md").read_text()
    assert text.startswith("# Rehearsal on the CPU: no figure here is of a GPU")
    assert "passed" not in text


@pytest.mark.parametrize("words", [["--rehearse"], ["--rehearse", "--to", str(gpu_check.DOCS)], ["resnet51"],
                                   ["--rehearse", "--to", "x", "--require-gpu"]])  # fmt: skip
def test_what_makes_no_sense_is_refused(words, capsys):
    with pytest.raises(SystemExit) as stop:
        gpu_check.main(words)
    assert stop.value.code == 2
    assert capsys.readouterr().err


class OnCuda:
    """Stands for `OrtRunner` on CUDA that leaves some nodes on the CPU."""

    provider, nodes = CUDA, {CUDA: 5, "CPUExecutionProvider": 1}
    cpu_nodes: tuple[str, ...] = ("Shape Shape_1",)

    def __init__(self, path, device, *, tf32) -> None: ...


def test_the_cpu_may_keep_shapes_and_compute_nothing(monkeypatch):
    case = object.__new__(gpu_rows.Case)
    case.precision, case.files = "fp32", {"after": Path("m.onnx")}
    monkeypatch.setattr(gpu_rows, "OrtRunner", OnCuda)
    assert case._nodes(CUDA) == OnCuda.nodes
    for stray in ("Relu act", "Add sum", "MaxPool pool"):
        monkeypatch.setattr(OnCuda, "cpu_nodes", ("Shape Shape_1", stray))
        with pytest.raises(gpu_rows.DeviceError, match=f"every compute node: {stray}"):
            case._nodes(CUDA)


def record(**row):
    base = {"net": "n", "precision": "fp32", "runtime": "ORT CUDA", "status": "passed", "why": ""}
    tests = {"tests": 3, "failed": [], "skipped": [], "why": ""}
    return {"rehearsal": False, "date": "2026-01-01", "facts": {}, "tests": tests, "rows": [{**base, **row}]}


def test_what_is_a_fault():
    assert gpu_check.faults(record(), required=True) == []
    assert gpu_check.faults(record(status="failed", why="w"), required=False) == ["n fp32 on ORT CUDA: w"]
    lacking = record(status="impossible", why="no torchvision")
    assert gpu_check.faults(lacking, required=False) == []
    assert gpu_check.faults(lacking, required=True) == ["n fp32 on ORT CUDA was impossible: no torchvision"]
    assert gpu_check.faults(record(status="impossible", runtime="ORT TensorRT"), required=True) == []
    for key, value in (("skipped", ["a"]), ("why", "no module named pytest"), ("tests", 0)):
        skipping = record()
        skipping["tests"][key] = value
        assert gpu_check.faults(skipping, required=False) == []
        assert len(gpu_check.faults(skipping, required=True)) == 1
    failing = record()
    failing["tests"]["failed"] = ["a"]
    assert gpu_check.faults(failing, required=False) == ["test a failed"]


def test_a_process_that_dies_or_hangs_costs_its_own_rows(monkeypatch):
    done = json.dumps({"runtime": "torch CUDA", "status": "passed", "why": ""})
    monkeypatch.setattr(
        gpu_check, "_run", lambda words, limit: (-11, f"{done}\nCUDA error: illegal address\n")
    )
    rows = gpu_check.run_rows("n", "fp32", "gpu", 1)
    assert [row["status"] for row in rows] == ["passed", "failed", "failed"]
    assert rows[1]["why"] == "the process ended with -11: CUDA error: illegal address"
    monkeypatch.setattr(gpu_check, "_run", lambda words, limit: (None, ""))
    assert {row["why"] for row in gpu_check.run_rows("n", "fp32", "gpu", 1)} == {"it took too long"}


def test_a_missing_package_is_impossible_and_tensorrt_is_wanted_only_where_it_is(monkeypatch):
    def lacking(*args: object) -> None:
        raise ImportError("No module named 'torchvision'")

    monkeypatch.setattr(gpu_rows, "Case", lacking)
    rows = list(gpu_rows.rows("resnet50", "fp32", rehearse=False))
    assert {(row["status"], row["why"]) for row in rows} == {
        ("impossible", "ImportError: No module named 'torchvision'")
    }

    class Refusing:
        def __init__(self, error: Exception) -> None:
            self._error = error

        def row(self, runtime: str) -> None:
            raise self._error

    absent = gpu_rows.DeviceError(f"{TENSORRT} was asked for", where="libnvinfer.so.10 not found: "
                                  "TensorRT 10 is not installed")  # fmt: skip
    assert gpu_rows._told(Refusing(absent), "ORT TensorRT")["status"] == "impossible"
    assert gpu_rows._told(Refusing(absent), "ORT CUDA")["status"] == "failed"
    assert gpu_rows._told(Refusing(RuntimeError("CUDA error")), "torch CUDA")["status"] == "failed"


def test_the_report_of_the_tests_is_read(tmp_path):
    report = tmp_path / "r.xml"
    report.write_text('<testsuites><testsuite><testcase name="a"/><testcase name="b"><skipped/></testcase>'
                      '<testcase name="c"><failure/></testcase></testsuite></testsuites>')  # fmt: skip
    assert gpu_check.read_report(report) == {"tests": 3, "failed": ["c"], "skipped": ["b"], "why": ""}


def test_a_promised_gpu_that_is_not_there_fails_the_tests(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    found = gpu_check.run_tests(120)
    assert found["tests"] >= 8
    assert found["skipped"] == []
    assert found["failed"]


def test_rows_of_the_same_machine_are_kept(tmp_path):
    place = tmp_path / "gpu.json"
    assert gpu_check.kept(place, {}, []) == []
    place.write_text(json.dumps(record()))
    assert len(gpu_check.kept(place, {}, ["other"])) == 1
    assert gpu_check.kept(place, {}, ["n"]) == []
    assert gpu_check.kept(place, {"torch": "another"}, []) == []


def test_the_page_names_what_did_not_pass():
    text = page(record(status="impossible", why="no torchvision"))
    assert text.startswith("# Measured on a GPU")
    assert "- n fp32 on ORT CUDA, impossible: no torchvision" in text
    assert all(line.count("|") == 12 for line in text.splitlines() if line.startswith("|"))
