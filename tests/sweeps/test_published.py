"""Published ONNX files: how they are taken out of packages, and what the record of them shows."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from pathlib import Path

from tools.sweeps import published

CONTENT = bytes(2000)
ROWS = [
    json.loads(line) for line in (published.ROOT / "docs" / "published.jsonl").read_text("utf-8").splitlines()
]


def test_only_onnx_files_are_taken_out_of_an_archive(tmp_path: Path) -> None:
    names = {"p/a.onnx": CONTENT, "p/pointer.onnx": b"version https", "p/__init__.py": CONTENT}
    wheel, source = tmp_path / "p-1-py3-none-any.whl", tmp_path / "p-1.tar.gz"
    with zipfile.ZipFile(wheel, "w") as held:
        for name, content in names.items():
            held.writestr(name, content)
    with tarfile.open(source, "w:gz") as held:
        for name, content in names.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            held.addfile(info, io.BytesIO(content))
    for archive in (wheel, source):
        assert list(published.members(archive)) == [("p/a.onnx", CONTENT)]


def test_a_verdict_that_is_none_is_told_with_its_reason() -> None:
    row = {"status": "ok", "nodes": 3, "summary": {"code": 0, "seconds": 0.1, "layers": 2}}
    row["fold"] = {
        "code": 10,
        "seconds": 1.0,
        "bn": 2,
        "left": 1,
        "error": 1e-3,
        "why": "nothing",
        "kept": ["x"],
    }
    row["insert"] = {"code": 4, "seconds": 1.0, "sites": 0, "why": "no place"}
    row["verify"] = {"code": 3, "seconds": 1.0, "why": "cut"}
    text = published.page({"p==1 p/a.onnx": row, "p==1 b.onnx": {"status": "time limit"}})
    assert (
        "| p==1 | a.onnx | 3 | 2 | 1 | undecided | 1.0e-03 | 0 | nothing to do | exit 3 | 2 | 1.0 |" in text
    )
    assert "- a.onnx (p==1), fold: nothing" in text
    assert "- a.onnx (p==1), kept: x" in text
    assert "- p==1 b.onnx: time limit" in text
    assert "no place" not in text


def test_the_record_is_of_the_packages_that_are_listed_and_no_fold_in_it_is_wrong() -> None:
    assert {row["model"].partition(" ")[0] for row in ROWS} == set(published.packages())
    assert len(ROWS) >= 12
    for row in ROWS:
        assert row["status"] == "ok", row
        assert row["fold"]["code"] in (0, 4, 10), row
        assert row["insert"]["code"] in (0, 4, 10), row
        assert row["summary"]["code"] == 0, row
