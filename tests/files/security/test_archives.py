"""An archive is what every reader takes it for, or it is refused; whatever its container and its trick."""

from __future__ import annotations

import collections
import io
import random
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from bntool.api import load
from bntool.core.errors import LoadError
from bntool.files.detect import Kind, detect
from bntool.files.security.archives import MAX_DIRECTORY, Archive, Damaged, Unsafe
from bntool.files.security.containers import PICKLED, Container
from tests.files.security.zip_tricks import TRICKS
from tools.sweeps import fuzz_archives
from tools.sweeps.fuzz_archives import ROOM, Sample, members_by_python, members_by_torch
from tools.sweeps.zip_model import FULL_16, FULL_32, KINDS, fields_of, model_of, write
from tools.sweeps.zip_mutations import mutant

SAMPLES = "weights.pt python.pt script.pt program.pt2 older.pt2 arrays.npz packed.npz streamed.npz".split()


@pytest.fixture(scope="module")
def samples() -> dict[str, Sample]:
    return fuzz_archives.samples()


@pytest.mark.parametrize("sample", SAMPLES)
def test_what_honest_writers_write_is_accepted(samples: dict[str, Sample], sample: str) -> None:
    content, contents = samples[sample]
    container = Container(io.BytesIO(content), contents, ROOM)
    assert fuzz_archives.disagreement(content, container, contents) == ""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert container.sizes.keys() == {name.removeprefix("archive/") for name in archive.namelist()}


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("trick", TRICKS)
def test_a_trick_is_refused(samples: dict[str, Sample], sample: str, trick: str) -> None:
    content, contents = samples[sample]
    model = model_of(content)
    TRICKS[trick](model)
    bad = model.to_bytes()
    assert bad != content
    with pytest.raises((Unsafe, Damaged)) as caught:
        Container(io.BytesIO(bad), contents, ROOM)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "trick", ["archive-before", "byte-behind", "record-of-another-offset", "twice", "overlap"]
)
def test_a_trick_is_one_clear_error_wherever_a_file_is_loaded(
    samples: dict[str, Sample], trick: str, tmp_path: Path
) -> None:
    for name in ("weights.pt", "script.pt", "program.pt2", "older.pt2"):
        model = model_of(samples[name][0])
        TRICKS[trick](model)
        (tmp_path / name).write_bytes(model.to_bytes())
        assert detect(tmp_path / name).kind is Kind.ZIP_UNSAFE
        with pytest.raises(LoadError, match="no program of PyTorch or NumPy writes: it ") as caught:
            load(tmp_path / name)
        assert caught.value.next_step


def test_a_cut_or_changed_archive_is_damaged_and_not_suspected(samples: dict[str, Sample]) -> None:
    content, _ = samples["weights.pt"]
    for bad in (content[:-1], content[:-30], content[:200], content.replace(b"PK\3\4", b"PK\3\5", 1)):
        with pytest.raises(Damaged):
            Archive(io.BytesIO(bad))
    flipped = bytearray(content)
    flipped[Archive(io.BytesIO(content)).members["archive/data/0"].begin] ^= 1
    with pytest.raises(Damaged, match="checksum of 'archive/data/0' does not match"):
        Archive(io.BytesIO(flipped)).check_sums()


HOLE, SUM_OF_HOLE = 5 << 30, 0x193838C3
SMALL, SUM_OF_SMALL = b"abc", 0x352441C2


def _with_a_hole(path: Path, *, by_torch: bool) -> None:
    """Three members of which the second is 5 GiB of zeros, laid out as torch or Python lays them out."""
    directory = b""
    with path.open("wb") as file:
        for name, size in ((b"archive/data.pkl", 3), (b"archive/data/0", HOLE), (b"archive/version", 3)):
            at, crc = file.tell(), SUM_OF_HOLE if size == HOLE else SUM_OF_SMALL
            wide = [size, size] if size == HOLE else []
            extra = _wide(*wide, *([at] if at > FULL_32 else []))
            both = dict.fromkeys(fields_of("entry"), 0)
            both |= {"names": len(name), "flags": 0x808 if by_torch else 0, "need": 0 if by_torch else 45}
            short = FULL_32 if wide else size
            sums = {"crc": crc, "packed": short, "size": short}
            if by_torch:
                local_extra = (_wide(HOLE, 0) if wide else extra) + b"FB\2\0ZZ"
                behind = struct.pack("<4sL2Q" if extra else "<4s3L", b"PK\7\10", crc, size, size)
            else:
                local_extra, behind = _wide(*wide), b""
            local = both | ({} if by_torch else sums) | {"extras": len(local_extra)}
            file.write(write("local", local) + name + local_extra)
            file.seek(file.tell() + size) if wide else file.write(SMALL)
            file.write(behind)
            offset = min(at, FULL_32)
            directory += write("entry", both | sums | {"extras": len(extra), "offset": offset}) + name + extra
        begin = file.tell()
        ends = {"here": 3, "count": 3, "size": len(directory), "offset": begin}
        zero = {"disk": 0, "first": 0, "comments": 0, "maker": 45, "need": 45, "length": 44, "disks": 1}
        file.write(directory + write("record", zero | ends))
        file.write(write("locator", zero | {"offset": begin + len(directory)}))
        file.write(write("end", zero | ends | {"offset": FULL_32}))


def _wide(*numbers: int) -> bytes:
    return struct.pack(f"<2H{len(numbers)}Q", 1, 8 * len(numbers), *numbers) if numbers else b""


@pytest.mark.parametrize("by_torch", [True, False])
def test_more_than_four_gibibytes(tmp_path: Path, by_torch: bool) -> None:
    path = tmp_path / "large.pt"
    _with_a_hole(path, by_torch=by_torch)
    with path.open("rb") as file:
        archive = Archive(file)
        assert [m.size for m in archive.members.values()] == [3, HOLE, 3]
        assert archive.content(archive.members["archive/version"]) == SMALL
        with zipfile.ZipFile(path) as by_python:
            assert by_python.read("archive/version") == SMALL
            assert [m.file_size for m in by_python.infolist()] == [3, HOLE, 3]
    with pytest.raises(LoadError, match="too large"):
        load(path, max_size=1 << 30)


def test_more_members_than_sixteen_bits_count() -> None:
    count = FULL_16 + 10
    buffer = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(buffer, True, 64)
    for number in range(count):
        writer.write_record(f"data/{number}", b"x", 1)
    writer.write_end_of_file()
    container = Container(buffer, PICKLED)
    assert sum(name.startswith("data/") for name in container.sizes) == count
    assert container.read(f"data/{count - 1}") == b"x"


def test_a_directory_that_claims_much_is_not_read(tmp_path: Path) -> None:
    size = MAX_DIRECTORY + 46
    end = dict.fromkeys(fields_of("end"), 0) | {"here": FULL_16, "count": FULL_16, "size": size, "offset": 4}
    path = tmp_path / "directory.pt"
    with path.open("wb") as file:
        file.write(KINDS["local"][0])
        file.seek(4 + size)
        file.write(write("end", end))
    with path.open("rb") as file, pytest.raises(Unsafe, match="claims a directory of 67,108,910 bytes"):
        Archive(file)


def test_rewritten_archives_are_read_alike_by_all_readers_or_refused() -> None:
    counts = sum(fuzz_archives.fuzz(320, seed=7).values(), collections.Counter())
    assert counts.keys() <= {"accepted", "unsafe", "damaged"}, counts
    # It would show nothing if all were refused, or none.
    assert counts["accepted"] > 20
    assert counts["unsafe"] > 100


def test_readers_do_disagree_on_what_is_refused(samples: dict[str, Sample]) -> None:
    content, _ = samples["python.pt"]
    apart = 0
    for case in range(100):
        bad = mutant(content, random.Random(f"7 {case}"))
        try:
            found = {name.partition("/")[2]: b for name, b in members_by_python(io.BytesIO(bad)).items()}
            apart += found != (members_by_torch(io.BytesIO(bad)) or found)
        except (zipfile.BadZipFile, RuntimeError, NotImplementedError, OSError, ValueError, KeyError):
            continue
    assert apart > 0


def test_a_member_that_unpacks_to_more_than_it_says() -> None:
    """What a packed member unpacks to beyond its size is never made."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, a=np.zeros(1 << 20))
    model = model_of(buffer.getvalue())
    for fields in (model.parts[0].local, model.parts[0].entry):
        fields["size"] = 10
    model.parts[0].extra = struct.pack("<2H2Q", 1, 16, 10, model.parts[0].entry["packed"])
    model.parts[0].local["size"] = FULL_32
    archive = Archive(io.BytesIO(model.to_bytes()))
    with pytest.raises(Unsafe, match="hides bytes in the packed member"):
        archive.check_sums()
