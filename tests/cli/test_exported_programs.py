"""`.pt2` files at the command line: what is folded, and what is refused before any of it runs."""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import bntool as package
from tests.cli import nets
from tests.cli.conftest import Said, Shell
from tests.files.security.hostile_programs import (
    ARCHIVES,
    DEAD,
    IMPORTED,
    LIVE,
    OLD,
    Members,
    members_of,
    old_members,
    saved,
    small_program,
    torch_zip,
    write,
)


@pytest.fixture(scope="module")
def program() -> torch.export.ExportedProgram:
    return small_program()


@pytest.fixture(scope="module")
def content(program: torch.export.ExportedProgram) -> bytes:
    return saved(program)


@pytest.fixture
def members(content: bytes) -> Members:
    return members_of(content)


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a payload would leave its trace; the module that makes it on import can be found."""
    path, source = tmp_path / "marker", tmp_path / "importable"
    source.mkdir()
    (source / f"{IMPORTED}.py").write_text(f"open({str(path)!r}, 'w').close()\ndef make(): ...\n")
    monkeypatch.syspath_prepend(str(source))
    monkeypatch.delitem(sys.modules, IMPORTED, raising=False)
    return path


# -- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*LIVE, *DEAD])
def test_a_hostile_part_is_refused_before_it_runs(
    name: str, members: Members, marker: Path, refused: Callable[..., Said], folder: Path
) -> None:
    {**LIVE, **DEAD}[name](members, str(marker))
    write(folder / "model.pt2", members)
    refused("fold", "model.pt2", code=3)
    refused("summary", "model.pt2", "--json", code=3)
    assert not marker.exists()


@pytest.mark.parametrize("name", LIVE)
def test_the_payloads_are_live_where_nothing_stops_them(
    name: str, members: Members, marker: Path, folder: Path
) -> None:
    LIVE[name](members, str(marker))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Most fail after the payload ran.
        with contextlib.suppress(Exception):
            torch.export.load(write(folder / "model.pt2", members)).module()(torch.randn(2, 3, 8, 8))
    assert marker.exists()


@pytest.mark.parametrize("name", ARCHIVES)
def test_an_archive_that_is_not_what_torch_wrote_is_refused(
    name: str, members: Members, refused: Callable[..., Said], folder: Path
) -> None:
    ARCHIVES[name](folder / "model.pt2", members)
    refused("fold", "model.pt2", code=3)


@pytest.mark.parametrize("member", OLD)
def test_a_hostile_part_of_the_old_format_is_refused(
    member: str,
    program: torch.export.ExportedProgram,
    marker: Path,
    refused: Callable[..., Said],
    folder: Path,
) -> None:
    write(folder / "old.pt2", {**old_members(program), member: torch_zip(str(marker))}, root="")
    refused("fold", "old.pt2", code=3, says="pickle")
    assert not marker.exists()


def test_compiled_packages_and_unknown_operators_say_what_they_are(
    members: Members, refused: Callable[..., Said], folder: Path
) -> None:
    DEAD["compiled"](members, "")
    write(folder / "compiled.pt2", members)
    refused("fold", "compiled.pt2", code=3, says="AOTInductor")


def test_an_operator_that_is_not_there_is_named(
    members: Members, refused: Callable[..., Said], folder: Path
) -> None:
    DEAD["operator-unknown"](members, "")
    write(folder / "custom.pt2", members)
    refused("fold", "custom.pt2", code=3, says="mylib.thing.default")


# -- what is read -----------------------------------------------------------------------------------------


def test_what_torch_saved_is_folded_and_the_result_computes_the_same(
    content: bytes, bntool: Shell, folder: Path
) -> None:
    (folder / "model.pt2").write_bytes(content)
    said = bntool("fold", "model.pt2", "--export", "onnx", "--json")
    assert said.code == 0, said
    document = said.document
    assert (document["bn_folded"], document["bn_total"]) == (1, 1)
    assert document["sites"][0]["bn"] == "bn"
    assert {c["stage"] for c in document["checks"]} == {"fold", "export", "runtime"}
    assert all(c["passed"] for c in document["checks"])
    assert (folder / "model.pt2").read_bytes() == content
    side = json.loads((folder / "model_folded.pt2.bntool.json").read_text())
    assert side["source"]["sha256"] == package.load(folder / "model.pt2").source_hash
    folded = torch.export.load(folder / "model_folded.pt2")
    assert not any("batch_norm" in str(node.target) for node in folded.graph.nodes)
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    before = torch.export.load(folder / "model.pt2").module()(x)
    after = folded.module()(x)
    # One float32 convolution of 27 products, of numbers below 10: 27 roundings of 6e-8 each.
    assert (after - before).abs().max() <= 27 * 6e-8 * before.abs().max()
    assert bntool("verify", "model_folded.pt2", "model.pt2").code == 0
    assert bntool("verify", "model_folded.onnx", "model.pt2").code == 0
    assert bntool("summary", "model_folded.pt2", "--json").document["batch_norms"] == 0


def test_summary_names_every_tensor(content: bytes, bntool: Shell, folder: Path) -> None:
    (folder / "model.pt2").write_bytes(content)
    document = bntool("summary", "model.pt2", "--json").document
    kinds = {row["name"]: row["kind"] for row in document["tensors"]}
    assert kinds["conv.weight"] == "trainable"
    assert kinds["bn.running_mean"] == kinds["offset"] == kinds["gain"] == "buffer"
    assert kinds["constant"] == "constant"
    # conv 4·3·3·3, γ and β; mean, variance, the counter, gain and offset
    assert document["totals"]["parameters"] == 108 + 8
    assert document["totals"]["buffers"] == 8 + 1 + 4 + 1
    assert document["batch_norms"] == 1
    assert document["totals"]["constants"] == sum(
        row["elements"] for row in document["tensors"] if row["kind"] == "constant"
    )
    assert "BatchNorm2d-" in bntool("summary", "model.pt2").out


def test_the_old_format_is_read(program: torch.export.ExportedProgram, bntool: Shell, folder: Path) -> None:
    write(folder / "old.pt2", old_members(program), root="")
    assert bntool("fold", "old.pt2", "--check", "fast").code == 0
    assert (folder / "old_folded.pt2").is_file()


def test_a_dry_run_writes_nothing_and_force_is_needed_to_replace(
    content: bytes, bntool: Shell, refused: Callable[..., Said], folder: Path
) -> None:
    (folder / "model.pt2").write_bytes(content)
    assert bntool("fold", "model.pt2", "--dry-run").code == 0
    assert [p.name for p in folder.iterdir()] == ["model.pt2"]
    (folder / "model_folded.pt2").write_bytes(b"mine")
    refused("fold", "model.pt2", code=2, says="--force")
    refused("fold", "model.pt2", "-o", "model.pt2", "--force", code=2, says="the input itself")
    refused("fold", "model.pt2", "-o", "model.pt", code=2, says="same kind")
    assert bntool("fold", "model.pt2", "--force", "--check", "none").code == 0


def test_a_program_takes_identity_norms(bntool: Shell, folder: Path) -> None:
    image = torch.randn(1, 3, 8, 8)
    torch.export.save(torch.export.export(nets.plain().eval(), (image,)), folder / "plain.pt2")
    document = bntool("insert", "plain.pt2", "--json").document
    assert [site["bn"] for site in document["sites"]] == ["0_bn"]
    assert document["parameters"]["delta"]["trainable"] == 2 * 4
    before, after = (torch.export.load(folder / name).module() for name in ("plain.pt2", "plain_bn.pt2"))
    assert torch.equal(before(image), after(image))
    assert bntool("fold", "plain_bn.pt2", "--json").document["bn_folded"] == 1


def test_what_is_not_done_on_a_program_says_so(
    content: bytes, refused: Callable[..., Said], folder: Path
) -> None:
    (folder / "model.pt2").write_bytes(content)
    refused("insert", "model.pt2", "--init", "default", code=2, says="identity-initialised")
    refused("fold", "model.pt2", "--exclude", "bn", code=4)


def test_other_weights_do_not_verify(content: bytes, bntool: Shell, members: Members, folder: Path) -> None:
    (folder / "model.pt2").write_bytes(content)
    members["data/weights/weight_0"] = bytes(len(members["data/weights/weight_0"]))
    write(folder / "other.pt2", members)
    assert bntool("verify", "other.pt2", "model.pt2").code == 1


def test_trust_lets_a_file_do_what_it_likes(
    members: Members, marker: Path, bntool: Shell, folder: Path
) -> None:
    LIVE["inputs-pickle"](members, str(marker))
    write(folder / "model.pt2", members)
    bntool("fold", "model.pt2", "--trust-pickle", "--check", "none")
    assert marker.exists()
