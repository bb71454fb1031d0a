"""TorchScript archives: looked at, folded in their own graph, exported; hostile ones are never loaded."""

from __future__ import annotations

import io
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.cli import nets
from tests.cli.conftest import Said, Shell

Refused = Callable[..., Said]


def _script(module: nn.Module, how: str = "trace") -> torch.jit.ScriptModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if how == "script":
            return torch.jit.script(module)
        return torch.jit.trace(module, torch.zeros(1, 3, 12, 12))


def _save(module: torch.jit.ScriptModule, path: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(module, path)


def _load(path: str) -> torch.jit.ScriptModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.load(path)


class Kept(nn.Module):
    """One BatchNorm behind its convolution, and one in front of it, which torch's pass leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 4, 3)
        self.last = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.conv(self.first(x)))


@pytest.mark.parametrize("how", ["trace", "script"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_fold_in_the_scripted_graph(bntool: Shell, how: str, dtype: torch.dtype) -> None:
    module = nets.normalised()
    _save(_script(module, how).to(dtype), "net.pt")
    before = Path("net.pt").read_bytes()
    said = bntool("fold", "net.pt", *nets.INPUT, "--json")
    assert said.code == 0, said
    assert [site["bn"] for site in said.document["sites"]] == ["1", "4"]
    assert said.document["skips"] == []
    (check,) = said.document["checks"]
    assert check["passed"]
    assert (check["stage"], check["precision"]) == ("fold", "float64")
    assert check["relative"] <= 1e-10
    assert any("deprecated" in note for note in said.document["notes"])
    folded = _load("net_folded.pt")
    assert "batch_norm" not in str(folded.inlined_graph)
    x = torch.randn(2, 3, 12, 12, dtype=dtype)
    # One rounding of each folded weight to the storage type, and two dozen products per output.
    bound = 64 * torch.finfo(dtype).eps
    torch.testing.assert_close(folded(x), module.to(dtype)(x), rtol=bound, atol=bound * 8)
    assert Path("net.pt").read_bytes() == before


def test_what_torch_leaves_is_told(bntool: Shell) -> None:
    _save(_script(Kept().eval()), "net.pt")
    said = bntool("fold", "net.pt", *nets.INPUT, "--json")
    assert said.code == 0
    assert [site["bn"] for site in said.document["sites"]] == ["last"]
    assert [(skip["bn"], skip["reason"]) for skip in said.document["skips"]] == [("first", "scripted")]
    assert bntool("fold", "net.pt", *nets.INPUT, "--force", "--require-all").code == 4


def test_a_module_without_batchnorm_has_nothing_to_fold(refused: Refused) -> None:
    _save(_script(nets.plain()), "net.pt")
    refused("fold", "net.pt", *nets.INPUT, code=4, says="has no BatchNorm")


def test_statistics_that_are_not_finite(refused: Refused) -> None:
    module = nets.normalised()
    module[1].running_var[0] = -5
    _save(_script(module), "net.pt")
    refused("fold", "net.pt", *nets.INPUT, "--check", "none", code=7, says="not finite")


def test_summary_and_export(bntool: Shell) -> None:
    _save(_script(nets.normalised()), "net.pt")
    document = bntool("summary", "net.pt", *nets.INPUT, "--json").document
    expected = sum(p.numel() for p in nets.normalised().parameters())
    assert document["totals"]["parameters"] == expected
    assert "BatchNorm2d" in {layer["type"] for layer in document["layers"]}
    said = bntool("export", "net.pt", *nets.INPUT, "--json")
    assert said.code == 0, said
    assert Path("net.onnx").is_file()


@pytest.mark.parametrize("command", ["insert", "calibrate"])
def test_what_is_not_done_to_it_is_said(refused: Refused, command: str) -> None:
    _save(_script(nets.normalised()), "net.pt")
    data = ("--data", "x.npy") if command == "calibrate" else ()
    refused(command, "net.pt", *data, code=2, says="is TorchScript")


class WritesAtLoad(nn.Module):
    @torch.jit.export
    def __getstate__(self) -> tuple[Tensor, bool]:
        return torch.zeros(1), True

    @torch.jit.export
    def __setstate__(self, state: tuple[Tensor, bool]) -> None:
        torch.save(state[0], "marker")
        self.training = state[1]

    def forward(self, x: Tensor) -> Tensor:
        return x


class WritesWhenRun(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        torch.save(x, "marker")
        return x


@pytest.mark.parametrize("module", [WritesAtLoad, WritesWhenRun])
def test_code_that_reaches_files_is_refused_before_it_is_loaded(
    bntool: Shell, refused: Refused, module: type[nn.Module]
) -> None:
    _save(_script(module(), "script"), "evil.pt")
    refused("summary", "evil.pt", code=3, says="reaches files")
    said = bntool("inspect", "evil.pt", "--json")
    assert said.code == 3
    assert "names save" in said.document["suspicious"][0]
    assert not Path("marker").exists()


class LoopsAtLoad(nn.Module):
    @torch.jit.export
    def __getstate__(self) -> bool:
        return self.training

    @torch.jit.export
    def __setstate__(self, state: bool) -> None:
        self.training = state
        while self.training:
            pass

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_code_that_runs_while_it_is_loaded_is_refused(bntool: Shell, refused: Refused) -> None:
    _save(_script(LoopsAtLoad(), "script"), "evil.pt")
    refused("summary", "evil.pt", code=3, says="__setstate__")
    assert "__setstate__" in bntool("inspect", "evil.pt", "--json").document["suspicious"][0]


@pytest.mark.parametrize("member", ["data.pkl", "constants.pkl"])
def test_objects_nested_without_end_are_refused(refused: Refused, member: str) -> None:
    """torch's own reader ends the process with a segmentation fault."""
    Path("evil.pt").write_bytes(_with({member: b"\x80\x02)" + b"\x85" * 100_000 + b"."}))
    refused("summary", "evil.pt", code=3, says="nests its objects")


def _with(contents: dict[str, bytes]) -> bytes:
    """An archive in which members hold something else."""
    source, target = io.BytesIO(), io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(_script(nets.plain()), source)
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for member in old.infolist():
            new.writestr(member.filename, contents.get(Path(member.filename).name, old.read(member)))
    return target.getvalue()


def _with_code(code: bytes) -> bytes:
    """An archive whose forward says something else."""
    source, target = io.BytesIO(), io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(_script(nets.plain()), source)
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for member in old.infolist():
            content = old.read(member)
            new.writestr(member.filename, content + code if member.filename.endswith(".py") else content)
    return target.getvalue()


@pytest.mark.parametrize(
    "code",
    [
        b"\n    torch . save(x, 'marker')",
        b"\n    ops.aten.from_file('marker')",
        b"\n    ops.rpc_thing.call(x)",
        b"\n    y = ops\n",
        b"\n    z = __torch__.torch.classes.odd.Thing()",
        b"\n    torch.\\\n  save(x, 'marker')",
    ],
)
def test_every_way_to_write_it_is_refused(refused: Refused, code: bytes) -> None:
    Path("evil.pt").write_bytes(_with_code(code))
    refused("summary", "evil.pt", code=3, says="refused unread")
    assert not Path("marker").exists()


def test_a_cut_or_damaged_archive(refused: Refused) -> None:
    _save(_script(nets.plain()), "net.pt")
    content = bytearray(Path("net.pt").read_bytes())
    at = content.find(b"conv")
    content[at] ^= 0xFF
    Path("net.pt").write_bytes(content)
    refused("summary", "net.pt", code=3, says="damaged")
