"""What README and docs tell people to type is typed here; what they link to exists."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from bntool.cli import run

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def _blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def _commands(text: str) -> list[list[str]]:
    lines = (line.split("#")[0].split() for block in _blocks(text, "sh") for line in block.splitlines())
    return [words[1:] for words in lines if words and words[0] == "bntool"]


def test_the_commands_of_the_readme_run_in_their_order(tmp_path, monkeypatch, capsys):
    commands = _commands((ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(commands) >= 6
    shutil.copyfile(ROOT / "samples" / "model.pt", tmp_path / "model.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for words in commands:
        assert run(words) == 0, f"bntool {' '.join(words)}\n{capsys.readouterr()}"
    assert (tmp_path / "model_bn_folded.onnx").is_file()


def test_the_python_of_the_readme_runs(capsys):
    pytest.importorskip("torchvision")
    (block,) = _blocks((ROOT / "README.md").read_text(encoding="utf-8"), "python")
    exec(compile(block, "README.md", "exec"), {})
    assert "20 of 20 BatchNorm layers folded" in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_link_leads_somewhere(page):
    prose = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)\)", prose):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_tutorial_of_the_comparison_works_to_the_letter(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    text = (ROOT / "docs" / "comparing.md").read_text(encoding="utf-8")
    for block in _blocks(text, "python"):
        name = re.match(r"# (\S+\.py)\n", block)
        assert name, block
        (tmp_path / name[1]).write_text(block, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    commands = _commands(text)
    assert len(commands) == 2
    for words in commands:
        assert run(words) == 0, f"bntool {' '.join(words)}\n{capsys.readouterr()}"
    assert (tmp_path / "net_compare" / "net_bn_trained_folded.onnx").is_file()


def test_the_commands_of_the_page_on_reports_run_in_their_order(tmp_path, monkeypatch, capsys):
    text = (ROOT / "docs" / "reporting.md").read_text(encoding="utf-8")
    (block,) = _blocks(text, "sh")
    shutil.copyfile(ROOT / "samples" / "model.pt", tmp_path / "model.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for line in block.splitlines():
        words = line.split("#")[0].split()
        target = words.pop() if ">" in words else ""
        capsys.readouterr()
        assert run([word for word in words[1:] if word != ">"]) == 0, line
        if target:
            (tmp_path / target).write_text(capsys.readouterr().out, encoding="utf-8")
    assert all((tmp_path / name).is_file() for name in ("insert.html", "report.html", "norms.svg"))
