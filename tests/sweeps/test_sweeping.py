"""The file of results that every sweep shares."""

from __future__ import annotations

from pathlib import Path

from tools.sweeps.sweeping import Results, not_ok


def test_a_sweep_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    results = Results(path)
    for name in results.missing("ab", minutes=1):
        results.add({"model": name, "status": "ok" if name == "a" else "failed"})
    again = Results(path)
    assert again.rows == results.rows
    assert list(again.missing("abc", minutes=1)) == ["c"]


def test_rows_that_are_not_ok_are_forgotten(tmp_path: Path) -> None:
    results = Results(tmp_path / "results.jsonl")
    results.add({"model": "a", "status": "ok"})
    results.add({"model": "b", "status": "time limit"})
    results.forget(not_ok)
    assert list(Results(results.path).rows) == ["a"]
    assert list(results.missing("ab", minutes=1)) == ["b"]


def test_it_stops_when_the_time_is_up(tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    results = Results(tmp_path / "results.jsonl")
    assert list(results.missing("ab", minutes=-1)) == []
    assert "2 models are left" in capsys.readouterr().out


def test_a_line_torn_by_a_kill_costs_that_line(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text('{"model": "a", "status": "ok"}\n{"model": "b", "sta')
    results = Results(path)
    assert list(results.rows) == ["a"]
    results.add({"model": "b", "status": "ok"})
    assert list(Results(path).rows) == ["a", "b"]
