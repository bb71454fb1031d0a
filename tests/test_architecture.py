"""The floors of docs/house.md: a file imports only from its own room or from a lower floor."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import bntool

PACKAGE = Path(__file__).resolve().parents[1] / "bntool"

FLOORS: dict[str, int] = {
    "core": 0,
    "graph": 1,
    "precision": 3,
    "layers": 1,
    "frozen": 1,
    "observe": 2,
    "files": 2,
    "laws": 2,
    "inserting": 3,
    "folding": 3,
    "surgery": 4,
    "runtime": 4,
    "export": 4,
    "report": 4,
    "verifying": 5,
    "results": 5,
    "data": 5,
    "calibrating": 6,
    "subjects": 6,
    "pipeline": 7,
    "source": 8,
    "api": 8,
    "experiment": 9,
    "cli": 10,
    "bntool": 10,
    "__main__": 11,
}
"""Room -> its floor; `bntool` is the package's own `__init__`."""


def _module(path: Path) -> str:
    parts = ("bntool", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {_module(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def _member(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def _named(node: ast.AST) -> Iterator[str]:
    """The modules an import statement names, as far as they are files of the package."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are written in full"
        for alias in node.names:
            submodule = f"{node.module}.{alias.name}"
            yield submodule if submodule in FILES else str(node.module)


def _statements(node: ast.AST, *, for_types: bool) -> Iterator[ast.AST]:
    yield node
    for child in ast.iter_child_nodes(node):
        only_types = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
        if for_types or not only_types:
            yield from _statements(child, for_types=for_types)


def _imports(module: str, *, for_types: bool = True) -> set[str]:
    """What a file imports from the package, anywhere in it; without what only a type checker reads."""
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    named = {name for node in _statements(tree, for_types=for_types) for name in _named(node)}
    return {name for name in named if name.split(".")[0] == "bntool"} - {module}


def _imported_at_once(module: str) -> set[str]:
    """The packages that importing this file alone brings in: not those inside functions."""
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    return {name.split(".")[0] for node in tree.body for name in _named(node)}


def test_every_file_has_a_room_and_every_room_its_files() -> None:
    members = {_member(module) for module in FILES}
    assert members - set(FLOORS) == set(), "give the room a floor in FLOORS"
    assert set(FLOORS) - members == set(), "FLOORS names a room that is gone"
    assert len([path for path in PACKAGE.iterdir() if path.is_file()]) <= 6, "the root holds the face alone"


def test_no_room_hides_a_public_name() -> None:
    """Importing `bntool.x.y` sets `bntool.x`: a room of that name would stand where the function was."""
    assert set(bntool.__all__) & {_member(module) for module in FILES} == set()


@pytest.mark.parametrize("module", FILES)
def test_a_file_imports_from_its_room_or_from_below(module: str) -> None:
    room = _member(module)
    for name in _imports(module):
        assert name in FILES, f"{module} imports {name}, which does not exist"
        other = _member(name)
        fits = other == room or FLOORS[other] < FLOORS[room]
        assert fits, f"{module} ({room}) imports {name} ({other})"


def test_no_file_imports_itself_by_way_of_others() -> None:
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way[way.index(module) :], module))
        if module not in done:
            for name in sorted(_imports(module, for_types=False) & FILES.keys()):
                visit(name, (*way, module))
            done.add(module)

    for module in FILES:
        visit(module, ())


@pytest.mark.parametrize("module", [m for m in FILES if _member(m) == "core"])
def test_the_lowest_floor_needs_nothing_heavy(module: str) -> None:
    assert _imported_at_once(module).isdisjoint({"torch", "numpy", "onnx", "onnxruntime", "click", "rich"})


MOVERS = {"bntool.files.placing", "bntool.files.drafts"}
"""The files that may rename, link and remove: by way of them no file of the user's is lost."""
_MOVING = frozenset("rename renames unlink remove rmdir removedirs link symlink truncate".split())
_MOVING_METHODS = frozenset("rename unlink rmdir hardlink_to symlink_to link_to".split())


def _moves(node: ast.AST) -> bool:
    """Whether a call moves or removes a file. `Path.replace` takes one argument, `str.replace` two."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return False
    owner, name = ast.unparse(node.func.value), node.func.attr
    if owner == "os":
        return name in _MOVING | {"replace"}
    if owner == "shutil":
        return name not in {"get_terminal_size", "which"}
    if name == "replace" and owner != "dataclasses":
        return len(node.args) == 1 and not node.keywords
    return name in _MOVING_METHODS


@pytest.mark.parametrize("module", FILES)
def test_one_place_renames_links_and_removes_files(module: str) -> None:
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    moving = [f"line {node.lineno}: {ast.unparse(node)}" for node in ast.walk(tree) if _moves(node)]
    assert bool(moving) == (module in MOVERS), moving


def _modules_after(code: str) -> set[str]:
    shown = f"{code}\nprint(*sys.modules, sep='\\n', file=sys.stderr)"
    ran = subprocess.run(
        [sys.executable, "-c", shown], capture_output=True, text=True, cwd=PACKAGE.parent, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return {line.split(".")[0] for line in ran.stderr.splitlines()}


def test_importing_bntool_imports_no_torch() -> None:
    loaded = _modules_after("import sys, bntool, bntool.core.plan, bntool.core.explanations")
    assert "bntool" in loaded
    assert loaded.isdisjoint({"torch", "numpy", "onnx", "onnxruntime"})


@pytest.mark.parametrize(
    "command",
    [
        "--help",
        "--version",
        "insert --help",
        "fold --help",
        "compare --help",
        "report --help",
        "explain nonlinear",
    ],
)
def test_help_imports_no_torch(command: str) -> None:
    loaded = _modules_after(
        f"import runpy, sys\nsys.argv = ['bntool', *{command!r}.split()]\n"
        "try:\n    runpy.run_module('bntool', run_name='__main__')\n"
        "except SystemExit as stop:\n    assert not stop.code, stop.code"
    )
    assert "click" in loaded
    assert loaded.isdisjoint({"torch", "numpy", "onnx", "onnxruntime"})


DRAWERS = {
    "bntool.graph.drawing": "the one place that draws inputs",
    "bntool.calibrating.drift": "the spread of a statistic, by simulation",
    "bntool.data.choosing": "the order of samples",
    "bntool.data.loaders": "the order of samples",
    "bntool.experiment.parts": "the order of samples",
    "bntool.experiment.samples": "a loader that draws nothing, kept off the global generator",
    "bntool.experiment.training": "the order of samples",
    "bntool.experiment.watching": "which values of an activation are looked at",
    "bntool.folding.agreement": "the numbers in which two maps are compared",
    "bntool.precision.perturbing": "the rounding of weights",
    "bntool.runtime.trial": "runs alone in a process that imports no torch",
}
"""The files that call a random generator, and what for: inputs are drawn in one place."""
_DRAWING = frozenset(
    "Generator bernoulli bernoulli_ default_rng multinomial normal normal_ poisson rand rand_like randint "
    "randint_like randn randn_like random_ randperm standard_normal uniform uniform_".split()
)


def _draws(node: ast.AST) -> bool:
    """Whether a call makes random numbers; `isinstance(x, torch.Generator)` is none, nor is a seed set."""
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _DRAWING


@pytest.mark.parametrize("module", FILES)
def test_one_place_draws_inputs(module: str) -> None:
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    drawing = [f"line {node.lineno}: {ast.unparse(node)}" for node in ast.walk(tree) if _draws(node)]
    assert bool(drawing) == (module in DRAWERS), drawing
