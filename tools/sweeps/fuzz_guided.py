"""Let coverage guide the damage: atheris on what reads a file before any library does. Part of `make fuzz`.

Run by a Python that has atheris, with bntool and its libraries on the path. The parsers may answer, or raise
what their callers turn into a `LoadError`; anything else ends the run with the input that did it.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["bntool.files"]):
    from bntool.api import load
    from bntool.core.errors import BntoolError
    from bntool.files.detect import detect
    from bntool.files.security.archives import Archive, Damaged, Unsafe
    from bntool.files.security.expressions import is_guard, is_size_expression
    from bntool.files.security.opcodes import DamagedPickle, DryRun
    from bntool.files.security.operators import UnknownOperator
    from bntool.files.security.pickles import check_plain_data
    from bntool.files.security.program_scan import check_program, read_json

from tools.sweeps.fuzz import samples

FILE = Path(tempfile.mkdtemp(prefix="bntool-fuzz-")) / "file.pt"
REFUSALS = (BntoolError, DamagedPickle, Unsafe, Damaged, UnknownOperator, RecursionError)
"""RecursionError: every caller of a parser takes any exception for damage; it is no hang and no crash."""


def _on_disk(use: Callable[[Path], object]) -> Callable[[bytes], object]:
    def parse(data: bytes) -> object:
        FILE.write_bytes(data)
        return use(FILE)

    return parse


def _expression(data: bytes) -> object:
    text = data.decode("utf-8", "replace")
    return is_size_expression(text), is_guard(text)


PARSERS: tuple[Callable[[bytes], object], ...] = (
    _on_disk(detect),
    _on_disk(load),
    lambda data: DryRun().run(io.BytesIO(data)),
    check_plain_data,
    lambda data: check_program(read_json(data, "model.json")),
    _expression,
    lambda data: Archive(io.BytesIO(data)).check_sums(),
)


def one(data: bytes) -> None:
    """The first byte chooses the parser, the rest is its input."""
    if data:
        with contextlib.suppress(*REFUSALS):
            PARSERS[data[0] % len(PARSERS)](data[1:])


def seeds(folder: Path) -> None:
    """A start for every parser: one file of each format, and the parts of those that hold parts."""
    import zipfile

    with tempfile.TemporaryDirectory() as made:
        for name, path in samples(Path(made)).items():
            content = path.read_bytes()
            for parser in (0, 1, 3, 6):
                (folder / f"{parser}-{name}").write_bytes(bytes([parser]) + content)
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    for member in archive.namelist():
                        parser = {"data.pkl": 2, "model.json": 4}.get(member.rpartition("/")[2])
                        if parser is not None:
                            held = bytes([parser]) + archive.read(member)
                            (folder / f"{parser}-{name}-{member.replace('/', '-')}").write_bytes(held)
    for at, text in enumerate(("s0 + 2*s1", "Max(1, s0//2) - 1", "L['x'].size()[0] >= 2")):
        (folder / f"5-{at}").write_bytes(b"\5" + text.encode())


def main() -> None:
    warnings.simplefilter("ignore")
    corpus = Path(tempfile.mkdtemp(prefix="bntool-corpus-"))
    seeds(corpus)
    limits = ["-timeout=30", "-rss_limit_mb=4096", "-max_len=20000", f"-artifact_prefix={corpus}/"]
    atheris.Setup([sys.argv[0], *limits, *sys.argv[1:], str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
