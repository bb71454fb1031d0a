"""Golden files, reproducible property tests, and the gate for tests that need a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

GOLDEN = Path(__file__).with_name("golden")

# Derandomised: a red run is red again when repeated. No deadline: machines differ.
settings.register_profile("reproducible", derandomize=True, deadline=None)
settings.load_profile("reproducible")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--regold", action="store_true", help="write the golden files anew")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    needing_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not needing_gpu:
        return
    import torch

    # A promised GPU that is not there fails the tests: skipping would look like a pass.
    if not torch.cuda.is_available() and os.environ.get("BNTOOL_EXPECT_GPU") != "1":
        for item in needing_gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def mnist_root() -> Path:
    """The folder of MNIST/raw: $BNTOOL_DATA, else `data` in the project, else `shared/data` beside it."""
    project = Path(__file__).resolve().parents[1]
    given = os.environ.get("BNTOOL_DATA")
    places = [Path(given)] if given else [project / "data", project.parent / "shared" / "data"]
    for place in places:
        if (place / "MNIST" / "raw" / "train-images-idx3-ubyte").is_file():
            return place
    pytest.skip("MNIST is not here: set BNTOOL_DATA to the folder that holds MNIST/raw")


@pytest.fixture(scope="session", autouse=True)
def _cache_of_this_session(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What bntool keeps for the user, kept for these tests alone."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def _next_steps_can_be_typed() -> Iterator[None]:
    """Every error that a test has the command line print: its next step is parsed as it stands.

    At the end one of each wording is typed where it was told, and must not lead to the same error.
    """
    import bntool.cli as face
    from tests.next_steps import Typed, faults

    speaker, runner = face._speaker, face._run
    typed, words = Typed(), list[list[str]]()

    def running(argv: list[str]) -> int:
        words.append(argv)
        try:
            return runner(argv)
        finally:
            words.pop()

    def checked(as_json: bool, command: str, *, whole: bool) -> Callable[[Any], int]:
        fail = speaker(as_json, command, whole=whole)

        def told(error: Any) -> int:
            code = fail(error)
            wrong = faults(error.next_step, command)
            assert not wrong, f"next: {error.next_step}\n{wrong}"
            typed.remember(error, command, words[-1] if words else [])
            return code

        return told

    face._speaker, face._run = checked, running
    yield
    face._speaker, face._run = speaker, runner
    wrong = typed.loops()
    assert not wrong, "\n".join(wrong)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare a text with the golden file of that name; `--regold` writes the file instead."""

    def compare(name: str, text: str) -> None:
        path = GOLDEN / name
        if request.config.getoption("--regold"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"{text}\n", encoding="utf-8", newline="\n")
        if not path.exists():
            pytest.fail(f"no golden file {name}; write it with `pytest --regold` and read it")
        assert f"{text}\n" == path.read_text(encoding="utf-8")

    return compare
