"""Build the sdist and the wheel twice, check them, and try the wheel alone in an empty environment.

    python tools/dist.py

writes `dist/`. Whatever differs between two builds, is missing from the wheel, or does not run is an error.
"""

from __future__ import annotations

import argparse
import filecmp
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
BESIDE = (
    "man/man1/bntool.1",
    "bash-completion/completions/bntool",
    "zsh/site-functions/_bntool",
    "fish/vendor_completions.d/bntool.fish",
)
"""What a wheel puts below `share/`."""
LINES = (
    ("--version",),
    ("demo", "-o", "demo"),
    ("summary", "demo/model_bn.pt", "-q"),
    ("fold", "demo/model_bn.pt", "--export", "onnx", "--require-all", "--json", "-o", "folded.pt"),
    ("verify", "demo/model_bn.pt", "folded.pt"),
    ("completion", "bash"),
)


def run(*words: str | Path, cwd: Path = ROOT) -> str:
    done = subprocess.run([*map(str, words)], cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, words))} ended with {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def built(folder: Path) -> list[Path]:
    """The sdist, and the wheel that is made of it."""
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    return sorted(folder.iterdir())


def build() -> Path:
    """Build twice; the files go to `dist/`. Returns the wheel."""
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        first, second = built(Path(one)), built(Path(two))
        for a, b in zip(first, second, strict=True):
            if a.name != b.name or not filecmp.cmp(a, b, shallow=False):
                sys.exit(f"two builds of {a.name} differ")
        shutil.rmtree(DIST, ignore_errors=True)
        shutil.copytree(one, DIST)
    files = sorted(DIST.iterdir())
    print(run(sys.executable, "-m", "twine", "--no-color", "check", "--strict", *files), end="")
    wheel = next(file for file in files if file.suffix == ".whl")
    print(run(Path(sys.executable).with_name("check-wheel-contents"), wheel), end="")
    return wheel


def smoke(python: Path) -> None:
    """Run bntool from a folder of its own, in the environment of `python`, which has the wheel alone."""
    inside = "import bntool, sys; print(bntool.__file__); print(sys.prefix)"
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        file, prefix = map(Path, run(python, "-I", "-c", inside, cwd=folder).split("\n")[:2])
        if not file.is_relative_to(prefix):
            sys.exit(f"bntool was found at {file}, not in the environment")
        missing = [name for name in BESIDE if not (prefix / "share" / name).is_file()]
        if missing:
            sys.exit(f"the wheel did not bring {', '.join(missing)}")
        for line in LINES:
            run(python.with_name("bntool"), *line, cwd=folder)
            print(f"bntool {' '.join(line)}: ok")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only-build", action="store_true", help="do not install")
    asked = parser.parse_args()
    wheel = build()
    if asked.only_build:
        return
    with tempfile.TemporaryDirectory() as place:
        python = Path(place) / "bin" / "python"
        run(sys.executable, "-m", "venv", place)
        run(python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", wheel)
        smoke(python)


if __name__ == "__main__":
    main()
