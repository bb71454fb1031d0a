"""`bntool demo` replaces nothing but an earlier demo, and leaves no folder when it comes to nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from bntool.cli import demo
from bntool.core.errors import CheckFailed
from tests.cli.conftest import Said, Shell, contents


@pytest.fixture
def shown(bntool: Shell, folder: Path) -> Path:
    """The folder of a demo that went well."""
    assert bntool("demo", "-o", "out").code == 0
    return folder / "out"


def test_force_replaces_an_earlier_demo_and_only_that(
    bntool: Shell, refused: Callable[..., Said], shown: Path
) -> None:
    refused("demo", "-o", "out", code=2, says="out/model_bn.pt exists already")
    before = contents(shown)
    (shown / "model_bn_folded.pt").unlink()
    assert bntool("demo", "-o", "out", "--force").code == 0
    assert contents(shown) == before
    for name in ("model.pt", "model_bn.pt", "model_bn_folded.pt", "model_bn_folded.onnx"):
        (shown / name).write_bytes(b"precious")
        refused("demo", "-o", "out", "--force", code=2, says=f"out/{name} is no file of the demo's")
        (shown / name).unlink()
        (shown / name).symlink_to("nowhere")
        refused("demo", "-o", "out", "--force", code=2, says=f"out/{name} is no file of the demo's")
        (shown / name).unlink()
        (shown / name).write_bytes(before[name])


@pytest.mark.parametrize("name", ["model.pt", "model_bn.pt"])
def test_without_force_nothing_is_touched(refused: Callable[..., Said], name: str) -> None:
    Path("out").mkdir()
    Path("out", name).write_bytes(b"precious")
    refused("demo", "-o", "out", code=2, says=f"out/{name}")


def _full(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


def _stopped(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def _failing(*_: object, **__: object) -> None:
    raise CheckFailed("the fold stage differs", next_step="see the table above")


@pytest.mark.parametrize(
    ("where", "fails", "code"),
    [
        ("bntool.files.drafting.place", _full, 2),
        ("bntool.cli.writing.draft_result", _stopped, 130),
        ("bntool.cli.writing.draft_result", _failing, 1),
    ],
)
def test_a_demo_that_comes_to_nothing_leaves_nothing(
    bntool: Shell, folder: Path, monkeypatch: pytest.MonkeyPatch, where: str, fails: object, code: int
) -> None:
    monkeypatch.setattr(where, fails)
    assert bntool("demo", "-o", "some/where").code == code
    assert list(folder.rglob("*")) == []
    Path("mine").mkdir()
    assert bntool("demo", "-o", "mine/out").code == code
    assert list(folder.rglob("*")) == [folder / "mine"]
    Path("mine/note.txt").write_text("precious")
    assert bntool("demo", "-o", "mine").code == code
    assert contents(folder)["mine/note.txt"] == b"precious"


def test_without_the_sample_no_folder_is_made(
    refused: Callable[..., Said], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "__file__", str(folder / "bntool" / "cli" / "demo.py"))
    refused("demo", "-o", "out", code=3, says="the sample model is missing")
    assert list(folder.iterdir()) == []
