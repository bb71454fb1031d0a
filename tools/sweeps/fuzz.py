"""Damage files of every format, and open them: `make fuzz`.

Bits are flipped, bytes overwritten, blocks moved and ends cut off, by a seeded generator. Each file is opened
in a fork with a limit on time and memory. It is an error of bntool's if anything else comes out than a model
or a `BntoolError`, or if a format with checksums gives other weights than were saved.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from bntool.api import load
from bntool.core.errors import BntoolError
from bntool.files.detect import Kind, detect
from bntool.files.memory import recall
from bntool.files.onnx_files import open_onnx
from bntool.files.sidecar import read_sidecar
from tools.sweeps.fuzz_documents import damage_documents

SECONDS = 30
MEMORY = 4 << 30
BATCH = 50
CHECKED = {"module.pt", "weights.pt", "program.pt2"}
"""Formats whose checksums cover every weight."""


class Net(nn.Module):
    """A little of everything that a pickle can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x).mean((2, 3)))
        return out


def samples(folder: Path) -> dict[str, Path]:
    """One file of each format, with the files beside it that it needs."""
    import onnx
    from safetensors.torch import save_file

    torch.manual_seed(0)
    net, x = Net().eval(), torch.zeros(1, 3, 8, 8)
    plain = nn.Sequential(*net.body, nn.Flatten(), nn.Linear(144, 2)).eval()
    torch.save(plain, folder / "module.pt")
    torch.save({"model": plain.state_dict(), "epoch": 3}, folder / "weights.pt")
    torch.save(plain.state_dict(), folder / "old.pt", _use_new_zipfile_serialization=False)
    save_file(plain.state_dict(), folder / "weights.safetensors", metadata={"made": "here"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(net, (x,)), folder / "program.pt2")
        torch.jit.save(torch.jit.trace(net, x), folder / "script.pt")
        torch.onnx.export(net, (x,), folder / "inline.onnx", dynamo=False)
    model = onnx.load(folder / "inline.onnx")
    onnx.save(
        model, folder / "outside.onnx", save_as_external_data=True, location="outside.bin", size_threshold=10
    )
    document = {
        "schema_version": 1,
        "command": "fold",
        "output": {"name": "a", "sha256": "0" * 64},
        "plan": None,
    }
    (folder / "side.pt.bntool.json").write_text(json.dumps(document))
    names = """module.pt weights.pt old.pt weights.safetensors program.pt2 script.pt inline.onnx outside.onnx
    outside.bin side.pt.bntool.json""".split()
    return {name: folder / name for name in names}


def damaged(content: bytes, draw: random.Random) -> bytes:
    """The content with one to four injuries."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        at, n = draw.randrange(len(data) + 1), draw.choice((1, 2, 4, 8, 64))
        kind = draw.choice(("flip", "flip", "flip", "cut", "set", "zero", "drop", "repeat"))
        if kind == "flip" and at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        elif kind == "cut":
            del data[at:]
        elif kind == "set":
            data[at : at + n] = draw.choice((b"\xff", b"\x7f", b"\x80", b"\0")) * len(data[at : at + n])
        elif kind == "zero":
            data[at : at + n] = bytes(len(data[at : at + n]))
        elif kind == "drop":
            del data[at : at + n]
        elif kind == "repeat":
            data[at:at] = data[at : at + n]
    return bytes(data)


def opened(path: Path, arch: str) -> Mapping[str, Tensor]:
    """What bntool's doors give for a file: the weights, none for a file without any."""
    if path.name.endswith(".bntool.json"):
        read_sidecar(path.with_name(path.name.removesuffix(".bntool.json")))
        recall(path.parent)
        return {}
    if path.suffix == ".onnx" or detect(path).kind is Kind.ONNX:
        for value in open_onnx(path).model.graph.initializers.values():
            _ = value.const_value.numpy() if value.const_value is not None else None
        return {}
    model = load(path, arch=arch).model
    return dict(model.state_dict() if isinstance(model, nn.Module) else model.state_dict)


def _try(name: str, path: Path, content: bytes, arch: str, whole: Mapping[str, Tensor]) -> str:
    """Write the damaged content, open it, and say what came of it."""
    path.write_bytes(content)
    try:
        found = opened(path if path.suffix != ".bin" else path.with_suffix(".onnx"), arch)
    except BntoolError as error:
        return "refused" if str(error).strip() and error.next_step else f"FAILED: no next step: {error}"
    except Exception as error:  # noqa: BLE001 - any other is what is looked for
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"FAILED: {type(error).__name__}: {error} at {Path(last.filename).name}:{last.lineno}"
    if name in CHECKED and not _equal(found, whole):
        return "FAILED: other weights came out, and no checksum told"
    return "loaded"


def _equal(found: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> bool:
    return found.keys() == whole.keys() and all(torch.equal(found[k], whole[k]) for k in whole)


def _batch(jobs: list[Callable[[], str]]) -> list[str]:
    """Run jobs in a fork; a job that hangs, crashes or takes too much memory fails, and the rest go on."""
    done: list[str] = []
    while len(done) < len(jobs):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            warnings.simplefilter("ignore")
            with os.fdopen(write, "w") as pipe:
                for job in jobs[len(done) :]:
                    signal.alarm(SECONDS)
                    said = job()
                    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 > MEMORY:
                        said = "FAILED: more than 4 GB"
                    pipe.write(json.dumps(said) + "\n")
                    pipe.flush()
                    if said == "FAILED: more than 4 GB":
                        break
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as pipe:
            said_all = [json.loads(line) for line in pipe]
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        done += said_all
        if code:
            done.append("FAILED: it hung" if code == -signal.SIGALRM else f"FAILED: it died with {code}")
    return done


def fuzz(cases: int, seed: int, keep: Path | None) -> int:
    """Damage and open so many files; return how many times bntool failed."""
    failures = 0
    counts: dict[str, collections.Counter[str]] = {}
    with tempfile.TemporaryDirectory(prefix="bntool-fuzz-") as place:
        folder = Path(place)
        os.environ["XDG_STATE_HOME"] = place
        files = samples(folder)
        arch = f"{folder / 'fuzzed_net.py'}:make"
        (folder / "fuzzed_net.py").write_text(
            "from torch import nn\n\ndef make():\n    return nn.Sequential(nn.Conv2d(3, 4, 3), "
            "nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))\n"
        )
        whole = {name: dict(opened(files[name], arch)) for name in CHECKED}
        for name, path in files.items():
            content = path.read_bytes()
            jobs, contents = [], []
            for case in range(cases // len(files)):
                draw = random.Random(f"{seed} {name} {case}")  # noqa: S311 - damage, not secrets
                bad = damaged(content, draw)
                contents.append(bad)
                jobs.append(lambda n=name, p=path, b=bad: _try(n, p, b, arch, whole.get(n, {})))
            started = time.monotonic()
            said = [s for at in range(0, len(jobs), BATCH) for s in _batch(jobs[at : at + BATCH])]
            path.write_bytes(content)
            counts[name] = collections.Counter(s.partition(":")[0] for s in said)
            print(f"{name:24} {dict(counts[name])} in {time.monotonic() - started:.0f} s", flush=True)
            for case, (result, bad) in enumerate(zip(said, contents, strict=True)):
                if result.startswith("FAILED"):
                    failures += 1
                    print(f"    case {case}: {result}")
                    if keep is not None:
                        keep.mkdir(exist_ok=True, parents=True)
                        (keep / f"{case}-{name}").write_bytes(bad)
    total = sum(sum(count.values()) for count in counts.values())
    print(f"{total} damaged files: {failures} failures")
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="a folder for the files on which bntool failed")
    chosen = parser.parse_args()
    failures = fuzz(chosen.cases, chosen.seed, chosen.keep)
    failures += damage_documents(chosen.cases, chosen.seed)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
