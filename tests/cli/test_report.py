"""`bntool report`, and `--report` of other commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import bntool as bntool_package
from tests.cli import nets
from tests.cli.conftest import Said, Shell
from tests.report import documents


@pytest.fixture
def written(folder: Path) -> Path:
    path = folder / "fold.json"
    path.write_text(json.dumps(documents.fold()), encoding="utf-8")
    return path


def test_a_report_of_several_documents(bntool: Shell, folder: Path, written: Path) -> None:
    (folder / "compare.json").write_text(json.dumps(documents.compare()), encoding="utf-8")
    said = bntool("report", "fold.json", "compare.json")
    assert (said.code, said.out) == (0, "wrote       report.html\n")
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count('<article class="chapter"') == 2
    assert bntool("report", "fold.json").code == 0  # a report replaces a report


def test_what_is_no_report_is_not_replaced(refused: Callable[..., Said], folder: Path, written: Path) -> None:
    (folder / "page.html").write_text("<html>my own</html>", encoding="utf-8")
    refused("report", "fold.json", "-o", "page.html", code=2, says="exists already")
    refused("report", "fold.json", "-o", "fold.json", "--force", code=2, says="is the input itself")


def test_markdown_goes_to_stdout_or_a_file(bntool: Shell, folder: Path, written: Path) -> None:
    said = bntool("report", "fold.json", "--format", "md")
    assert said.out.startswith("## BatchNorm folded")
    assert bntool("report", "fold.json", "-o", "r.md", "--json").document["format"] == "md"
    assert (folder / "r.md").read_text(encoding="utf-8") == said.out


def test_single_figures(bntool: Shell, refused: Callable[..., Said], folder: Path, written: Path) -> None:
    assert bntool("report", "fold.json", "--figure", "checks", "-o", "checks.svg").code == 0
    assert (folder / "checks.svg").read_text(encoding="utf-8").startswith("<svg")
    assert bntool("report", "fold.json", "--figure", "norms", "-o", "norms.png").code == 0
    assert (folder / "norms.png").read_bytes().startswith(b"\x89PNG")
    refused("report", "fold.json", "-o", "x.svg", code=2, says="the figures are delta, parameters")
    refused("report", "fold.json", "--figure", "nun", "-o", "x.svg", code=2, says="there is no figure nun")


def test_bad_documents(refused: Callable[..., Said], folder: Path) -> None:
    (folder / "new.json").write_text('{"schema_version": 9, "sites": []}', encoding="utf-8")
    (folder / "foreign.json").write_text('{"name": "left-pad"}', encoding="utf-8")
    (folder / "torn.json").write_text('{"schema_version": 1, "si', encoding="utf-8")
    refused("report", "new.json", code=3, says="schema version 9")
    refused("report", "foreign.json", code=3, says="not a document of bntool")
    refused("report", "torn.json", "--json", code=3, says="cannot be read as JSON")
    refused("report", "none.json", code=3, says="no such file")
    refused("report", code=2)


def test_fold_draws_and_prints_the_same(bntool: Shell, folder: Path) -> None:
    torch.save(nets.normalised(), folder / "model.pt")
    said = bntool("fold", "model.pt", *nets.INPUT, "--json", "--report", "fold.html")
    assert said.code == 0, said
    document = said.document
    assert document["command"] == "fold"
    before, after = (document["model"][side]["layers"] for side in ("before", "after"))
    folded = [site["bn"] for site in document["sites"]]
    assert folded
    names = [row["name"] for row in after]
    assert set(folded).isdisjoint(names)
    assert [row["name"] for row in before if row["name"] not in folded] == names
    assert [norm["name"] for norm in document["model"]["norms"]] == folded
    assert f'option value="0">{folded[0]}<' in (folder / "fold.html").read_text(encoding="utf-8")


def test_a_report_counts_the_layers_that_a_summary_counts(bntool: Shell, folder: Path) -> None:
    """A Dropout does nothing here, one layer never runs, and a fold leaves an Identity."""
    model = nn.Sequential(*nets.normalised(), nn.Dropout(), nn.Flatten(), nn.Linear(2 * 64, 3)).eval()
    model[0].idle = nn.Linear(2, 2)
    x = torch.zeros(1, 3, 12, 12)
    torch.save(model, folder / "m.pt")
    torch.export.save(torch.export.export(model, (x,)), folder / "m.pt2")
    bntool_package.export_onnx(model, (x,), folder / "m.onnx")
    for kind, counts in (("pt", (9, 7)), ("pt2", (6, 4)), ("onnx", (6, 4))):
        given = nets.INPUT if kind == "pt" else ()
        said = bntool("fold", f"m.{kind}", *given, "--json", "--report", "r.html", "--force").document
        page = (folder / "r.html").read_text(encoding="utf-8")
        for side, file, count in zip(("before", "after"), (f"m.{kind}", said["output"]), counts, strict=True):
            document = bntool("summary", file, *given, "--json").document
            assert len(document["layers"]) == said["model"][side]["count"] == count, (kind, side)
            assert f", {count} layers" in page


def test_insert_draws_the_newcomers(bntool: Shell, folder: Path) -> None:
    torch.save(nets.plain(), folder / "model.pt")
    said = bntool("insert", "model.pt", *nets.INPUT, "--report", "insert.html")
    assert said.code == 0, said
    assert "wrote       insert.html" in said.out
    assert ">inserted</button>" in (folder / "insert.html").read_text(encoding="utf-8")


def test_a_failed_verification_is_drawn_too(bntool: Shell, folder: Path) -> None:
    model = nets.normalised()
    torch.save(model, folder / "a.pt")
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)
    torch.save(model, folder / "b.pt")
    said = bntool("verify", "b.pt", "a.pt", *nets.INPUT, "--report", "verify.html")
    assert said.code == 1
    page = (folder / "verify.html").read_text(encoding="utf-8")
    assert "check-failed" in page
    assert "First differs at" in page


def test_a_report_that_cannot_be_written_is_told_before_any_work(
    refused: Callable[..., Said], folder: Path
) -> None:
    torch.save(nets.plain(), folder / "model.pt")
    (folder / "notes.html").write_text("mine", encoding="utf-8")
    refused("insert", "model.pt", *nets.INPUT, "--report", "notes.html", code=2, says="exists already")
    refused("insert", "model.pt", *nets.INPUT, "--report", "no/where.html", code=2, says="does not exist")


def test_onnx_files_are_drawn_by_their_nodes(bntool: Shell, folder: Path) -> None:
    torch.save(nets.normalised(), folder / "model.pt")
    assert bntool("export", "model.pt", *nets.INPUT).code == 0
    document = bntool("fold", "model.onnx", "--json", "--report", "onnx.html").document
    folded = {site["bn"] for site in document["sites"]}
    assert folded
    assert folded <= {row["name"] for row in document["model"]["before"]["layers"]}
    assert ">folded</button>" in (folder / "onnx.html").read_text(encoding="utf-8")


def test_a_report_is_drawn_without_torch(folder: Path, written: Path) -> None:
    code = (
        "import sys; from bntool.cli import run; code = run(['report', 'fold.json']); "
        "assert not {'torch', 'numpy', 'onnx', 'onnxruntime'} & set(sys.modules); sys.exit(code)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=_here()
    )
    assert (ran.returncode, ran.stderr) == (0, "")


def _here() -> dict[str, str]:
    """The environment, with the bntool that is being tested first on the path."""
    place = str(Path(bntool_package.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (place, os.environ.get("PYTHONPATH"))))}
