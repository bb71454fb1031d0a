"""--allow as it is typed: what an error proposes, what is let in, what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.cli import nets
from tests.cli.conftest import Shell

CLASSES = [f"ConvolutionWithNormNumber{i}" for i in range(30)]


@pytest.fixture
def saved(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model of thirty classes of two modules of a package, whose code lies here."""
    package = folder / "wide_pkg"
    package.mkdir()
    (package / "__init__.py").touch()
    for part in range(2):
        blocks = "".join(f"class {name}(nn.Sequential): pass\n" for name in CLASSES[part::2])
        (package / f"part{part}.py").write_text(f"from torch import nn\n{blocks}")
    monkeypatch.syspath_prepend(str(folder))
    parts = [__import__(f"wide_pkg.part{part}", fromlist=["part"]) for part in range(2)]
    layers = [getattr(parts[i % 2], name)() for i, name in enumerate(CLASSES)]
    layers[0].append(nets.normalised())
    torch.save(torch.nn.Sequential(*layers).eval(), "wide.pt")
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_STATE_HOME", str(folder.parent / "state"))
    for module in ("wide_pkg.part0", "wide_pkg.part1", "wide_pkg"):
        nets.forget(module)
    return "wide.pt"


def test_all_names_are_listed_and_the_flag_works_as_typed(bntool: Shell, saved: str) -> None:
    refused = bntool("fold", saved, *nets.INPUT)
    assert refused.code == 3
    told = bntool("fold", saved, *nets.INPUT, "--json").document["error"]["what"]
    for i, name in enumerate(CLASSES):
        assert f"wide_pkg.part{i % 2}.{name}" in refused.err
        assert f"wide_pkg.part{i % 2}.{name}" in told
    (flag,) = re.findall(r"--allow \S+", refused.err)
    assert flag == "--allow wide_pkg.*"
    done = bntool("fold", saved, *nets.INPUT, *flag.split())
    assert done.code == 0, done.err
    assert all(name in done.out + done.err for name in CLASSES)
    assert Path("wide_folded.pt").is_file()


@pytest.mark.parametrize("entry", ["numpy.load", "os.*", "*", "bntool.cli.run", "wide_pkg.part0.nn"])
@pytest.mark.parametrize("command", ["fold", "summary", "insert"])
def test_what_is_never_let_in_is_a_wrong_option(bntool: Shell, saved: str, command: str, entry: str) -> None:
    said = bntool(command, saved, "--allow", entry)
    assert said.code == 2
    assert "refused" in said.err or "names no class" in said.err
    assert sorted(p.name for p in Path().iterdir()) == ["wide.pt", "wide_pkg"]
