"""A command line to type into: a folder of its own, a memory of its own, and what came out."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bntool.cli import run
from bntool.core.documents import DOCUMENTS, Document


@dataclasses.dataclass(frozen=True)
class Said:
    """What one command said and how it ended."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """Stdout as the one JSON document, as the schema has it; anything beside it fails to parse."""
        document: dict[str, Any] = json.loads(self.out)
        kind = DOCUMENTS.get(document["command"], Document)
        assert set(document) == set(msgspec.structs.asdict(kind()))
        msgspec.convert(document, kind)
        return document


Shell = Callable[..., Said]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to work in. Modules imported from it are forgotten afterwards."""
    home = tmp_path / "work"
    home.mkdir()
    monkeypatch.chdir(home)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    before = set(sys.modules)
    yield home
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None)
        if file and Path(file).is_relative_to(tmp_path):
            del sys.modules[name]


@pytest.fixture
def bntool(capsys: pytest.CaptureFixture[str]) -> Shell:
    """`bntool("fold", "model.pt")` runs that line. No line may show a traceback or colours."""

    def shell(*words: str) -> Said:
        capsys.readouterr()
        code = run(list(words))
        out, err = capsys.readouterr()
        for text in (out, err):
            assert "Traceback" not in text
            assert "\x1b" not in text
        return Said(code, out, err)

    return shell


@pytest.fixture
def refused(bntool: Shell, folder: Path) -> Callable[..., Said]:
    """A line that must fail: one error that says what, where or which, and what next; no file touched."""

    def shell(*words: str, code: int, says: str = "") -> Said:
        before = contents(folder)
        said = bntool(*words)
        assert said.code == code, said
        if "--json" in words:
            assert said.document["status"] not in ("ok", "bug")
            error = said.document["error"]
            assert error["what"]
            assert error["next"]
            assert says in json.dumps(error)
        else:
            assert said.err.count("error: ") == 1
            assert said.err.startswith("error: ")
            assert "\n  next:  " in said.err
            assert len(said.err.splitlines()) <= 3
            assert says in said.err
        assert contents(folder) == before
        return said

    return shell


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too, with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
