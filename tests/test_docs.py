"""What README and docs tell people to type is typed here, page by page; what they link to exists."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch

import bntool
from bntool.cli import cli, run
from bntool.laws.base import LAWS
from tools.docs import draw_laws

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
NOT_TYPED = ("pip", "make", "torchrun")
"""Lines that set a machine up, or whose tests stand elsewhere (tests/distributed)."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to type in, with nothing but the sample."""
    shutil.copyfile(ROOT / "samples" / "model.pt", tmp_path / "model.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path


def _blocks(page: Path) -> Iterator[tuple[str, str]]:
    """The language and the text of every fenced block of a page, in order."""
    yield from re.findall(
        r"^```(\w+)\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )


def _type(page: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Do what a reader of the page does, from top to bottom; returns what was said to `bntool` lines."""
    said: list[str] = []
    names: dict[str, Any] = {"__name__": "page"}
    for language, text in _blocks(page):
        if language == "python":
            _python(text, page, names)
        elif language == "sh":
            said += [_line(line, page, capsys) for line in text.splitlines()]
    return "\n".join(said)


def _python(text: str, page: Path, names: dict[str, Any]) -> None:
    named = re.match(r"# (\S+\.py)\n", text)
    if named:
        Path(named[1]).write_text(text, encoding="utf-8")
    else:
        exec(compile(text, page.name, "exec"), names)


def _line(line: str, page: Path, capsys: pytest.CaptureFixture[str]) -> str:
    words, _, target = line.split(" #", maxsplit=1)[0].strip().partition(" > ")
    program, *rest = words.split() or [""]
    rest = [word.strip("'") for word in rest]
    if program == "bntool":
        capsys.readouterr()
        code = run(rest)
        said = capsys.readouterr()
        allowed = (0, 5) if rest == ["doctor"] else (0,)
        assert code in allowed, f"{page.name}: {line}\n{said.err}"
        if target:
            Path(target).write_text(said.out, encoding="utf-8")
        return said.out
    if program == "python":
        done = subprocess.run([sys.executable, *rest], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{page.name}: {line}\n{done.stderr}"
        return done.stdout
    if program == "for":
        shell = f'bntool() {{ {sys.executable} -m bntool "$@"; }}\n{line}'
        done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), page.name
        return done.stdout
    if words not in ("", "mkdir tutorial", "cd tutorial", "cp ../samples/model.pt ."):
        assert program in NOT_TYPED, f"{page.name}: nothing runs {line!r}"
    return ""


def _shown(page: Path) -> Iterator[str]:
    """The lines of output that a page shows, but for figures that differ from machine to machine."""
    for language, text in _blocks(page):
        if language == "text":
            yield from (
                line for line in text.splitlines() if line and not re.search(r"\de[-+]\d|KiB|…|^$", line)
            )


# -- what a page expects to find in the folder -------------------------------------------------------------


def _photos() -> None:
    image = pytest.importorskip("PIL.Image")
    Path("photos").mkdir()
    pixels = np.random.default_rng(0).integers(256, size=(4, 72, 72, 3), dtype=np.uint8)
    for number, one in enumerate(pixels):
        image.fromarray(one).save(f"photos/{number}.png")


def _downloaded() -> None:
    """What `--pretrained` would load down lies where torch looks first."""
    models = pytest.importorskip("torchvision.models")
    checkpoints = Path(os.environ["TORCH_HOME"]) / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    for name in ("shufflenet_v2_x0_5", "squeezenet1_1"):
        file = models.get_model_weights(name).DEFAULT.url.rsplit("/", 1)[1]
        torch.save(models.get_model(name, weights=None).state_dict(), checkpoints / file)
    _photos()


BEFORE: dict[str, Callable[[], None]] = {
    "pretrained.md": _downloaded,
}
NEEDS = {
    "calibrating.md": "PIL",
    "tutorial.md": "matplotlib torchvision jinja2 vl_convert",
    "reporting.md": "jinja2 vl_convert",
    "ci.md": "jinja2 vl_convert torchvision",
    **dict.fromkeys(("README.md", "detection.md", "pretrained.md", "state-dict.md"), "torchvision"),
}
TYPED = [
    page
    for page in PAGES
    if page.name != "reasons.md"  # its examples run in test_explanations
    and {"sh", "python"} & {language for language, _ in _blocks(page)}
]


# -- the tests ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", TYPED, ids=lambda p: p.stem)
def test_what_a_page_says_works_to_the_letter(
    page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in NEEDS.get(page.name, "").split():
        pytest.importorskip(module)
    monkeypatch.setenv("TORCH_HOME", str(folder / "torch"))
    BEFORE.get(page.name, lambda: None)()
    said = _type(page, capsys).splitlines()
    for line in _shown(page):
        assert line in said, f"{page.name} shows {line!r}"


def test_pages_that_tell_people_to_type_are_found() -> None:
    assert {page.stem for page in TYPED} >= {"README", "tutorial", "ci", "gpu", "reporting", "comparing"}


def test_the_readme_compares_as_it_was_measured() -> None:
    pages = [(path.read_text(encoding="utf-8")) for path in (ROOT / "README.md", DOCS / "peers.md")]
    shown, measured = (re.findall(r"\| ([\d,]{5,}) \| (\d\d\.\d) \|", page) for page in pages)
    assert len(shown) == 5
    assert set(shown) == set(measured)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_every_link_leads_somewhere(page: Path) -> None:
    prose = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", prose):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_file_of_code_that_a_page_names_exists() -> None:
    named = re.compile(r"`((?:\w+/)*test_\w+\.py|(?:tests|tools|bntool|samples)/[\w/]+\.py)[\s`]")
    text = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
    missing = {
        f"{page}: {name}"
        for page, said in text.items()
        for name in named.findall(said)
        if not ((ROOT / name).exists() or (ROOT / "tests" / name).exists())
    }
    assert not missing


def test_every_option_that_a_page_names_is_one_of_its_command() -> None:
    context = click.Context(cli)
    commands = {name: cli.get_command(context, name) for name in cli.list_commands(context)}
    known = {
        name: {word for one in command.params for word in (*one.opts, *one.secondary_opts)} | {"--help"}
        for name, command in commands.items()
        if command is not None
    }
    wrong = set()
    for page in PAGES:
        for command, rest in re.findall(
            r"bntool ([a-z]+)\b((?:[^\n`|;]|\n(?! *\n))*)", page.read_text(encoding="utf-8")
        ):
            words = re.findall(r"(?<![\w-])--?[a-z][\w-]*", rest.partition("\n")[0])
            wrong |= {
                f"{page.name}: {command} {word}" for word in words if word not in known.get(command, words)
            }
    assert not wrong


def test_no_page_holds_two_versions_of_itself() -> None:
    """What a merge leaves where two people changed one place."""
    marked = re.compile(r"^(<{7} |={7}$|>{7} )", re.MULTILINE)
    pages = [*PAGES, ROOT / "CHANGELOG.md"]
    assert [page.name for page in pages if marked.search(page.read_text(encoding="utf-8"))] == []


def test_the_algebra_names_every_law_and_shows_every_drawing() -> None:
    text = (DOCS / "algebra.md").read_text(encoding="utf-8")
    laws = {up.__qualname__.split(".")[0] for up, _ in LAWS.values()}
    assert laws
    assert {law for law in laws if f".{law}`" not in text} == set()
    assert set(re.findall(r"\(laws/(\S+)\.svg\)", text)) == set(draw_laws.DRAWINGS)


@pytest.mark.parametrize("name", draw_laws.DRAWINGS)
def test_a_drawing_is_up_to_date(name: str) -> None:
    drawn = (draw_laws.FOLDER / f"{name}.svg").read_text(encoding="utf-8")
    assert drawn == draw_laws.svg(draw_laws.DRAWINGS[name]), "run: python tools/docs/draw_laws.py"


def test_the_reference_has_every_public_name() -> None:
    text = (DOCS / "reference" / "python.md").read_text(encoding="utf-8")
    named = set(re.findall(r"bntool\.(\w+)", text))
    assert {name for name in bntool.__all__ if not name.startswith("__")} - named == set()


def test_the_faq_answers_all_the_needs() -> None:
    text = (DOCS / "faq.md").read_text(encoding="utf-8")
    numbers = [int(number) for number in re.findall(r"^### (\d+)\. ", text, flags=re.MULTILINE)]
    assert numbers == list(range(1, 35))


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """Strict: links and anchors that lead nowhere, pages that no menu names, docstrings that do not parse."""
    pytest.importorskip("sphinx")
    line = [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "dummy", str(DOCS), str(tmp_path / "site")]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
