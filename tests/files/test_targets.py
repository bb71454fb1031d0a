"""What may be written, beside what was read; how files are put in place where the system knows fewer ways."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bntool.core.errors import UsageError
from bntool.files import placing
from bntool.files.targets import Target


def _write(
    target: Target, *paths: Path, text: str = "new", meanwhile: Callable[[], object] = lambda: None
) -> None:
    claimed = [target.claim(path, force=target.force or path.name == "old.pt") for path in paths]
    with target.drafts() as drafts:
        for path in claimed:
            drafts.of(path).write_text(text)
        meanwhile()


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _unable(*_: object) -> None:
    raise OSError(errno.EOPNOTSUPP, "not here")


@pytest.fixture(params=["rename", "link", "name first"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The ways to make a file where none is, from the best on; each must keep what stands there."""
    if request.param != "rename":
        monkeypatch.setattr(placing, "_rename_new", _unable)
    if request.param == "name first":
        monkeypatch.setattr(placing, "_link_new", _unable)
    return str(request.param)


def test_a_file_is_made_once_in_every_way(tmp_path: Path, way: str) -> None:
    output = tmp_path / "a.pt"
    _write(Target(), output)
    assert output.read_text() == "new"
    assert output.stat().st_nlink == 1
    assert output.stat().st_mode & 0o777 == 0o666 & ~_umask()
    output.unlink()
    with pytest.raises(UsageError, match="exists already"):
        _write(Target(), output, meanwhile=lambda: output.write_text("somebody else's"))
    assert output.read_text() == "somebody else's"
    _write(Target(force=True), output, text="forced")
    assert output.read_text() == "forced"
    assert _names(tmp_path) == ["a.pt"]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_no_other_way_is_tried_after_a_real_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fails(*_: object) -> None:
        raise OSError(number, "no")

    monkeypatch.setattr(placing, "_rename_new", fails)
    with pytest.raises(UsageError, match="cannot write"):
        _write(Target(), tmp_path / "a.pt")
    assert _names(tmp_path) == []


def test_several_files_are_made_together_or_not_at_all(tmp_path: Path) -> None:
    old, *others = paths = [tmp_path / name for name in ("old.pt", "b.json", "c.onnx")]
    old.write_text("old")
    for late in others:
        with pytest.raises(UsageError, match=f"{late.name} exists already"):
            _write(Target(), *paths, meanwhile=lambda late=late: late.write_text("somebody else's"))
        assert _names(tmp_path) == sorted(["old.pt", late.name])
        assert [old.read_text(), late.read_text()] == ["old", "somebody else's"]
        late.unlink()


def test_a_group_is_taken_back_where_there_are_no_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stood there is copied then, or taking the new file back would leave nothing of either."""

    def forbidden(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(placing, "_rename_new", _unable)
    monkeypatch.setattr(os, "link", forbidden)
    old, fresh, late = paths = [tmp_path / name for name in ("old.pt", "b.json", "c.onnx")]
    old.write_text("old")
    old.chmod(0o640)
    with pytest.raises(UsageError, match=r"c\.onnx exists already"):
        _write(Target(), *paths, meanwhile=lambda: late.write_text("somebody else's"))
    assert (old.read_text(), late.read_text()) == ("old", "somebody else's")
    assert old.stat().st_mode & 0o777 == 0o640
    assert _names(tmp_path) == ["c.onnx", "old.pt"]
    late.unlink()
    _write(Target(), *paths)
    assert [path.read_text() for path in (old, fresh, late)] == ["new"] * 3


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_name_that_was_taken_first_is_given_back_where_its_file_cannot_follow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    old, fresh = tmp_path / "old.pt", tmp_path / "b.json"
    old.write_text("old")
    move = Path.replace

    def fails(draft: Path, path: Path) -> Path:
        if path == fresh:
            assert path.stat().st_size == 0
            raise error
        return move(draft, path)

    for way in ("_rename_new", "_link_new"):
        monkeypatch.setattr(placing, way, _unable)
    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(UsageError if isinstance(error, OSError) else KeyboardInterrupt):
        _write(Target(), old, fresh)
    assert old.read_text() == "old"
    assert _names(tmp_path) == ["old.pt"]


def test_nothing_is_placed_after_an_error_or_ctrl_c(tmp_path: Path) -> None:
    def stop(error: type[BaseException]) -> None:
        raise error

    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error):
            _write(Target(), tmp_path / "a.pt", meanwhile=lambda error=error: stop(error))
        assert _names(tmp_path) == []


def _link(path: Path, to: Path) -> None:
    path.symlink_to(to)


def _hard(path: Path, to: Path) -> None:
    os.link(to, path)


def _link_to_link(path: Path, to: Path) -> None:
    middle = path.with_name("middle")
    middle.symlink_to(to)
    path.symlink_to(middle)


def _through_a_folder(path: Path, to: Path) -> None:
    folder = path.with_name("folder")
    folder.symlink_to(to.parent, target_is_directory=True)
    path.symlink_to(folder / to.name)


@pytest.mark.parametrize("alias", [_link, _hard, _link_to_link, _through_a_folder])
@pytest.mark.parametrize("later", [False, True])
def test_a_file_read_is_known_by_every_name(
    tmp_path: Path, alias: Callable[[Path, Path], None], later: bool
) -> None:
    source, other = tmp_path / "in.pt", tmp_path / "other.pt"
    source.write_text("precious")
    alias(other, source)
    for read, written in ((source, other), (other, source)):
        target = Target(force=True, reads=[] if later else [read])
        told, action = (read, target.read) if later else (written, target.claim)
        if later:
            target.claim(written)
        with pytest.raises(UsageError, match="is the input itself"):
            action(told)
    assert source.read_text() == "precious"


def test_what_becomes_an_input_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    source, output = tmp_path / "in.pt", tmp_path / "out.pt"
    source.write_text("precious")
    output.write_text("old")

    def swap() -> None:
        output.unlink()
        os.link(source, output)

    with pytest.raises(UsageError, match="is the input itself"):
        _write(Target(force=True, reads=[source]), output, meanwhile=swap)
    assert source.read_text() == "precious"


def test_python_code_in_use_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    helper = tmp_path / "helper_of_a_model.py"
    helper.write_text("x = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    __import__("helper_of_a_model")
    try:
        with pytest.raises(UsageError, match="is the input itself"):
            Target(force=True).claim(helper)
        Target(force=True).claim(helper, though_read=True)
    finally:
        del sys.modules["helper_of_a_model"]


def test_a_file_of_our_own_is_never_put_through_a_link_or_over_a_foreign_one(tmp_path: Path) -> None:
    side = tmp_path / "a.json"
    side.symlink_to("nowhere")
    with pytest.raises(UsageError, match="is a link"):
        Target(force=True).claim_beside(side, lambda _: True)
    side.unlink()
    side.write_text("mine")
    with pytest.raises(UsageError, match="no file of bntool's"):
        Target(force=True).claim_beside(side, lambda _: False)
    with pytest.raises(UsageError, match="exists already"):
        Target().claim_beside(side, lambda _: True)
    assert Target(force=True).claim_beside(side, lambda _: True) == side


def test_a_name_too_long_for_its_folder_is_told_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="too long"):
        Target().claim(tmp_path / ("n" * 256))


def test_what_a_killed_writer_noted_goes_and_nothing_else_does(tmp_path: Path) -> None:
    from bntool.files.drafts import note_leftovers, remove_abandoned

    orphan, named, other = (tmp_path / f"{name}.onnx.data" for name in ("orphan", "named", "other"))
    for path in (orphan, named, other):
        path.write_text(path.name)
    (tmp_path / "model.onnx").write_bytes(b"\x12" + named.name.encode())
    dead = tmp_path / ".bntool-0123456789ab.draft"
    dead.mkdir()
    note_leftovers(dead, [orphan, named])
    os.utime(dead, (0, 0))
    remove_abandoned(tmp_path)
    assert _names(tmp_path) == ["model.onnx", "named.onnx.data", "other.onnx.data"]


@pytest.mark.parametrize("noted", ["[]", "[[1, 2, 3, 4]]", "{}", "no json", "[" * 5000, '["../x"]', "[null]"])
def test_a_note_that_points_nowhere_removes_nothing(tmp_path: Path, noted: str) -> None:
    from bntool.files.drafts import remove_abandoned

    (tmp_path / "a.onnx.data").write_text("precious")
    dead = tmp_path / ".bntool-0123456789ab.draft"
    dead.mkdir()
    (dead / "leftovers.json").write_text(noted)
    os.utime(dead, (0, 0))
    remove_abandoned(tmp_path)
    assert _names(tmp_path) == ["a.onnx.data"]
