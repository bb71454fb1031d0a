"""The GPU record: `make gpu-check` on a machine with an NVIDIA GPU. Works offline, with what is installed.

Runs every `gpu`-marked test, then each network in each precision on each runtime, and writes docs/gpu.md and
docs/gpu.json. Exits 5, and writes nothing, where CUDA does not truly work; 1 where a test or a row fails.
With `--require-gpu` a test that was skipped, and a CUDA row that was impossible, are failures too.
`--rehearse` walks the same ways on the CPU with tiny inputs and writes elsewhere.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

from tools.measures.gpu_nets import NETS
from tools.measures.gpu_page import page
from tools.measures.gpu_rows import PRECISIONS, RUNTIMES

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "BNTOOL_EXPECT_GPU": "1"}
_SETTINGS = "[pytest]\nmarkers =\n    gpu: needs an NVIDIA GPU\naddopts = --import-mode=importlib\n"
"""The project's own settings ask for plugins that a machine with a GPU may lack."""


def no_gpu() -> str:
    """Why there is nothing to record; asked in another process, so that this one stays free of CUDA."""
    ask = (
        "import torch\nfrom bntool.runtime.providers import why_no_cuda\n"
        "print('torch cannot use CUDA' if not torch.cuda.is_available() else why_no_cuda())"
    )
    done = subprocess.run(
        [sys.executable, "-c", ask], capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT, check=False
    )
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["python failed"])[-1]
    return done.stdout.strip()


def run_tests(limit: float) -> dict[str, Any]:
    """Every `gpu`-marked test: how many ran, failed, were skipped, and which."""
    with tempfile.TemporaryDirectory(prefix="bntool.gpu.") as folder:
        settings, report = Path(folder) / "pytest.ini", Path(folder) / "report.xml"
        settings.write_text(_SETTINGS)
        words = ["-m", "pytest", "-q", "-m", "gpu", "-c", str(settings), "--rootdir", str(ROOT),
                 "--confcutdir", str(ROOT / "tests" / "gpu"), "-p", "no:cacheprovider",
                 f"--junitxml={report}", str(ROOT / "tests" / "gpu")]  # fmt: skip
        code, text = _run(words, limit)
        if not report.is_file():
            last = (text.strip().splitlines() or ["no output"])[-1]
            return {"tests": 0, "failed": [], "skipped": [], "why": f"exit {code}: {last}"}
        return read_report(report)


def read_report(report: Path) -> dict[str, Any]:
    cases = list(ET.parse(report).getroot().iter("testcase"))  # noqa: S314 - pytest wrote it

    def named(*kinds: str) -> list[str]:
        return [case.get("name", "") for case in cases if any(case.find(k) is not None for k in kinds)]

    return {"tests": len(cases), "failed": named("failure", "error"), "skipped": named("skipped"), "why": ""}


def run_rows(name: str, precision: str, how: str, limit: float) -> list[dict[str, Any]]:
    """The rows of one network in one precision; those of a process that died say so."""
    code, text = _run(["-m", "tools.measures.gpu_rows", name, precision, how], limit)
    found = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    last = next(
        (line for line in reversed(text.splitlines()) if not line.startswith("{") and line.strip()), ""
    )
    died = "it took too long" if code is None else f"the process ended with {code}: {last}"
    missing = [runtime for runtime in RUNTIMES if runtime not in {row["runtime"] for row in found}]
    found += [{"runtime": runtime, "status": "failed", "why": died} for runtime in missing]
    return [{"net": name, "precision": precision, **row} for row in found]


def _run(words: list[str], limit: float) -> tuple[int | None, str]:
    """Exit code (None: out of time) and all that was said."""
    try:
        done = subprocess.run(
            [sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=ENVIRONMENT, cwd=ROOT, timeout=limit, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as late:
        said = late.stdout or b""
        return None, said.decode(errors="replace") if isinstance(said, bytes) else said
    return done.returncode, done.stdout


def facts() -> dict[str, str]:
    """What the figures were measured with."""
    ask = (
        "import json\nfrom bntool.runtime.doctor import diagnose\n"
        "print(json.dumps({row.name: row.detail for row in diagnose().rows}))"
    )
    code, text = _run(["-c", ask], 120)
    told: dict[str, str] = json.loads(text.splitlines()[-1]) if code == 0 else {"doctor": text[-300:]}
    return told


def faults(record: dict[str, Any], *, required: bool) -> list[str]:
    """What keeps the record from being good."""
    tests = record["tests"]
    found = [f"test {name} failed" for name in tests["failed"]]
    if required:
        found += [f"test {name} was skipped" for name in tests["skipped"]]
        if tests["why"] or not tests["tests"]:
            found.append(f"the tests did not run: {tests['why'] or 'none was collected'}")
    for row in record["rows"]:
        title = f"{row['net']} {row['precision']} on {row['runtime']}"
        if row["status"] == "failed":
            found.append(f"{title}: {row['why']}")
        elif row["status"] == "impossible" and required and row["runtime"] != "ORT TensorRT":
            found.append(f"{title} was impossible: {row['why']}")
    return found


def kept(place: Path, about: dict[str, str], names: list[str]) -> list[dict[str, Any]]:
    """Rows of an earlier run with the very same machine and versions, of networks that are not run now."""
    if not place.is_file():
        return []
    record = json.loads(place.read_text(encoding="utf-8"))
    return [row for row in record["rows"] if row["net"] not in names] if record["facts"] == about else []


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("nets", nargs="*", metavar="NET", help=f"of {', '.join(NETS)} (default: all)")
    parser.add_argument(
        "--require-gpu", action="store_true", help="a GPU was promised: nothing may be skipped"
    )
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny inputs")
    parser.add_argument(
        "--to", type=Path, help="folder to write to (default: docs; a rehearsal must name one)"
    )
    parser.add_argument("--limit", type=float, default=300, help="seconds for one network in one precision")
    chosen = parser.parse_args(words)
    unknown = [name for name in chosen.nets if name not in NETS]
    if unknown:
        parser.error(f"there is no network {unknown[0]!r}: {', '.join(NETS)}")
    if chosen.rehearse and (chosen.require_gpu or chosen.to is None or chosen.to.resolve() == DOCS):
        parser.error("--rehearse is for the CPU: it takes --to FOLDER, not docs, and not --require-gpu")
    reason = "" if chosen.rehearse else no_gpu()
    if reason:
        promised = "a GPU was promised, and there is none" if chosen.require_gpu else "no GPU check"
        print(f"{promised}: {reason}; docs/gpu.md is left as it is", file=sys.stderr)
        return 5
    return _record(chosen)


def _record(chosen: argparse.Namespace) -> int:
    folder = chosen.to or DOCS
    folder.mkdir(parents=True, exist_ok=True)
    names, about = chosen.nets or list(NETS), facts()
    skipped = {"tests": 0, "failed": [], "skipped": [], "why": "a rehearsal runs none"}
    started = time.monotonic()
    record: dict[str, Any] = {
        "rehearsal": chosen.rehearse,
        "date": dt.datetime.now(dt.timezone.utc).date().isoformat(),
        "facts": about,
        "tests": skipped if chosen.rehearse else run_tests(chosen.limit),
        "rows": kept(folder / "gpu.json", about, names),
    }
    for name in names:
        for precision in PRECISIONS:
            record["rows"] += run_rows(
                name, precision, "rehearse" if chosen.rehearse else "gpu", chosen.limit
            )
            write(record, folder)  # what was measured outlives a machine that is taken away
            told = ", ".join(f"{row['runtime']} {row['status']}" for row in record["rows"][-len(RUNTIMES) :])
            print(f"{time.monotonic() - started:5.0f} s  {name} {precision}: {told}", flush=True)
    wrong = faults(record, required=chosen.require_gpu)
    print("\n".join([f"{len(record['rows'])} rows, {len(wrong)} faults; wrote {folder / 'gpu.md'}", *wrong]))
    return 1 if wrong else 0


def write(record: dict[str, Any], folder: Path) -> None:
    (folder / "gpu.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (folder / "gpu.md").write_text(page(record), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
