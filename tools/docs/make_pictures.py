"""Make the pictures of docs/pictures.md anew: `make pictures`.

Every picture is of what the commands print and write: terminals of four widths and a pipe, an executed
notebook in light and dark, four reports at the widths of a phone, a tablet and a desk. Needs Chromium, and
nbconvert:

    python -m tools.docs.make_pictures --nbconvert PATH [--only terminal|notebook|report] [--whole]

`--whole` takes whole pages instead of their beginning, into the working folder, to be looked at.
"""

from __future__ import annotations

import argparse
import fcntl
import io
import os
import pty
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PICTURES = ROOT / "docs" / "pictures"
CHROMIUM = os.environ.get("BNTOOL_CHROMIUM") or shutil.which("chromium") or "chromium"
WIDTHS = (360, 900, 1280)
COLUMNS = "type,name,input,output,kernel,params,percent,mult-adds"
SUMMARY = ("summary", "torchvision:densenet121", "--sort", "mult-adds", "--columns", COLUMNS)
_LINES = (13, 18)
"""Of a long table so many lines from its top and from its end."""
_COLOURS = 128

FUNCTIONAL = '''
import torch
from torch import nn
from torch.nn import functional as F


class Net(nn.Module):
    """Its activations are functions, and one convolution runs twice."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.left = nn.Conv2d(16, 32, 3, padding=1)
        self.right = nn.Conv2d(16, 32, 1)
        self.twice = nn.Conv2d(32, 32, 3, padding=1)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(self.left(x)) + F.relu(self.right(x))
        x = F.relu(self.twice(x))
        x = F.relu(self.twice(x))
        return self.head(x.mean((2, 3)))
'''
CELLS = (
    "import torch, bntool\nfrom samples.seed_network import seed_network\nmodel = seed_network().eval()",
    "bntool.summary(model, (1, 1, 28, 28))",
    "inserted = bntool.insert(model, torch.randn(1, 1, 28, 28))\ninserted",
    "folded = bntool.fold(inserted.model, torch.randn(1, 1, 28, 28))\nfolded",
    "bntool.verify(inserted.model, folded.model, torch.randn(1, 1, 28, 28))",
)


def bntool(*words: str, folder: Path) -> str:
    """What a command prints into a pipe; it must end well."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    environment.pop("COLUMNS", None)
    made = subprocess.run(
        [sys.executable, "-m", "bntool", *words],
        cwd=folder, env=environment, check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    return made.stdout


def in_a_terminal(columns: int, *words: str, folder: Path) -> str:
    """What a command prints into a terminal of so many columns."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
        "TERM": "xterm-256color",
    }
    environment.pop("COLUMNS", None)
    command = [sys.executable, "-m", "bntool", *words]
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdin=its, stdout=its, stderr=subprocess.DEVNULL
    ) as it:
        os.close(its)
        parts = []
        try:
            while part := os.read(ours, 1 << 16):
                parts.append(part)
        except OSError:  # the other end is closed
            pass
    os.close(ours)
    if it.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {it.returncode}")
    return b"".join(parts).decode().replace("\r\n", "\n")


def terminals(folder: Path) -> None:
    """The summary in windows of three widths, in one of 20 columns, and in a pipe."""
    for columns in (80, 120, 200):
        told = in_a_terminal(columns, *SUMMARY, folder=folder)
        draw_text(told, columns, f"terminal-{columns}", f"bntool {' '.join(SUMMARY[:4])}")
    seed = str(ROOT / "samples" / "model.pt")
    narrow = in_a_terminal(20, "summary", seed, folder=folder)
    draw_text(narrow, 20, "terminal-20", "")
    piped = bntool(*SUMMARY, folder=folder)
    draw_text(piped, max(map(len, piped.splitlines())), "pipe", "bntool summary ... | cat")


def draw_text(told: str, columns: int, name: str, title: str) -> None:
    """The text as an SVG that loads nothing; the middle of a long one is left out, and says so."""
    from rich.console import Console
    from rich.text import Text

    lines = [
        line[i : i + columns] for line in told.rstrip().split("\n") for i in range(0, len(line) or 1, columns)
    ]
    first, last = _LINES
    if len(lines) > first + last + 1:
        lines[first:-last] = [f"... {len(lines) - first - last} lines"[:columns]]
    console = Console(record=True, width=columns, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi("\n".join(lines)), soft_wrap=True)
    drawn = console.export_svg(title=title, unique_id=name)
    begin, end = drawn.index("@font-face"), drawn.index(f".{name}-matrix")
    drawn = (drawn[:begin] + drawn[end:]).replace("Fira Code", "DejaVu Sans Mono")
    (PICTURES / f"{name}.svg").write_text(drawn, encoding="utf-8")


def notebook(folder: Path, nbconvert: str) -> Iterator[tuple[str, Path, str, int]]:
    """Pages of an executed notebook in light and in dark."""
    import nbformat
    from nbclient import NotebookClient

    os.environ["PYTHONPATH"] = str(ROOT)
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    NotebookClient(
        made, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    nbformat.write(made, folder / "results.ipynb")
    for theme in ("light", "dark"):
        words = ["--to", "html", f"--HTMLExporter.theme={theme}", "--output", f"notebook-{theme}.html"]
        subprocess.run([nbconvert, *words, "results.ipynb"], cwd=folder, check=True, capture_output=True)
        yield f"notebook-{theme}", folder / f"notebook-{theme}.html", theme, 900


def reports(folder: Path) -> Iterator[tuple[str, Path, str, int]]:
    """Pages of four reports."""
    import numpy as np

    from tests.experiment.nets import NET_CODE, arrays

    (folder / "functional.py").write_text(FUNCTIONAL)
    (folder / "small.py").write_text(NET_CODE)
    images, labels = arrays(600)
    tests = arrays(200, seed=1)
    np.savez(folder / "thirds.npz", x_train=images, y_train=labels, x_test=tests[0], y_test=tests[1])
    training = "--epochs 6 --batch-size 30 --lr 0.01,0.1 --repeats 3 --from-scratch --watch-every 20"
    commands = {
        "resnet50": "fold torchvision:resnet50 -o resnet50.pt",
        "densenet121": "fold torchvision:densenet121 -o densenet121.pt",
        "functional": "insert functional.py:Net --input 1x3x32x32 -o functional.pt",
        "comparison": f"compare small.py:net --data thirds.npz {training}",
    }
    for name, words in commands.items():
        bntool(*words.split(), "--report", f"{name}.html", folder=folder)
        for width in WIDTHS:
            theme = "dark" if name == "densenet121" else "light"
            yield f"{name}-{width}", folder / f"{name}.html", theme, width


def photograph(pages: Iterator[tuple[str, Path, str, int]], whole: Path | None) -> None:
    """A picture of the beginning of each page, or of all of it into the folder `whole`."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for name, path, theme, width in pages:
            height = 1520 if name.startswith("notebook") else 1000
            page: Any = browser.new_page(viewport={"width": width, "height": height}, color_scheme=theme)
            page.route("http**", lambda route: route.abort())
            page.goto(path.as_uri(), wait_until="load")
            if not name.startswith("notebook"):
                page.wait_for_selector("html[data-ready=yes]", state="attached", timeout=60_000)
            shot = page.screenshot(full_page=whole is not None)
            save(shot, (whole or PICTURES) / f"{name}.png", small=whole is None)
            page.close()
        browser.close()


def save(shot: bytes, path: Path, *, small: bool) -> None:
    """As a PNG of few colours, which the kept ones do not need more of."""
    from PIL import Image

    image = Image.open(io.BytesIO(shot)).convert("RGB")
    (image.quantize(_COLOURS) if small else image).save(path, optimize=True)


def main(words: Sequence[str] | None = None) -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--nbconvert", default="jupyter-nbconvert")
    asked.add_argument("--only", choices=("terminal", "notebook", "report"))
    asked.add_argument("--whole", type=Path)
    given = asked.parse_args(words)
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        if given.only in (None, "terminal"):
            terminals(folder)
        if given.only in (None, "notebook"):
            photograph(notebook(folder, given.nbconvert), given.whole)
        if given.only in (None, "report"):
            photograph(reports(folder), given.whole)


if __name__ == "__main__":
    main()
