"""Change one thing at a time in bntool's source and see whether the tests notice; writes docs/mutants.md.

Each module is held against the tests that mirror it. The source is changed in a copy of the repository, so a
run that is killed leaves nothing changed, and the next goes on where it stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS, PAGE = ROOT / "docs" / "mutants.jsonl", ROOT / "docs" / "mutants.md"
TESTER = ROOT / ".venv-mutants" / "bin"
WORK = ROOT / ".mutants"
PARTS = ("bntool", "tests", "tools", "samples", "pyproject.toml")
TIME_UP = 3
"""The exit code of `mutant_runner` where mutants are left."""
OPEN = "open"
"""The verdict of a survivor that nobody has looked at."""

_LAWS = "tests/laws/test_roles.py"
_MOVES = f"tests/laws/test_every_element.py tests/laws/test_shapes.py {_LAWS}"
_FOLDING = "tests/folding/test_folding.py tests/folding/test_reasons.py tests/folding/test_field.py"
_SHARED = "tests/folding/test_sharing.py tests/surgery/test_unsharing.py"
TESTS: dict[str, str] = {
    "bntool/verifying/comparing.py": "tests/verifying/test_comparing.py",
    "bntool/verifying/checking.py": "tests/verifying/test_checkers.py tests/verifying/test_checking.py",
    "bntool/verifying/reference.py": "tests/verifying/test_reference.py tests/verifying/test_checking.py",
    "bntool/laws/base.py": "tests/laws/test_base.py",
    "bntool/laws/averaging.py": f"tests/laws/test_averaging.py {_LAWS}",
    "bntool/laws/merging.py": "tests/laws/test_merging.py",
    "bntool/laws/parts.py": _MOVES,
    "bntool/laws/pointwise.py": f"tests/laws/test_pointwise.py {_LAWS}",
    "bntool/laws/sampling.py": f"tests/laws/test_every_element.py tests/laws/test_sampling.py {_LAWS}",
    "bntool/laws/shapes.py": _MOVES,
    "bntool/laws/taking.py": "tests/laws/test_taking.py",
    "bntool/folding/absorbed_branches.py": "tests/folding/test_branches_in_trees.py",
    "bntool/folding/agreement.py": "tests/folding/test_agreement.py tests/folding/test_other_values.py",
    "bntool/folding/weight_edits.py": f"tests/folding/test_weight_edits.py {_SHARED} {_FOLDING}",
    "bntool/folding/merging.py": "tests/folding/test_merging.py tests/folding/test_branches_in_trees.py",
    "bntool/folding/moving.py": f"tests/folding/test_moving.py tests/folding/test_inverse.py {_FOLDING}",
    "bntool/folding/norms.py": f"tests/folding/test_families.py {_FOLDING}",
    "bntool/folding/overwriting.py": f"tests/folding/test_overwriting.py {_FOLDING}",
    "bntool/folding/planner.py": f"tests/folding/test_planner.py tests/folding/test_inverse.py {_FOLDING}",
    "bntool/folding/sharing.py": _SHARED,
}
"""The modules that are mutated, and the tests that must notice."""

Row = dict[str, Any]
HEAD = """# Mutants

How much the tests notice. Written by `make mutants` from `mutants.jsonl`: one thing at a time is changed
in a module (a comparison, a number, an `and`, a sign), and the tests that mirror the module run, without
those that never enter the function or take more than five seconds. A mutant that no test notices
**survives**, and gets a verdict: *equivalent* where nobody can tell it from the original, else why there is
no test for it; without a verdict it is *open*. Left out are mutants of annotations, of what only asserts (a
frozen dataclass, a strict zip), and all but one replacement of each operator and each number.

`make mutants ONLY=comparing` runs the modules whose path has that word, and goes on where it stopped. Where
the tests have changed since, what survived them runs again; what was noticed once is taken to be noticed
still, until the module changes. It is no part of `make test`. Each mutant runs in a fork of a process that
has torch imported: a quarter of a second, and the tests that it meets.
"""
COLUMNS = "| module | mutants | noticed | survive | of those equivalent | open |\n|---|---|---|---|---|---|"


@dataclasses.dataclass(frozen=True)
class Session:
    """One module's mutants: the copy in which it is changed, and the file in which the tester keeps count."""

    module: str
    tests: str

    @property
    def name(self) -> str:
        return self.module.removeprefix("bntool/").removesuffix(".py").replace("/", "-")

    def run(self, minutes: float) -> list[Row] | None:
        """The rows of what survives and one with the counts; None where the time was up before the end."""
        place = WORK / f"{self.name}-{_stamp([ROOT / self.module])}"
        session = place / "session.sqlite"
        self._copy(place)
        if not session.is_file():
            self._prepare(place)
        self._try_again(place, session)
        if not self._execute(place, minutes):
            return None
        dumped = self._tester(place, "cosmic-ray", "dump", session.name)
        return rows(self.module, self.tests, map(json.loads, dumped.splitlines()))

    def _copy(self, place: Path) -> None:
        """The repository as it is: the run before may have been killed while the module was changed."""
        for part in PARTS:
            source, target = ROOT / part, place / part
            if source.is_dir():
                shutil.rmtree(target, ignore_errors=True)
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                place.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target)

    def _prepare(self, place: Path) -> None:
        config = f'[cosmic-ray]\nmodule-path = "{self.module}"\nexcluded-modules = []\n'
        config += (
            'timeout = 0.0\ntest-command = "see mutant_runner"\n[cosmic-ray.distributor]\nname = "local"\n'
        )
        (place / "mutants.toml").write_text(config, encoding="utf-8")
        self._tester(place, "cosmic-ray", "init", "mutants.toml", "new.sqlite", "--force")
        self._tester(place, "python", "tools/sweeps/mutant_filter.py", "new.sqlite")
        (place / "new.sqlite").rename(place / "session.sqlite")

    def _try_again(self, place: Path, session: Path) -> None:
        """Where the tests are others than before, what survived them runs again."""
        files: list[Path] = []
        for part in self.tests.split():
            files += sorted((ROOT / part).rglob("*.py")) if (ROOT / part).is_dir() else [ROOT / part]
        before, now = place / "tests.stamp", _stamp(files)
        if before.is_file() and before.read_text(encoding="utf-8") != now:
            with contextlib.closing(sqlite3.connect(session)) as database, database:
                database.execute("DELETE FROM work_results WHERE test_outcome = 'SURVIVED'")
        before.write_text(now, encoding="utf-8")

    def _execute(self, place: Path, minutes: float) -> bool:
        (packages,) = TESTER.parent.glob("lib/python3*/site-packages")
        command = [sys.executable, "-m", "tools.sweeps.mutant_runner", "session.sqlite", self.module]
        command += [str(minutes), str(packages), *self.tests.split()]
        code = subprocess.run(command, cwd=place, env=_environment(place), check=False).returncode
        if code not in (0, TIME_UP):
            raise SystemExit(f"{self.module}: the tests could not be run on its mutants")
        return code == 0

    def _tester(self, place: Path, program: str, *arguments: str) -> str:
        done = subprocess.run(
            [str(TESTER / program), *arguments],
            cwd=place, env=_environment(place), capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"{self.module}: {program} {arguments[0]} failed\n{done.stdout}{done.stderr}")
        return done.stdout


def _stamp(files: Iterable[Path]) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def _environment(place: Path) -> dict[str, str]:
    """The copy comes first wherever Python looks, and one thread does as well as many for small networks."""
    return {**os.environ, "PYTHONPATH": str(place), "OMP_NUM_THREADS": "1"}


def rows(module: str, tests: str, dumped: Iterable[Sequence[Any]]) -> list[Row]:
    """One row for each survivor, and one with the counts, from what the tester dumps."""
    survivors: list[Row] = []
    counts = {"killed": 0, "survived": 0, "incompetent": 0}
    for item, result in dumped:
        outcome = (result or {}).get("test_outcome")
        if outcome not in counts:
            continue
        counts[outcome] += 1
        if outcome == "survived":
            (mutation,) = item["mutations"]
            before, after = changed(result["diff"])
            survivors.append(
                {
                    "module": module,
                    "line": mutation["start_pos"][0],
                    "before": before,
                    "after": after,
                    "verdict": OPEN,
                }
            )
    # one that breaks the module is noticed by whatever imports it
    killed = counts["killed"] + counts["incompetent"]
    total = {"module": module, "tests": tests, "killed": killed, "survived": counts["survived"]}
    return [total, *sorted(survivors, key=lambda row: row["line"])]


def changed(diff: str) -> tuple[str, str]:
    """The lines that a diff takes away and puts in, each as one text."""
    lines = [line for line in diff.splitlines() if not line.startswith(("---", "+++"))]
    return tuple("\n".join(s[1:].strip() for s in lines if s.startswith(sign)) for sign in "-+")  # type: ignore[return-value]


def joined(old: list[Row], new: list[Row]) -> list[Row]:
    """The rows with those of a module made anew; a survivor that was there keeps its verdict."""
    module = new[0]["module"]
    key = lambda row: (row.get("module"), row.get("before"), row.get("after"))  # noqa: E731
    verdicts = {key(row): row["verdict"] for row in old if "verdict" in row}
    made = [{**row, "verdict": verdicts.get(key(row), OPEN)} if "verdict" in row else row for row in new]
    return [row for row in old if row["module"] != module] + made


def page(found: list[Row]) -> str:
    """The page: what was run, what survives and why, and what was not run."""
    totals = {row["module"]: row for row in found if "tests" in row}
    out = [HEAD, COLUMNS]
    for module, total in sorted(totals.items()):
        mine = [row["verdict"] for row in found if row["module"] == module and "verdict" in row]
        equal, undecided = sum(v.startswith("equivalent") for v in mine), mine.count(OPEN)
        count = total["killed"] + total["survived"]
        out.append(
            f"| `{module}` | {count} | {total['killed']} | {total['survived']} | {equal} | {undecided} |"
        )
    by_hand = [f"{row['by_hand']} in `{module}`" for module, row in totals.items() if row.get("by_hand")]
    if by_hand:
        out.append(
            f"\nOf those noticed the tester's run saw some survive: {', '.join(by_hand)}. Tests were written "
            "for them since, and the mutants made by hand; the next run of the tester will tell."
        )
    left = [module for module in TESTS if module not in totals]
    out.append(f"\nNot run yet: {', '.join(f'`{module}`' for module in left) or 'none'}.\n")
    for module in sorted(totals):
        mine = [row for row in found if row["module"] == module and "verdict" in row]
        if mine:
            out += [f"## {module}\n", "| line | is | survives as | verdict |", "|---|---|---|---|"]
            out += [
                f"| {row['line']} | {_code(row['before'])} | {_code(row['after'])} | {row['verdict']} |"
                for row in mine
            ]
            out.append("")
    return "\n".join(out).rstrip() + "\n"


def _code(text: str) -> str:
    text = " ".join(text.split()).replace("|", "\\|")
    return f"`{text}`"


def read() -> list[Row]:
    if not RESULTS.is_file():
        return []
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="modules whose path has this word")
    parser.add_argument("--minutes", type=float, default=600.0, help="time for each module")
    parser.add_argument("--page", action="store_true", help="write the page anew, and run nothing")
    chosen = parser.parse_args()
    for module, tests in TESTS.items():
        if chosen.page or chosen.only not in module:
            continue
        print(f"{module}: {tests}", flush=True)
        made = Session(module, tests).run(chosen.minutes)
        if made is None:
            print(f"{module}: stopped before the end; run it again to go on")
            continue
        found = joined(read(), made)
        RESULTS.write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found), encoding="utf-8"
        )
    PAGE.write_text(page(read()), encoding="utf-8")


if __name__ == "__main__":
    main()
