"""The GitHub Action and the pre-commit hook of this repository: their steps are run as they stand."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parents[1]
bash = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")


@pytest.fixture
def shell(tmp_path, monkeypatch):
    """Runs a script in an empty folder where `bntool` is this checkout's."""
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "bin"
    place.mkdir()
    (place / "bntool").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m bntool "$@"\n')
    (place / "bntool").chmod(0o755)
    told = {
        "PATH": f"{place}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "GITHUB_OUTPUT": str(tmp_path / "output"),
        "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md"),
    }

    def run(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
        full = {**os.environ, **told, **env}
        return subprocess.run(words, env=full, capture_output=True, text=True, check=False)

    return run


def steps(shell, **inputs: str) -> list[subprocess.CompletedProcess[str]]:
    """Every step of the action after the installation, as GitHub runs them: to the first that fails."""
    action = yaml.safe_load((ROOT / "action.yml").read_text())
    values = {name: str(one.get("default", "")) for name, one in action["inputs"].items()} | inputs
    done, failed = [], False
    for step in action["runs"]["steps"][1:]:
        if failed and step.get("if") != "always()":
            continue
        env = {
            name: re.sub(r"\$\{\{ inputs\.([\w-]+) \}\}", lambda found: values[found[1]], text)
            for name, text in step["env"].items()
        }
        assert "${{" not in step["run"], "what a user gives goes through the environment"
        done.append(shell("bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"], **env))
        failed = failed or done[-1].returncode != 0
    return done


def folds() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()


def kept() -> nn.Module:
    return nn.Sequential(nn.Sigmoid(), nn.BatchNorm2d(3), nn.Sigmoid()).eval()


@bash
def test_the_action_folds_verifies_and_reports(shell):
    torch.save(folds(), "net.pt")
    done = steps(shell, model="net.pt", options="--input 1x3x9x9")
    assert [step.returncode for step in done] == [0, 0, 0], done
    assert sorted(p.name for p in Path("bntool-out").iterdir() if "json" not in p.name) == [
        "folded.onnx",
        "folded.pt",
    ]
    assert Path("output").read_text() == "document=bntool-out/fold.json\n"
    assert "**1** BatchNorms folded" in Path("summary.md").read_text()


@bash
def test_the_action_fails_where_one_is_kept_and_still_reports(shell):
    torch.save(kept(), "net.pt")
    done = steps(shell, model="net.pt", options="--input 1x3x9x9")
    assert [step.returncode for step in done] == [4, 0], done
    assert "none of the 1 BatchNorm layers can be folded" in Path("summary.md").read_text()


@bash
def test_the_hook_looks_at_every_model(shell):
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    assert re.search(hook["files"], "models/net.pt")
    assert not re.search(hook["files"], "net.py")
    torch.save(folds(), "good.pt")
    torch.save(kept(), "kept.pt")
    entry = [*shlex.split(hook["entry"]), "--input", "1x3x9x9"]
    failed = shell(*entry, "good.pt", "kept.pt")
    assert failed.returncode == 4
    assert "1 of 1" in failed.stdout  # the first passed
    assert "next:" in failed.stderr
    assert not list(Path.cwd().glob("*folded*"))
