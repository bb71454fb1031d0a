from __future__ import annotations

import dataclasses
import json
import os
import stat
import sys
from pathlib import Path

import pytest

from bntool.core.errors import LoadError, UsageError
from bntool.files.atomic import sha256_of
from bntool.files.memory import Grant, Record, last_output, recall, remember


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.fixture
def work(tmp_path: Path) -> Path:
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def _record(work: Path) -> Record:
    output, source = work / "m_bn.pt", work / "m.pt"
    output.write_bytes(b"out")
    source.write_bytes(b"in")
    return Record(
        "insert", str(output), sha256_of(output), str(source), sha256_of(source), arch="torchvision:vgg11",
        allow=("pkg.Net",), trust_pickle=True, input_shapes=("1x3x32x32",),
    )  # fmt: skip


def test_a_record_comes_back_and_lies_outside_the_folder(state: Path, work: Path) -> None:
    record = _record(work)
    assert remember(work, record) is None
    assert recall(work) == record
    assert last_output(work) == record
    assert sorted(p.name for p in work.iterdir()) == ["m.pt", "m_bn.pt"]
    (kept,) = state.rglob("*.json")
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    later = dataclasses.replace(record, command="fold")
    assert remember(work, later) is None
    assert recall(work) == later


def test_a_folder_is_known_by_its_real_path(state: Path, work: Path) -> None:
    (work.parent / "alias").symlink_to(work)
    remember(work.parent / "alias", _record(work))
    assert recall(work) is not None
    assert recall(work.parent) is None


def test_no_record_or_no_file_asks_for_a_model(state: Path, work: Path) -> None:
    with pytest.raises(UsageError, match="no MODEL given") as caught:
        last_output(work)
    assert "name a MODEL" in caught.value.next_step
    assert caught.value.exit_code == 2
    remember(work, _record(work))
    (work / "m_bn.pt").unlink()
    with pytest.raises(UsageError, match="is gone"):
        last_output(work)


def test_grants_hold_only_for_the_very_files(state: Path, work: Path) -> None:
    record = _record(work)
    output, source = work / "m_bn.pt", work / "m.pt"
    assert record.granted(output) == Grant(("pkg.Net",), True)
    assert record.granted(source) == Grant(("pkg.Net",), False)
    (work / "copy.pt").write_bytes(b"out")
    assert record.granted(work / "copy.pt") == Grant()
    output.write_bytes(b"swapped by a stranger")
    source.write_bytes(b"swapped too")
    assert record.granted(output) == record.granted(source) == record.granted(work / "none") == Grant()
    assert Record("insert", "torchvision:x", "").granted("torchvision:x") == Grant()


def test_a_relative_state_folder_is_ignored(
    work: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(work)
    monkeypatch.setenv("XDG_STATE_HOME", "state")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert remember(work, _record(work)) is None
    assert not (work / "state").exists()
    assert list((tmp_path / "home" / ".local" / "state" / "bntool" / "folders").iterdir())


def test_a_state_folder_that_cannot_be_written_is_only_a_note(state: Path, work: Path) -> None:
    state.write_text("a file where the folder should be")
    note = remember(work, _record(work))
    assert note is not None
    assert "MODEL" in note
    assert recall(work) is None


@pytest.mark.parametrize("damage", ["", "[]", "{}", '{"schema_version": 1}', '{"schema_version": 2}', "\x00"])
def test_a_damaged_record_counts_as_none(damage: str, state: Path, work: Path) -> None:
    remember(work, _record(work))
    (kept,) = state.rglob("*.json")
    kept.write_text(damage)
    assert recall(work) is None
    with pytest.raises(LoadError, match="record of this folder is damaged") as caught:
        last_output(work)
    assert str(kept) in caught.value.where
    assert caught.value.next_step == "name a MODEL"


@pytest.mark.parametrize(
    ("change", "place"),
    [({"output": 3}, "output"), ({"allow": "pkg.Net"}, "allow"), ({"allow": [1]}, "allow[0]"),
     ({"trust_pickle": 1}, "trust_pickle"), ({"trust_pickle": "yes"}, "trust_pickle"), ({"key": []}, "key")],
)  # fmt: skip
def test_a_record_is_damaged_at_a_place(
    change: dict[str, object], place: str, state: Path, work: Path
) -> None:
    remember(work, _record(work))
    (kept,) = state.rglob("*.json")
    kept.write_text(json.dumps({"schema_version": 1, **dataclasses.asdict(_record(work)), **change}))
    assert recall(work) is None
    with pytest.raises(LoadError) as caught:
        last_output(work)
    assert caught.value.where == f"{kept}, {place}"
    assert caught.value.exit_code == 3


@pytest.mark.skipif(os.name == "nt" or sys.platform == "darwin", reason="names there are Unicode")
def test_a_record_holds_names_that_are_not_utf_8(state: Path, work: Path) -> None:
    record = dataclasses.replace(_record(work), source=os.fsdecode(b"/tmp/\xff.pt"))
    assert remember(work, record) is None
    assert recall(work) == record
