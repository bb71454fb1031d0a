"""`bntool demo`: the three lines on the sample network, with nothing downloaded."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import click

from bntool.cli.completing import folders
from bntool.cli.streams import say
from bntool.errors import LoadError, UsageError
from bntool.files.atomic import write_atomically

_MADE = ("model_bn.pt", "model_bn_folded.pt", "model_bn_folded.onnx")
_LINES = (["insert", "model.pt"], ["summary"], ["fold", "--export", "onnx"])


@click.command("demo", short_help="The three lines on the sample network.")
@click.option(
    "-o",
    "--output",
    "folder",
    default="demo-out",
    show_default=True,
    metavar="FOLDER",
    shell_complete=folders,
)
@click.option("--force", is_flag=True, help="Replace what an earlier demo left there.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def command(folder: str, force: bool, debug: bool) -> int:  # noqa: ARG001 - read by main
    """Insert, summary and fold on the sample: a small MNIST network, trained, without BatchNorm."""
    from bntool.cli import cli

    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
        _put_sample(target / "model.pt", force)
    except OSError as error:
        raise UsageError(
            f"cannot write into {target}: {error.strerror}", next_step="name another folder with -o"
        ) from error
    with _inside(target):
        for line in _LINES:
            say("", f"$ bntool {' '.join(line)}")
            replacing = ["--force"] if force and line != ["summary"] else []
            code = cli.main(args=[*line, *replacing], prog_name="bntool", standalone_mode=False)
            if code:
                return int(code)
    say("", f"The files are in {target.resolve()}:")
    for path in sorted(target.iterdir()):
        say(f"  {path.name}")
    return 0


def _put_sample(path: Path, force: bool) -> None:
    """A copy of the sample; one that is there already is as good, and any other file stays."""
    content = _sample().read_bytes()
    there = [name for name in _MADE if os.path.lexists(path.with_name(name))]
    if there and not force:
        raise UsageError(
            f"{path.with_name(there[0])} exists already",
            next_step="bntool demo -o ANOTHER_FOLDER, or --force to replace what an earlier demo left",
        )
    if not (path.is_file() and path.read_bytes() == content):
        write_atomically(path, lambda draft: draft.write_bytes(content))


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
