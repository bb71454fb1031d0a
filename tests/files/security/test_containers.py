"""Each kind of archive holds what its writers put into it, by its exact name, and nothing else."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest

import bntool
from bntool.api import load
from bntool.cli import run
from bntool.core.errors import LoadError
from bntool.core.limits import Limit
from bntool.files.inspecting import inspect_file
from bntool.files.security.archives import Unsafe
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
from tools.sweeps import fuzz_archives
from tools.sweeps.fuzz_archives import Sample

KNOWN = {
    "pickled": (PICKLED, "data.pkl data/0 data/94113 version byteorder .format_version .storage_alignment"),
    "script": (
        SCRIPT,
        """data.pkl constants.pkl data/0 constants/0 code/__torch__/net.py code/__torch__/net.py.debug_pkl
        traced_inputs.pkl traced_inputs/0 bytecode.pkl extra/a/b.txt version .data/serialization_id""",
    ),
    "program": (
        PROGRAM,
        """archive_format archive_version models/model.json data/sample_inputs/model.pt data/weights/weight_0
        data/weights/model_weights_config.json data/constants/tensor_0 data/constants/model.pt extra/a.txt
        .data/version byteorder""",
    ),
    "older": (
        OLD_PROGRAM,
        """serialized_exported_program.json serialized_state_dict.pt serialized_constants.pt
        serialized_example_inputs.pt version extra_files/a/b.txt""",
    ),
    "arrays": (ARRAYS, "a.npy A.npy layer/weight.npy"),
}
ODD = {
    "pickled": """constants.pkl data.PKL DATA/0 data/0.pkl data/x data/0/1 code/a.py extra/a model.json
        Version data/\u0663 models/model.json data.pkl.py .data/serialization_id2 archive/data.pkl""",
    "script": """code/a.PY CODE/a.py Code/a.py code/a.pyc code/a.py.DEBUG_PKL model.json attributes.pkl
        libs/a.py tensors/0 data/x constants.PKL code/größe.py archive_format EXTRA/a""",
    "program": """models/other.json models/model.JSON MODELS/model.json data/aotinductor/model/a.so
        data/weights/a/b data/executorch/a data/weights/../a data.pkl constants.pkl mtia/a
        data/sample_inputs/other.pt Extra/a""",
    "older": """serialized_state_dict.json VERSION models/model.json archive_format extra_filesX/a data.pkl
        Extra_files/a serialized_state_dict.PT""",
    "arrays": "a.npz a.NPY a.py data.pkl a.npy/x __init__.py",
}


def _archive(names: list[str], contents: Contents) -> io.BytesIO:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(f"net/{name}" if contents.foldered else name, b"")
    return buffer


@pytest.mark.parametrize("kind", KNOWN)
def test_what_writers_write_is_known(kind: str) -> None:
    contents, names = KNOWN[kind]
    assert set(Container(_archive(names.split(), contents), contents).sizes) == set(names.split())


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, odd in ODD.items() for name in odd.split()]
)
def test_what_is_not_known_is_refused_and_named(kind: str, name: str) -> None:
    contents, names = KNOWN[kind]
    with pytest.raises(Unsafe) as caught:
        Container(_archive([*names.split(), name], contents), contents)
    assert repr(name) in str(caught.value) or name in str(caught.value)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("a", "A"),
        ("a/b", "A/B"),
        ("k", "\u212a"),
        ("ss", "ß"),
        ("a", "\uff41"),
        ("é", "e\u0301"),
        ("fi", "ﬁ"),
    ],
)
@pytest.mark.parametrize("kind", ["script", "program", "older"])
def test_names_that_differ_by_case_or_form_count_as_one(kind: str, first: str, second: str) -> None:
    contents, names = KNOWN[kind]
    folder = "extra_files/" if kind == "older" else "extra/"
    pair = [folder + first, folder + second]
    with pytest.raises(Unsafe, match="differ by case alone"):
        Container(_archive([*names.split(), *pair], contents), contents)
    assert pair[1] in Container(_archive([*names.split(), pair[1]], contents), contents).sizes


@pytest.mark.parametrize("kind", ["pickled", "script", "program"])
def test_all_lie_in_one_folder(kind: str) -> None:
    contents, names = KNOWN[kind]
    for odd in ("other/version", "Net/extra/a", "version"):
        buffer = _archive(names.split(), contents)
        with zipfile.ZipFile(buffer, "a") as archive:
            archive.writestr(odd, b"")
        with pytest.raises(Unsafe, match="outside its one folder"):
            Container(buffer, contents)


def test_an_older_program_has_no_folder_in_which_torch_finds_another() -> None:
    """torch takes the first member's folder for the root, and extra files for a program of today's format."""
    names = KNOWN["older"][1].split()
    with pytest.raises(Unsafe, match="begins with a folder"):
        Container(
            _archive(["extra_files/version", "extra_files/archive_format", *names], OLD_PROGRAM), OLD_PROGRAM
        )


@pytest.mark.parametrize(
    ("kind", "name", "may"),
    [
        ("pickled", "data.pkl", False),
        ("pickled", "data/0", False),
        ("script", "code/__torch__/net.py", True),
        ("script", "data.pkl", False),
        ("script", "data/0", False),
        ("script", "extra/a/b.txt", False),
        ("program", "models/model.json", False),
        ("older", "version", False),
        ("arrays", "a.npy", True),
    ],
)
def test_only_what_its_writers_pack_may_be_packed(kind: str, name: str, may: bool) -> None:
    contents, names = KNOWN[kind]
    buffer = _archive([n for n in names.split() if n != name], contents)
    with zipfile.ZipFile(buffer, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"net/{name}" if contents.foldered else name, b"a" * 10_000)
    room = within(Limit(), Path("net"))
    if may:
        assert Container(buffer, contents, room).read(name) == b"a" * 10_000
        with pytest.raises(LoadError, match="too large"):
            Container(buffer, contents, within(Limit(9_000), Path("net")))
    else:
        with pytest.raises(Unsafe, match="never does"):
            Container(buffer, contents, room)


@pytest.fixture(scope="module")
def samples() -> dict[str, Sample]:
    return fuzz_archives.samples()


@pytest.mark.parametrize("sample", ["weights.pt", "script.pt", "program.pt2", "older.pt2"])
def test_inspect_names_what_load_refuses(
    samples: dict[str, Sample], sample: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / sample
    path.write_bytes(samples[sample][0])
    with zipfile.ZipFile(path, "a") as archive:
        odd = "odd.PY" if sample == "older.pt2" else f"{archive.namelist()[0].split('/')[0]}/odd.PY"
        archive.writestr(odd, b"")
    with pytest.raises(LoadError, match=r"'odd\.PY'"):
        load(path)
    assert any("'odd.PY'" in why for why in inspect_file(path).found.suspicious)
    assert run(["inspect", str(path)]) == 3
    said = capsys.readouterr()
    assert "suspicious: nothing" not in said.out
    assert "'odd.PY'" in said.out


def test_no_archive_of_a_stranger_is_read_by_pythons_own_reader() -> None:
    package = Path(bntool.__file__).parent
    users = [p.name for p in package.rglob("*.py") if "zipfile" in p.read_text(encoding="utf-8")]
    # The index of architectures is a file of bntool's own, in the user's cache.
    assert users == ["architectures.py"]
    loaders = [p.name for p in package.rglob("*.py") if "np.load(" in p.read_text(encoding="utf-8")]
    assert set(loaders) <= {"architectures.py", "repro.py"}
