"""Which JSON is a document, and what is told of one that is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bntool.core.errors import LoadError
from bntool.report.page import html_page
from bntool.report.reading import as_document, read_document
from tests.report import documents


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "cannot be read as JSON"),
        ("{", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("[]", "no schema_version"),
        ('{"name": "package", "version": "1.0"}', "no schema_version"),
        ('{"schema_version": true}', "no schema_version"),
        ('{"schema_version": "1"}', "no schema_version"),
        ('{"schema_version": 3, "bn_folded": 1}', "this bntool reads up to 2"),
        ('{"schema_version": 1}', "nothing that a report could show"),
    ],
)
def test_what_is_no_document_is_told_in_one_error(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(LoadError, match=says) as caught:
        read_document(path)
    assert "x.json" in str(caught.value)
    assert caught.value.next_step


def test_bytes_that_are_no_text_and_a_file_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b"\x80\x02\xff")
    with pytest.raises(LoadError, match="cannot be read"):
        read_document(tmp_path / "x.json")
    with pytest.raises(LoadError, match="no such file"):
        read_document(tmp_path / "y.json")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sites", [{"bn": "a"}]),
        ("sites", 7),
        ("skips", [{}]),
        ("checks", [{"stage": "fold"}]),
        ("checks", "none"),
        ("parameters", {"before": {}, "after": {}, "delta": {}}),
        ("model", {"before": {"layers": [{"name": "a"}], "modules": {}, "class": "", "left_out": 0}}),
        ("model", {"norms": [{"name": "a", "channels": 2, "scale": ["x", "y"], "dead": 0}]}),
        ("model", {"norms": [{**documents.norm("a"), "shift": [1.0]}]}),
        ("latency", {"rows": [{}], "comparisons": []}),
        ("blame", {"name": "a"}),
        ("notes", 3),
    ],
)
def test_a_part_that_is_not_what_its_name_promises_is_damage(key: str, value: Any) -> None:
    document = as_document({**documents.fold(), key: value}, "x.json")
    with pytest.raises(LoadError, match=r"x\.json is damaged"):
        html_page([document])


@pytest.mark.parametrize(
    "document", [documents.fold(), documents.insert(), documents.compare(), documents.large(30)]
)
def test_a_file_with_what_a_command_wrote_is_read(tmp_path: Path, document: dict[str, Any]) -> None:
    (tmp_path / "x.json").write_text(json.dumps(document), encoding="utf-8")
    assert read_document(tmp_path / "x.json").data == document


@pytest.mark.parametrize(
    ("key", "value", "place"),
    [
        ("sites", 7, "sites"),
        ("sites", [{"bn": "a"}], "sites[0]"),
        ("sites", [{"bn": "a", "into": ["b"], "laws": [3]}], "sites[0].laws[0]"),
        ("plan", {"sites": [{"bn": "a", "into": "b", "laws": []}]}, "plan.sites[0].into"),
        ("skips", [{"bn": "a"}], "skips[0]"),
        ("checks", [{**documents.check(), "passed": "yes"}], "checks[0].passed"),
        ("checks", [{**documents.check(), "limit": []}], "checks[0].limit"),
        ("parameters", {"before": {"trainable": "1"}}, "parameters[...][...]"),
        ("model", {"norms": [{**documents.norm("a"), "shift": ["x"]}]}, "model.norms[0].shift[0]"),
        ("model", {"before": {"layers": [], "modules": {}, "left_out": -1}}, "model.before.left_out"),
        ("latency", {"rows": [{}]}, "latency.rows[0]"),
        ("blame", {"name": None}, "blame.name"),
        ("notes", 3, "notes"),
        ("watched", {"plain": [{"step": 1, "values": {"0": {"quantiles": 3}}}]},
         "watched.plain[0].values[...].quantiles"),
    ],
)  # fmt: skip
def test_damage_in_a_file_is_told_with_its_place(tmp_path: Path, key: str, value: Any, place: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({**documents.fold(), key: value}), encoding="utf-8")
    with pytest.raises(LoadError, match=r"x\.json is damaged") as caught:
        read_document(path)
    assert caught.value.where == f"{path}, {place}"
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("document", "command"),
    [
        (documents.compare(), "compare"),
        ({"schema_version": 1, "bn_folded": 0}, "fold"),
        ({"schema_version": 1, "sites": []}, "insert"),
        ({"schema_version": 1, "checks": []}, "verify"),
        ({"schema_version": 1, "latency": {}}, "bench"),
        ({"schema_version": 1, "action": "fold", "sites": []}, "fold"),
        ({"schema_version": 1, "error": {"what": "x", "where": "", "next": ""}}, "command"),
    ],
)
def test_a_document_that_does_not_name_its_command(document: dict[str, Any], command: str) -> None:
    assert as_document(document, "x").command == command


def test_what_is_no_number_is_nothing(tmp_path: Path) -> None:
    document = documents.fold()
    text = json.dumps(document).replace("2e-07", "NaN", 1).replace("0.02", "1e999", 1)
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    read = read_document(tmp_path / "x.json")
    assert read.data["checks"][0]["relative"] is None
    page = html_page([read])
    assert "not finite" in page
    assert "NaN" not in page.split('id="data">')[1].split("</script>")[0]
