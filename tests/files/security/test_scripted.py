"""The code of a TorchScript archive reaches nothing beyond the model, however its names are spelt."""

from __future__ import annotations

import contextlib
import io
import time
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bntool.core.errors import LoadError
from bntool.files.security.archives import Unsafe
from bntool.files.security.containers import SCRIPT, Container
from bntool.files.security.scripted import check_script, read_script


class Net(nn.Module):
    """A number for a child's name, so that the code reads it by getattr."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
        self.classes = 3

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.classes


def _members(module: nn.Module | None = None) -> dict[str, bytes]:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(module or Net()), buffer)
    with zipfile.ZipFile(buffer) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _container(members: dict[str, bytes]) -> Container:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return Container(buffer, SCRIPT)


def _with(line: str) -> dict[str, bytes]:
    """An archive whose forward begins with this line."""
    members = _members()
    (name,) = [n for n in members if n.endswith("test_scripted.py")]
    head, forward, body = members[name].partition(b"-> Tensor:\n")
    assert forward
    members[name] = head + forward + b"    " + line.encode() + b"\n" + body
    return members


WRITES = {
    "octal": 'getattr(torch, "sa\\166e")(x, "marker")',
    "parts": 'getattr(torch, "sa" "ve")(x, "marker")',
    "parts-of-ops": 'getattr(ops.aten, "sa\\166e")(x, "marker")',
    "three-quotes": 'getattr(torch, """save""")(x, "marker")',
    "one-quote": "getattr(torch, 'save')(x, 'marker')",
    "plain": 'torch.save(x, "marker")',
    "renamed": 't = torch; t.save(x, "marker")'.replace("; ", "\n    "),
}


@pytest.mark.parametrize("way", WRITES)
def test_no_spelling_of_a_writer_passes(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    members = _with(WRITES[way])
    with pytest.raises(Unsafe, match=r"names (save|an attribute)"):
        check_script(_container(members))
    # It does write where it is run.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        container = _container(members)
        container.file.seek(0)
        torch.jit.load(container.file)(torch.zeros(1, 2))
    assert Path("marker").exists()


@pytest.mark.parametrize(
    "line",
    [
        'getattr(getattr(self, "body"), "0" "")',
        'y = getattr(self, "\\142ody")',
        'getattr (torch, "x")',
        "g = getattr",
        'getattr(torch,"x")',
        'y = getattr(self.other(x, "getattr(a, \\"b\\")"), "sa" "ve")',
        "y = __torch__",
        "y = __torch__.torch",
        "y = __torch__ .torch.classes.a.B()",
        "y = (__torch__.torch\n    .classes.a.B)()",
        'y = getattr(__torch__.torch, "classes")',
        "y = __torch__.torch.classes.quantized.X()",
        "y : __torch__.torch.classes.quantized.X = x",
        "y = ops.image.read_file(x)",
        'y = getattr(ops, "image")',
        "y = (ops\n    .image).read_file(x)",
        "y = (ops # of torch\n    .image).read_file(x)",
        "y = ops.__torch__",
        "y = x.from_file('a', False, 3)",
        "y = rpc_async(x)",
    ],
)
def test_nothing_that_could_be_put_together_otherwise_passes(line: str) -> None:
    with pytest.raises(Unsafe):
        check_script(_container(_with(line)))


def test_honest_code_passes(tmp_path: Path) -> None:
    members = _members()
    code = b"".join(content for name, content in members.items() if name.endswith(".py"))
    assert b"getattr(" in code
    assert b".classes" in code
    check_script(_container(members))
    check_script(_container(_with("y = __torch__.torchvision.ops.misc.Thing.make(x)")))
    check_script(_container(_with("y = ops.torchvision.nms(x, x, 0.5)")))
    check_script(_container(_with('y = getattr(getattr(getattr(self, "body"), "1"), "a-b")')))
    file = _container(members).file
    file.seek(0)
    (tmp_path / "net.pt").write_bytes(file.readall())
    assert isinstance(read_script(tmp_path / "net.pt"), torch.jit.ScriptModule)


@pytest.mark.parametrize(
    "member", ["data.pkl", "constants.pkl", "traced_inputs.pkl", "code/__torch__/a.py.debug_pkl"]
)
@pytest.mark.parametrize(
    "name",
    [b"__torch__.torch.classes.a\nB\n", b"__torch__.torch\nclasses.a.B\n", b"__torch__\ntorch.classes.a.B\n"],
)
def test_a_pickle_makes_no_object_of_a_cpp_class(member: str, name: bytes) -> None:
    members = _members()
    root = next(iter(members)).split("/")[0]
    members[f"{root}/{member}"] = b"\x80\x02c" + name + b")\x81."
    with pytest.raises(Unsafe, match=r"C\+\+ classes in"):
        check_script(_container(members))


@pytest.mark.parametrize(
    "code",
    [
        b"getattr(" * 200_000,
        b'getattr(a, "b"), ' * 100_000,
        b"getattr(" * 100_000 + b"a" + b', "b")' * 100_000,
        b"__torch__." * 200_000,
        b"ops" + b" " * 1_000_000 + b"ops",
        b"torch " * 300_000,
    ],
)
def test_code_made_to_take_long_to_search_does_not(code: bytes) -> None:
    members = _members()
    root = next(iter(members)).split("/")[0]
    members[f"{root}/code/__torch__/slow.py"] = code
    container = _container(members)
    started = time.process_time()
    with contextlib.suppress(Unsafe):
        check_script(container)
    assert time.process_time() - started < 5


def test_code_under_another_name_is_not_overlooked(tmp_path: Path) -> None:
    """torch finds code whatever its case; what is not searched is not loaded."""
    members = _with('torch.save(x, "marker")')
    (name,) = [n for n in members if n.endswith("test_scripted.py")]
    for other in (name[:-3] + ".PY", name[:-3] + ".Py", name.replace("code/", "CODE/"), name.upper()):
        path = tmp_path / "net.pt"
        with zipfile.ZipFile(path, "w") as archive:
            for n, content in members.items():
                archive.writestr(other if n == name else n, content)
        with pytest.raises(LoadError, match="refused unread"):
            read_script(path)


@pytest.mark.parametrize(
    "nested", [b"(" * 200_000 + b")" * 200_000, b"not " * 200_000 + b"x", b"-" * 100_000 + b"1"], ids=len
)
def test_code_nested_deeper_than_any_program_is_refused_before_it_is_parsed(nested: bytes) -> None:
    from bntool.files.security.archives import Unsafe
    from bntool.files.security.scripted import _check_code

    _check_code(b"def forward(self, x):\n  return ((x))\n", "net.py")
    with pytest.raises(Unsafe, match="nests its code"):
        _check_code(b"def forward(self, x):\n  y = " + nested + b"\n", "net.py")
