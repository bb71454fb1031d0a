"""Run the tests on each mutant of one module. Started by `tools.sweeps.mutants` in a copy of the repository.

A mutant costs little more than the tests that can notice it: every run is a fork of this process, which has
imported what takes long and is never changed, and has seen once which tests enter which functions of the
module and how long each takes. A mutant meets those that enter its function, those first that noticed most.
"""

from __future__ import annotations

import ast
import collections
import contextlib
import gc
import importlib
import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HEAVY = """torch._dynamo torch.export torch.onnx torch.testing torchvision timm onnx onnxruntime onnxscript
    safetensors.torch torchinfo hypothesis rich.console click msgspec""".split()
"""What takes long to import. Never bntool or its tests: those are new in every fork."""
SLOW = 5.0
"""Seconds; a test that takes longer is not asked."""
MEMORY = 6 * 2**30
"""Bytes that a mutant may take."""
IMPORTED = "imported"
"""Stands among the tests for what runs when they are imported."""
TOLD, SAID = Path("told.json"), Path("said.txt")
"""Where a fork leaves what it found, and what it prints."""


class Learning:
    """Notes which functions of the module each test enters, by their first line, and its seconds."""

    def __init__(self, module: str) -> None:
        self.file = str(Path(module).resolve())
        self.tests: dict[str, tuple[float, list[int]]] = {}

    def _watch(self, name: str) -> Iterator[None]:
        entered: set[int] = set()

        def note(frame: Any, *_: Any) -> None:
            if frame.f_code.co_filename == self.file:
                entered.add(frame.f_code.co_firstlineno)

        start = time.process_time()
        threading.settrace(note)
        sys.settrace(note)
        yield
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]
        self.tests[name] = time.process_time() - start, sorted(entered)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_collection(self) -> Iterator[None]:
        yield from self._watch(IMPORTED)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        yield from self._watch(item.nodeid)

    def pytest_sessionfinish(self) -> None:
        TOLD.write_text(json.dumps(self.tests), encoding="utf-8")


class Chosen:
    """Runs these tests in this order, and tells which one fails."""

    def __init__(self, names: list[str]) -> None:
        self.order = {name: place for place, name in enumerate(names)}

    def pytest_configure(self) -> None:
        from hypothesis import Phase, settings

        quick = settings(settings(), phases=[Phase.explicit, Phase.generate])  # one example will do
        settings.register_profile("mutant", quick)
        settings.load_profile("mutant")

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted((i for i in items if i.nodeid in self.order), key=lambda i: self.order[i.nodeid])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            TOLD.write_text(json.dumps(report.nodeid), encoding="utf-8")


def forked(limit: float, plugin: object, *arguments: str) -> int:
    """The exit code of pytest in a fork of this process, or a negative number where its time was up."""
    child = os.fork()
    if not child:
        signal.alarm(int(limit) + 1)
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        with SAID.open("w", encoding="utf-8") as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
        off = [f"-pno:{name}" for name in ("cacheprovider", "xdist", "anyio")]
        code = 99
        with contextlib.suppress(BaseException):  # whatever a mutant does, it ends here
            code = pytest.main(["-xq", "--assert=plain", "--timeout=0", *off, *arguments], [plugin])
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Asked:
    """The tests of one module, and which of them are asked about a mutant."""

    def __init__(self, module: str, paths: list[str]) -> None:
        if forked(1800, Learning(module), *paths):
            raise SystemExit(f"{module}: the tests fail without a change\n{SAID.read_text()}")
        self.tests: dict[str, tuple[float, list[int]]] = json.loads(TOLD.read_text(encoding="utf-8"))
        self.always = (None, *self.tests.pop(IMPORTED)[1])
        self.source = Path(module).read_text(encoding="utf-8")
        self.noticed: collections.Counter[str] = collections.Counter()
        Path(importlib.util.cache_from_source(module)).unlink(missing_ok=True)  # that of another mutant
        sys.dont_write_bytecode, os.environ["PYTHONDONTWRITEBYTECODE"] = True, "1"
        gc.freeze()  # else each fork's first collection copies all that was imported

    def about(self, line: int) -> list[str]:
        """The tests that enter the function of this line, or all where it runs on import."""
        first = function(self.source, line)
        concerned = lambda lines: first in self.always or first in lines  # noqa: E731
        able = [n for n, (seconds, lines) in self.tests.items() if seconds < SLOW and concerned(lines)]
        return sorted(able, key=lambda name: (-self.noticed[name], self.tests[name][0]))

    def run(self, names: list[str], timeout: float) -> tuple[str, str]:
        """What the tester's own `run_tests` gives: the outcome, and what is told of it."""
        if not names:
            return "survived", "no test enters the function"
        TOLD.unlink(missing_ok=True)
        files = dict.fromkeys(name.partition("::")[0] for name in names)
        usual = sum(self.tests[name][0] for name in names)
        if not forked(timeout + 3 * usual, Chosen(names), "--tb=no", *files):
            return "survived", f"{len(names)} tests"
        name = json.loads(TOLD.read_text(encoding="utf-8")) if TOLD.is_file() else ""
        self.noticed[name] += 1
        return "killed", name


def function(source: str, line: int) -> int | None:
    """The first line of the innermost function whose body holds this line."""
    first, inner = None, 0
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef):
            continue
        body = node.body[0].lineno
        if inner < body <= line <= (node.end_lineno or body):
            first, inner = min([node.lineno, *(d.lineno for d in node.decorator_list)]), body
    return first


def main(session: str, module: str, minutes: str, tester: str, *paths: str) -> int:
    """0 when all mutants of the session were run, 3 when the time was up before."""
    end = time.monotonic() + 60 * float(minutes)
    sys.path.append(tester)  # last: what both environments have, the tests find in theirs
    import cosmic_ray.mutating as tested  # type: ignore[import-not-found]
    from cosmic_ray.work_db import use_db  # type: ignore[import-not-found]

    for name in HEAVY:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    asked = Asked(module, list(paths))
    tested.run_tests = asked.run
    with use_db(session) as db:
        for item in list(db.pending_work_items):
            if time.monotonic() > end:
                return 3
            (mutation,) = item.mutations
            start, line = time.monotonic(), mutation.start_pos[0]
            result = tested.mutate_and_test(item.mutations, asked.about(line), 20.0)
            db.set_result(item.job_id, result)
            taken = f"{time.monotonic() - start:.1f} s"
            print(f"line {line}: {result.test_outcome.value} in {taken}: {result.output}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
