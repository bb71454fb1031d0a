"""Rewrite archives structure by structure, and read each by every reader: part of `make fuzz`.

It is an error of bntool's if it accepts an archive of which torch's reader, Python's or NumPy's has other
members, or other bytes of one, than those that bntool judged; also where the archive is read through what
bntool hands to torch.
"""

from __future__ import annotations

import argparse
import collections
import io
import random
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import nn

from bntool.core.errors import BntoolError
from bntool.core.limits import Limit
from bntool.files.security.archives import Damaged, Unsafe
from bntool.files.security.containers import (
    ARRAYS,
    OLD_PROGRAM,
    PICKLED,
    PROGRAM,
    SCRIPT,
    Container,
    Contents,
    within,
)
from tools.sweeps.zip_mutations import mutant

Sample = tuple[bytes, Contents]
ROOM = within(Limit(64 << 20), Path("mutant"))


class _Stream(io.RawIOBase):
    """Where a writer cannot go back, it puts sizes behind the members."""

    def __init__(self) -> None:
        self.content = b""

    def writable(self) -> bool:
        return True

    def write(self, data: object, /) -> int:
        self.content += bytes(data)  # type: ignore[call-overload]
        return len(data)  # type: ignore[arg-type]


def _made(save: Callable[[io.BytesIO], object]) -> bytes:
    buffer = io.BytesIO()
    save(buffer)
    return buffer.getvalue()


def _written(members: dict[str, bytes], file: object) -> None:
    with zipfile.ZipFile(file, "w") as archive:  # type: ignore[call-overload]
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content)


def samples() -> dict[str, Sample]:
    """One small archive of every kind and writer."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)).eval(), torch.zeros(1, 3, 4, 4)
    weights = _made(lambda f: torch.save(net.state_dict(), f))
    arrays = {"a": np.arange(3.0), "b": np.ones((2, 2), np.int32), "Ab": np.zeros(0)}
    stream, by_python, older = _Stream(), io.BytesIO(), io.BytesIO()
    np.savez(stream, **arrays)  # type: ignore[arg-type]
    with zipfile.ZipFile(io.BytesIO(weights)) as archive:
        _written({name: archive.read(name) for name in archive.namelist()}, by_python)
    pickles = {f"serialized_{n}.pt": weights for n in ("state_dict", "constants", "example_inputs")}
    program = {"serialized_exported_program.json": b"{}", **pickles, "version": b"8.8", "extra_files/a": b"b"}
    _written(program, older)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(net, (x,))
        scripted = torch.jit.trace(net, x)
        return {
            "weights.pt": (weights, PICKLED),
            "python.pt": (by_python.getvalue(), PICKLED),
            "script.pt": (_made(lambda f: torch.jit.save(scripted, f)), SCRIPT),
            "program.pt2": (
                _made(lambda f: torch.export.save(exported, f, extra_files={"a.txt": "b"})),
                PROGRAM,
            ),
            "older.pt2": (older.getvalue(), OLD_PROGRAM),
            "arrays.npz": (_made(lambda f: np.savez(f, **arrays)), ARRAYS),  # type: ignore[arg-type]
            "packed.npz": (_made(lambda f: np.savez_compressed(f, **arrays)), ARRAYS),  # type: ignore[arg-type]
            "streamed.npz": (stream.content, ARRAYS),
        }


# -- readers -------------------------------------------------------------------------------------------------


def judged(content: bytes, contents: Contents) -> tuple[str, Container | None]:
    """`accepted`, or why not: `unsafe` or `damaged`; and the container."""
    try:
        container = Container(io.BytesIO(content), contents, ROOM)
        for name in container.sizes:
            container.read(name)
    except Unsafe:
        return "unsafe", None
    except (Damaged, BntoolError):
        return "damaged", None
    return "accepted", container


def members_by_torch(file: IO[bytes]) -> dict[str, bytes] | None:
    """Every member as torch's reader has it, under its name and in capitals; None where it reads nothing."""
    try:
        reader = torch._C.PyTorchFileReader(file)
    except (RuntimeError, UnicodeDecodeError):
        return None
    found = {name: bytes(reader.get_record(name)) for name in reader.get_all_records()}
    for name, content in found.items():
        if bytes(reader.get_record(name.upper())) != content:
            found[name] = b"another member under the same name in capitals"
    return found


def members_by_python(file: IO[bytes]) -> dict[str, bytes]:
    with zipfile.ZipFile(file) as archive:
        found = {info.filename: archive.read(info) for info in archive.infolist()}
        return found | {name: archive.read(name) for name in archive.namelist()}


def _same_arrays(content: bytes, whole: dict[str, bytes]) -> bool:
    """Whether NumPy finds these members, and makes of each array what it makes of the bytes alone."""
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        for name, member in whole.items():
            try:
                array = arrays[name]
            except ValueError:
                continue  # what is no array is refused by both
            ours = member if isinstance(array, bytes) else np.lib.format.read_array(io.BytesIO(member))
            if array.tobytes() != ours.tobytes() if isinstance(ours, np.ndarray) else array != ours:
                return False
        return {f"{name}.npy" for name in arrays.files} == set(whole)


def disagreement(content: bytes, container: Container, contents: Contents) -> str:
    """Which reader has other members than were judged; empty for none."""
    whole = {name: container.content(member) for name, member in container.members.items()}
    below = {name: container.read(name) for name in container.sizes}
    for handed, file in (("the file", io.BytesIO(content)), ("what is handed on", container.file)):
        file.seek(0)
        if members_by_python(file) != whole:
            return f"Python reads {handed} in another way"
        file.seek(0)
        file.seek(0)
        by_torch = members_by_torch(file) if contents.ignores_case else None
        if by_torch is not None and by_torch != (below if contents.foldered else {}):
            return f"torch reads {handed} in another way"
        if contents is ARRAYS and handed == "the file" and not _same_arrays(content, whole):
            return "NumPy reads the file in another way"
    return ""


def judge(content: bytes, contents: Contents) -> str:
    """What became of a mutant: `accepted`, `unsafe`, `damaged`, or what is wrong with bntool."""
    said, container = judged(content, contents)
    if container is None:
        return said
    try:
        return f"FAILED: {wrong}" if (wrong := disagreement(content, container, contents)) else said
    except Exception as error:  # noqa: BLE001 - a reader that fails where bntool did not disagrees with it
        return f"FAILED: accepted, and then {type(error).__name__}: {error}"


def fuzz(cases: int, seed: int) -> dict[str, collections.Counter[str]]:
    """What became of so many mutants, by the archive that they were made of; failures in full."""
    counts: dict[str, collections.Counter[str]] = {}
    found = samples()
    for name, (content, contents) in found.items():
        counts[name] = collections.Counter(
            judge(mutant(content, random.Random(f"{seed} {name} {case}")), contents)  # noqa: S311
            for case in range(cases // len(found))
        )
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    counts = fuzz(chosen.cases, chosen.seed)
    failures = 0
    for name, count in counts.items():
        print(f"{name:16} {dict(count)}")
        failures += sum(n for said, n in count.items() if said.startswith("FAILED"))
    total = sum(sum(count.values()) for count in counts.values())
    print(f"{total} rewritten archives: {failures} that are read differently")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
