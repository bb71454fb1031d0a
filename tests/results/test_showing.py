"""Results in a notebook: one is executed, and every result is looked at as its HTML and its Markdown."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from torch import nn

import bntool
from bntool.core.showing import Column, Said, Table, html_of, markdown_of

ROOT = Path(__file__).resolve().parents[2]
CELLS = {
    "summary": "bntool.summary(model, (1, 1, 9, 9), baseline=nn.Sequential(nn.Linear(2, 2)))",
    "plan": "bntool.plan_insert(model, (x,))",
    "result": "inserted = bntool.insert(model, (x,)); inserted",
    "fold": "folded = bntool.fold(inserted.model, (x,)); folded",
    "comparison": "bntool.verify(inserted.model, folded.model, (x,))",
    "check": "folded.checks[0]",
    "training": "compare_training(model, thirds(24, 12), SETTINGS, Path('c'))",
}
BEFORE = """
import torch, bntool
from pathlib import Path
from torch import nn
from bntool.experiment.comparison import compare_training
from bntool.experiment.settings import Settings
from tests.experiment.nets import classifier, thirds
SETTINGS = Settings(epochs=1, batch_size=12, lrs=(0.05,))
model, x = classifier(), torch.zeros(1, 1, 9, 9)
"""


class Seen(HTMLParser):
    """Rows of tables as lists of cells, and the text around them; tags must close as they opened."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(page)
        assert self.tags == []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.tags.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.tags[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        else:
            self.text += data


@pytest.mark.filterwarnings("ignore")  # of the kernel's own event loop
def test_a_notebook_shows_every_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    code = [BEFORE, *CELLS.values()]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in code])
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources=resources).execute()
    shown = {}
    for name, cell in zip(CELLS, notebook.cells[1:], strict=True):
        (output,) = [out for out in cell.outputs if out.output_type == "execute_result"]
        assert {"text/plain", "text/html", "text/markdown"} <= set(output.data), name
        shown[name] = Seen(output.data["text/html"])
        assert "|" in output.data["text/markdown"], name
    heads = {name: page.rows[0] for name, page in shown.items()}
    assert heads["summary"][:3] == ["Layer", "Name", "Input"]
    assert "Conv2d-1" in [row[0] for row in shown["summary"].rows]
    assert "changed" in [row[0] for row in shown["summary"].rows]
    assert heads["plan"] == heads["result"] == ["Layer", "Activation", "New BatchNorm", "Channels", "Form"]
    assert heads["fold"] == ["BatchNorm", "Verdict"]
    assert "2 of 2 BatchNorm layers folded" in shown["fold"].text
    assert heads["comparison"] == heads["check"]
    assert heads["check"][4:6] == ["Relative", "its limit"]
    assert heads["training"][0] == "Network"


EVIL = "<img src=x onerror=alert(1)>|[a](http://x)\n`b`"


def test_a_name_is_only_a_name() -> None:
    parts = [
        EVIL,
        Table((Column("Name"), Column("n", True)), [[EVIL, "1"]], EVIL, ["total", "1"]),
        Said(EVIL),
    ]
    page = Seen(html_of(parts))
    assert page.rows[1] == [EVIL.replace("\n", r"\n"), "1"]
    assert page.text.count("onerror") == 3
    told = markdown_of(parts)
    assert "<img" not in told
    assert [line for line in told.splitlines() if len(re.findall(r"(?<!\\)\|", line)) not in (0, 3)] == []


def test_the_parts_are_those_of_the_text() -> None:
    summary = bntool.summary(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), (1, 3, 8, 8))
    page = Seen(summary._repr_html_())
    assert page.rows[2][:2] == ["BatchNorm2d-2", "1"]
    assert page.rows[-1][-3:] == ["240", "0", "17"]
    for line in summary.render(200).splitlines():
        if line.startswith(("parameters", "note")):
            assert " ".join(line.split())[:40] in " ".join(page.text.split())
