from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from bntool.api import load
from bntool.core.errors import UsageError
from bntool.files.atomic import sha256_of, write_atomically
from bntool.files.saving import save_model


def _new(path: Path) -> None:
    path.write_bytes(b"new")


def _names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_an_existing_output_needs_force_and_keeps_its_permissions(tmp_path: Path) -> None:
    output = tmp_path / "a.pt"
    write_atomically(output, _new)
    output.write_bytes(b"old")
    output.chmod(0o640)
    with pytest.raises(UsageError) as caught:
        write_atomically(output, _new)
    assert "--force" in caught.value.next_step
    assert output.read_bytes() == b"old"
    write_atomically(output, _new, force=True)
    assert output.read_bytes() == b"new"
    assert stat.S_IMODE(output.stat().st_mode) == 0o640
    assert _names(tmp_path) == ["a.pt"]


def test_a_new_output_follows_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "a.pt", _new)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.pt").stat().st_mode) == 0o640


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    output = tmp_path / "a.pt"
    output.write_bytes(b"old")

    def fails(path: Path) -> None:
        path.write_bytes(b"half")
        raise error

    with pytest.raises(error):
        write_atomically(output, fails, force=True)
    assert output.read_bytes() == b"old"
    assert _names(tmp_path) == ["a.pt"]


def test_a_full_disk_is_a_usage_error(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    (tmp_path / "a.pt").write_bytes(b"old")
    code = (
        "import resource, signal, sys\n"
        "from bntool.api import load; from bntool.files.saving import save_model\n"
        "from bntool.core.errors import UsageError\n"
        "loaded = load(sys.argv[1]); signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))\n"
        "try:\n    save_model(loaded, loaded.model, sys.argv[2], force=True)\n"
        "except UsageError as error:\n    assert 'cannot write' in error.what, error\n"
        "else:\n    raise SystemExit('no error')\n"
    )
    assert resource
    torch.save(nn.Linear(300, 300), tmp_path / "in.pt")
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "in.pt"), str(tmp_path / "a.pt")], check=True, timeout=120
    )
    assert (tmp_path / "a.pt").read_bytes() == b"old"
    assert _names(tmp_path) == ["a.pt", "in.pt"]


def test_the_input_is_never_the_output(tmp_path: Path) -> None:
    source = tmp_path / "in.pt"
    source.write_bytes(b"in")
    (tmp_path / "link.pt").symlink_to(source)
    os.link(source, tmp_path / "hard.pt")
    for name in ("in.pt", "link.pt", "hard.pt", "./../" + tmp_path.name + "/in.pt"):
        with pytest.raises(UsageError, match="the input itself"):
            write_atomically(tmp_path / name, _new, force=True, forbid=[source])
    assert source.read_bytes() == b"in"


def test_a_links_target_is_replaced_not_the_link(tmp_path: Path) -> None:
    (tmp_path / "real.pt").write_bytes(b"old")
    (tmp_path / "link.pt").symlink_to("real.pt")
    (tmp_path / "dangling.pt").symlink_to("made.pt")
    write_atomically(tmp_path / "link.pt", _new, force=True)
    write_atomically(tmp_path / "dangling.pt", _new)
    assert (tmp_path / "link.pt").is_symlink()
    assert (tmp_path / "real.pt").read_bytes() == b"new"
    assert (tmp_path / "made.pt").read_bytes() == b"new"


def test_outputs_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for output in (tmp_path, tmp_path / "none" / "a.pt", tmp_path / "file" / "a.pt", tmp_path / "pipe"):
        with pytest.raises(UsageError) as caught:
            write_atomically(output, _new, force=True)
        assert caught.value.next_step

    def refused(*args: object, **options: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(UsageError, match="Permission denied"):
        write_atomically(tmp_path / "a.pt", _new)


def test_one_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    output = tmp_path / "a.pt"

    def slow(path: Path) -> None:
        path.write_bytes(b"new")
        output.write_bytes(b"someone else's")

    with pytest.raises(UsageError, match="exists already"):
        write_atomically(output, slow)
    assert output.read_bytes() == b"someone else's"
    assert _names(tmp_path) == ["a.pt"]


def test_sha256_of_more_than_one_block(tmp_path: Path) -> None:
    data = os.urandom((1 << 20) + 17)
    (tmp_path / "a").write_bytes(data)
    assert sha256_of(tmp_path / "a") == hashlib.sha256(data).hexdigest()


def test_of_a_model_that_cannot_be_pickled_the_weights_are_written(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "in.pt")
    loaded = load(tmp_path / "in.pt")
    loaded.model.odd = lambda x: x  # type: ignore[assignment]
    save_model(loaded, loaded.model, tmp_path / "out.pt")
    assert _names(tmp_path) == ["in.pt", "out.pt"]
    assert list(torch.load(tmp_path / "out.pt")) == ["weight", "bias"]


def test_same_model_same_bytes_whatever_the_hash_seed_and_name(tmp_path: Path) -> None:
    code = (
        "import sys, torch; from torch import nn\n"
        "from bntool.api import load; from bntool.files.saving import save_model\n"
        "loaded = load(sys.argv[1]); print(save_model(loaded, loaded.model, sys.argv[2]))"
    )
    net = nn.Sequential(nn.Linear(2, 2))
    for name in ("alpha", "beta", "gamma", "delta", "epsilon"):
        net.register_buffer(name, torch.zeros(2), persistent=False)
    torch.save(net, tmp_path / "module.pt")
    hashes = {
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "module.pt"), str(tmp_path / f"out{seed}.pt")],
            env={**os.environ, "PYTHONHASHSEED": str(seed)}, check=True, capture_output=True, text=True,
        ).stdout
        for seed in (1, 2, 3)
    }  # fmt: skip
    assert len(hashes) == 1
    again = load(tmp_path / "out1.pt").model
    assert again._non_persistent_buffers_set == net._non_persistent_buffers_set
