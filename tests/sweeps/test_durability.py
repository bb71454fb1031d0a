"""A sample of `make durability`; the drafts that killed writers leave; an ONNX file and its data as one."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from bntool.api import load
from bntool.files.atomic import write_atomically
from bntool.files.drafts import draft_folder
from bntool.files.onnx_files import open_onnx, put_onnx, save_onnx
from bntool.files.placing import Placed, place, remove_unnamed
from bntool.files.saving import save_model
from bntool.files.targets import Target

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the writers are forked and killed")
def test_writers_killed_interrupted_and_on_a_full_disk() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "tools.sweeps.durability", "--kills", "6", "--full", "6",
         "--interrupts", "3", "--together", "0.1", "--pairs", "30"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "6 times kill -9" in ran.stdout
    assert "6 times disk full" in ran.stdout
    assert "30 pairs at one moment, without force: exactly one of each wrote" in ran.stdout


def _names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_what_a_killed_writer_left_goes_and_what_another_writes_stays(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    code = (
        "import os, sys; from pathlib import Path; from bntool.files.drafts import draft_folder\n"
        "with draft_folder(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'half').write_bytes(b'x'); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.pt")], check=False)
    (left,) = _names(tmp_path)
    for name in (".bntool-0123456789ab.draft", ".bntool-notes.draft"):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (0, time.time() - 120))
    (tmp_path / ".bntool-ba9876543210.draft").mkdir()
    (tmp_path / ".bntool-fedcba987654.draft").symlink_to(tmp_path.parent)
    (pipe := tmp_path / ".bntool-aaaaaaaaaaaa.draft").mkdir()
    os.mkfifo(pipe / "lock")
    with draft_folder(tmp_path / "b.pt") as other:
        write_atomically(tmp_path / "a.pt", lambda path: path.write_bytes(b"new") and None)
        kept = ["notes", "ba9876543210", "fedcba987654", "aaaaaaaaaaaa"]
        assert _names(tmp_path) == sorted([*(f".bntool-{k}.draft" for k in kept), other.name, "a.pt"])
    assert left not in _names(tmp_path)


def _write_onnx(path: Path, value: float) -> None:
    weight = numpy_helper.from_array(np.full((20, 20), value, np.float32), "w")
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 20]) for n in "xy"]
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "g", ends[:1], ends[1:], [weight])
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 18)])
    onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=100)


def _value(path: Path) -> float:
    onnx.checker.check_model(str(path), full_check=True)
    return float(numpy_helper.to_array(onnx.load(path).graph.initializer[0]).mean())


def test_an_onnx_file_keeps_its_data_until_the_new_one_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in (1.0, 2.0, 3.0, 4.0):
        _write_onnx(tmp_path / f"in{value}.onnx", value)
    output = tmp_path / "out.onnx"
    sources = [n for n in _names(tmp_path) if n.startswith("in")]
    for value, data in ((1.0, "out.onnx.data"), (2.0, "out.onnx.data.1"), (3.0, "out.onnx.data")):
        _, written = save_onnx(open_onnx(tmp_path / f"in{value}.onnx"), output, force=True)
        assert written == tmp_path / data
        assert _value(output) == value
        assert [n for n in _names(tmp_path) if n not in sources] == ["out.onnx", data]

    def dies(draft: Path, path: Path, *, replace: bool) -> Placed:
        if path == output:
            raise KeyboardInterrupt
        return place(draft, path, replace=replace)

    monkeypatch.setattr("bntool.files.drafting.place", dies)
    with pytest.raises(KeyboardInterrupt):
        save_onnx(open_onnx(tmp_path / "in4.0.onnx"), output, force=True)
    assert _value(output) == 3.0
    assert [n for n in _names(tmp_path) if n not in sources] == ["out.onnx", "out.onnx.data"]


@pytest.mark.parametrize("by_bntool", [True, False])
def test_data_that_another_model_reads_stays(tmp_path: Path, by_bntool: bool) -> None:
    """An earlier result was renamed, and still reads the data that went with its first name."""
    _write_onnx(tmp_path / "source.onnx", 1.0)
    output, renamed = tmp_path / "out.onnx", tmp_path / "renamed.onnx"
    if by_bntool:
        save_onnx(open_onnx(tmp_path / "source.onnx"), output)
    else:
        _write_onnx(output, 1.0)
    renamed.write_bytes(output.read_bytes())
    _write_onnx(tmp_path / "other.onnx", 2.0)
    for source in ("other.onnx", "renamed.onnx"):
        _, data = save_onnx(open_onnx(tmp_path / source), output, force=True)
        assert data is not None and data.name != "out.onnx.data"
        assert _value(renamed) == 1.0
    output.unlink()
    _, data = save_onnx(open_onnx(tmp_path / "other.onnx"), output)
    assert (_value(renamed), _value(output)) == (1.0, 2.0)


@pytest.mark.parametrize(
    ("other", "content"),
    [
        ("models/copy.onnx", b"\x12\x0dd\xc3\xa4ta.bin\x1a"),
        ("models/index.json", json.dumps({"w": "d\u00e4ta.bin"}).encode()),
        ("models/index.json", json.dumps({"w": "d\u00e4ta.bin"}, ensure_ascii=False).encode()),
        ("above.onnx", b"\x12\x14models/d\xc3\xa4ta.bin\x1a"),
        ("models/below/deep.onnx", b"\x12\x10../d\xc3\xa4ta.bin\x1a"),
    ],
)
def test_old_data_stays_while_any_file_near_names_it(tmp_path: Path, other: str, content: bytes) -> None:
    data, new, reader = (
        tmp_path / "models" / "d\u00e4ta.bin",
        tmp_path / "models" / "new.onnx",
        tmp_path / other,
    )
    for folder in (data.parent, reader.parent):
        folder.mkdir(exist_ok=True)
    data.write_bytes(b"numbers")
    new.write_bytes(content)  # the model that is being written: what it names is asked of others alone
    reader.write_bytes(content)
    remove_unnamed(data, {new})
    assert data.read_bytes() == b"numbers"
    reader.write_bytes(content.replace(b"ta.bin", b"ta.bin.1"))  # the data that came after it
    remove_unnamed(data, {new})
    assert not data.exists()


def test_a_foreign_data_file_stays_though_its_model_is_replaced(tmp_path: Path) -> None:
    _write_onnx(tmp_path / "in.onnx", 1.0)
    _write_onnx(tmp_path / "out.onnx", 2.0)
    before = (tmp_path / "out.onnx.data").read_bytes()
    (tmp_path / "out.onnx.data.1").symlink_to("nowhere")
    _, data = save_onnx(open_onnx(tmp_path / "in.onnx"), tmp_path / "out.onnx", force=True)
    assert data == tmp_path / "out.onnx.data.2"
    assert (tmp_path / "out.onnx.data").read_bytes() == before
    assert _value(tmp_path / "out.onnx") == 1.0


def test_a_moved_model_goes_to_the_links_target_and_keeps_its_permissions(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    _write_onnx(tmp_path / "there" / "real.onnx", 1.0)
    (tmp_path / "there" / "real.onnx").chmod(0o640)
    (tmp_path / "link.onnx").symlink_to("there/real.onnx")
    target = Target(force=True)
    path = target.claim(tmp_path / "link.onnx")
    with target.drafts() as drafts:
        folder = drafts.folder_for(path)
        assert folder.parent.parent == tmp_path / "there"
        _write_onnx(folder / "link.onnx", 2.0)
        put_onnx(folder / "link.onnx", folder / "link.onnx.data", path, drafts)
    assert drafts.part_of(path) == tmp_path / "there" / "real.onnx.data.1"
    assert (tmp_path / "link.onnx").is_symlink()
    assert _value(tmp_path / "there" / "real.onnx") == 2.0
    assert (tmp_path / "there" / "real.onnx").stat().st_mode & 0o777 == 0o640


def test_a_full_disk_is_told_in_the_systems_words(tmp_path: Path) -> None:
    pytest.importorskip("resource")
    code = (
        "import resource, signal, sys, torch; from torch import nn\n"
        "from bntool.api import load; from bntool.files.saving import save_model\n"
        "torch.save(nn.Linear(300, 300), sys.argv[1]); loaded = load(sys.argv[1])\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9999, 9999))\n"
        "save_model(loaded, loaded.model, sys.argv[2])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "in.pt"), str(tmp_path / "out.pt")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.stderr.splitlines()[-2].endswith("out.pt: File too large")


def test_ctrl_c_while_torch_writes_stays_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's writer turns what interrupts it into a RuntimeError, which must not read as a failed write."""
    path = tmp_path / "in.pt"
    torch.save(nn.Linear(30, 30), path)
    loaded = load(path)
    save = torch.save

    class Interrupted(io.BytesIO):
        def write(self, block: bytes) -> int:  # type: ignore[override]
            if self.tell():
                raise KeyboardInterrupt
            return super().write(block)

    monkeypatch.setattr(torch, "save", lambda held, _, **options: save(held, Interrupted(), **options))
    with pytest.raises(KeyboardInterrupt):
        save_model(loaded, loaded.model, tmp_path / "out.pt")
    assert _names(tmp_path) == ["in.pt"]
