"""`bntool demo`: the three lines on the sample network, with nothing downloaded."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import click

from bntool.cli.options import some, takes
from bntool.cli.streams import say
from bntool.core.command_options import SpeechOptions, WriteOptions
from bntool.core.errors import LoadError, UsageError
from bntool.core.option import Options, option
from bntool.files.atomic import write_atomically
from bntool.files.placing import remove, remove_empty
from bntool.files.sidecar import is_result

_MADE = {"model_bn.pt": "insert", "model_bn_folded.pt": "fold", "model_bn_folded.onnx": ""}
_LINES = (["insert", "model.pt"], ["summary"], ["fold", "--export", "onnx"])


@dataclasses.dataclass(frozen=True)
class DemoOptions(Options):
    """Where the demo takes place."""

    folder: str = option("demo-out", "", "-o", "--output", metavar="FOLDER", names="folder", written=True)


@click.command("demo", short_help="The three lines on the sample network.")
@takes(
    DemoOptions,
    some(WriteOptions, "force"),
    some(SpeechOptions, "debug"),
    force="Replace what an earlier demo left there.",
)
def command(demo: DemoOptions, write: WriteOptions) -> int:
    """Insert, summary and fold on the sample: a small MNIST network, trained, without BatchNorm."""
    from bntool.cli import cli

    target, content = Path(demo.folder), _sample().read_bytes()
    _require_own(target, content, write.force)
    with _sample_in(target, content), _inside(target):
        for line in _LINES:
            say("", f"$ bntool {' '.join(line)}")
            replacing = ["--force"] if write.force and line != ["summary"] else []
            code = cli.main(args=[*line, *replacing], prog_name="bntool", standalone_mode=False)
            if code:
                return int(code)
    say("", f"The files are in {target.resolve()}:")
    for path in sorted(target.iterdir()):
        say(f"  {path.name}")
    return 0


def _require_own(folder: Path, content: bytes, force: bool) -> None:
    """Raise `UsageError` where the files of an earlier demo stand, but with `force`, or any other file."""
    for name, command in {"model.pt": "", **_MADE}.items():
        path = folder / name
        if not os.path.lexists(path):
            continue
        if not _is_own(path, command, content):
            raise UsageError(f"{path} is no file of the demo's", next_step="bntool demo -o ANOTHER_FOLDER")
        if name in _MADE and not force:
            raise UsageError(
                f"{path} exists already",
                next_step="bntool demo -o ANOTHER_FOLDER, or --force to replace what an earlier demo left",
            )


def _is_own(path: Path, command: str, content: bytes) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    if command:
        return is_result(path, command)
    held = path.read_bytes()
    return held == content if path.suffix == ".pt" else b"bntool_source_sha256" in held


@contextlib.contextmanager
def _sample_in(folder: Path, content: bytes) -> Iterator[None]:
    """Make the folder, and the sample in it; where an error leaves nothing beside it, neither stays."""
    sample = folder / "model.pt"
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    put = not sample.exists()
    try:
        _make(folder)
        if put:
            write_atomically(sample, lambda draft: draft.write_bytes(content))
        yield
    except BaseException:
        if put and folder.is_dir() and [*folder.iterdir()] == [sample]:
            remove(sample)
        remove_empty(*new)
        raise


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"cannot write into {folder}: {error.strerror}", next_step="name another folder with -o"
        ) from error


def _sample() -> Path:
    """The sample model: inside the installed package, or in the checkout beside it."""
    package = Path(__file__).resolve().parent.parent
    for path in (package / "sample" / "model.pt", package.parent / "samples" / "model.pt"):
        if path.is_file():
            return path
    raise LoadError(
        "the sample model is missing from this installation", next_step="pip install --force-reinstall bntool"
    )


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
