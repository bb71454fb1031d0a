"""Kill the writers, fill the disk, press Ctrl-C, write twice at once: `make durability`.

Every writer overwrites one file with two versions in turn, in a process of its own that is stopped at a
random moment. Afterwards the file is one version, whole; the next writer leaves nothing else in the folder.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from bntool.api import load
from bntool.core.errors import BntoolError
from bntool.export.onnx_writing import write_checked
from bntool.files.atomic import write_atomically
from bntool.files.memory import Record, recall, remember
from bntool.files.onnx_files import open_onnx, save_onnx
from bntool.files.saving import save_model
from bntool.files.sidecar import read_sidecar, write_sidecar
from bntool.files.targets import Target

WIDTH = 700
"""Two megabytes of weights: a write takes about as long as the moments at which it is stopped differ."""

VERSIONS = (1.0, 2.0)


class Writer:
    """One kind of file: how a version of it is written into a folder, and which version stands there."""

    def __init__(
        self, name: str, write: Callable[[Path, float], object], read: Callable[[Path], Any]
    ) -> None:
        self.name, self.write, self.read = name, write, read

    def version(self, folder: Path) -> float:
        """The version, whole; raises or gives another number where it is neither."""
        values = np.unique(np.asarray(self.read(folder), dtype=np.float64))
        if len(values) != 1 or values[0] not in VERSIONS:
            raise ValueError(f"a mixture: {values[:5]}")
        return float(values[0])


def _net(value: float) -> nn.Module:
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False))
    nn.init.constant_(net[0].weight, value)
    return net


def _onnx_model(value: float) -> onnx.ModelProto:
    weight = numpy_helper.from_array(np.full((WIDTH, WIDTH), value, np.float32), "w")
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, WIDTH]) for n in "xy"]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "g", ends[:1], ends[1:], [weight]
    )
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 18)])


def _read_onnx(path: Path) -> Any:
    onnx.checker.check_model(str(path), full_check=True)
    return numpy_helper.to_array(onnx.load(path).graph.initializer[0])


def _read_weights(path: Path, arch: str | None = None) -> Any:
    weight = load(path, arch=arch).model.state_dict()["0.weight"].numpy()
    if weight.size != WIDTH * WIDTH:
        raise ValueError("too few")
    return weight


def writers(source: Path) -> list[Writer]:
    """Every writer; `source` is a folder for the inputs they start from."""
    from safetensors.torch import save_file

    arch = f"{source / 'durable_net.py'}:make"
    (source / "durable_net.py").write_text(
        "from torch import nn\n\ndef make():\n"
        f"    return nn.Sequential(nn.Linear({WIDTH}, {WIDTH}, bias=False))\n"
    )
    torch.save(_net(0.0), source / "module.pt")
    torch.save(_net(0.0).state_dict(), source / "weights.pth")
    save_file(_net(0.0).state_dict(), source / "weights.safetensors")
    loaded = {
        ".pt": load(source / "module.pt"),
        ".pth": load(source / "weights.pth", arch=arch),
        ".safetensors": load(source / "weights.safetensors", arch=arch),
    }
    programs = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for value in VERSIONS:
            programs[value] = torch.export.export(_net(value), (torch.zeros(1, WIDTH),))
        torch.export.save(programs[1.0], source / "program.pt2")
    loaded[".pt2"] = load(source / "program.pt2")
    for value in VERSIONS:
        onnx.save(_onnx_model(value), source / f"inline{value}.onnx")
        onnx.save(_onnx_model(value), source / f"outside{value}.onnx", save_as_external_data=True,
                  location=f"outside{value}.bin", size_threshold=100)  # fmt: skip
    nets = {value: _net(value) for value in VERSIONS}

    def saved(ending: str) -> Writer:
        def write(folder: Path, value: float) -> None:
            model = programs[value] if ending == ".pt2" else nets[value]
            save_model(loaded[ending], model, folder / f"out{ending}", force=True)

        needs = arch if ending in (".pth", ".safetensors") else None

        def read(folder: Path) -> Any:
            return _read_weights(folder / f"out{ending}", needs)

        return Writer(ending, write, read)

    def program(folder: Path) -> Any:
        return load(folder / "out.pt2").model.state_dict["0.weight"].detach().numpy()

    def from_file(kind: str) -> Writer:
        def write(folder: Path, value: float) -> None:
            save_onnx(open_onnx(source / f"{kind}{value}.onnx"), folder / "out.onnx", force=True)

        return Writer(f"onnx {kind}", write, lambda folder: _read_onnx(folder / "out.onnx"))

    def exported(folder: Path, value: float) -> None:
        write_checked(ir.from_proto(_onnx_model(value)), folder / "out.onnx", "always", force=True)

    def side(folder: Path, value: float) -> None:
        write_sidecar(folder / "out.pt", {"schema_version": 1, "value": [value] * 50_000}, force=True)

    def memory(folder: Path, value: float) -> None:
        os.environ["XDG_STATE_HOME"] = str(folder)
        note = remember(folder, Record("fold", str(value) * 20_000, ""))
        if note is not None:
            raise OSError(note)

    def remembered(folder: Path) -> float:
        os.environ["XDG_STATE_HOME"] = str(folder)
        record = recall(folder)
        values = {float(record.output[i : i + 3]) for i in range(0, 60_000, 3)} if record else set()
        return values.pop() if len(values) == 1 else 0.0

    def report(folder: Path, value: float) -> None:
        text = json.dumps([value] * 100_000)
        write_atomically(folder / "report.json", lambda draft: put(draft, text), force=True)

    def put(draft: Path, text: str) -> None:
        draft.write_text(text)

    return [
        saved(".pt"), saved(".pth"), saved(".safetensors"),
        Writer(".pt2", saved(".pt2").write, program),
        from_file("inline"), from_file("outside"),
        Writer("onnx export", exported, lambda folder: _read_onnx(folder / "out.onnx")),
        Writer("side file", side, lambda folder: (read_sidecar(folder / "out.pt") or {})["value"]),
        Writer("memory", memory, remembered),
        Writer("report", report, lambda folder: json.loads((folder / "report.json").read_text())),
    ]  # fmt: skip


def _forked(work: Callable[[], None]) -> int:
    """Start `work` in a fork; it ends with 0, 7 for a BntoolError, 130 after Ctrl-C, 9 for anything else."""
    child = os.fork()
    if child:
        return child
    code = 9
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        work()
        code = 0
    except (BntoolError, OSError) as error:
        known = isinstance(error, BntoolError) or "cannot write" in str(error)
        code = 7 if known else 9
        if not known:
            traceback.print_exc()
    except KeyboardInterrupt:
        code = 130
    except BaseException:  # noqa: BLE001 - told by the exit status, on stderr in full
        traceback.print_exc()
    finally:
        os._exit(code)


def _ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _again_and_again(writer: Writer, folder: Path, begun: int | None = None) -> None:
    if begun is not None:
        os.write(begun, b"!")
    for round_ in range(1000):
        writer.write(folder, VERSIONS[round_ % 2])


def _names(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


class Trial:
    """A folder with one whole file in it, and what must hold after each mishap."""

    def __init__(self, writer: Writer, folder: Path) -> None:
        self.writer, self.folder = writer, folder
        writer.write(folder, 1.0)
        writer.write(folder, 2.0)
        writer.write(folder, 1.0)
        self.clean = _names(folder)

    def check(self, what: str, *, litter: bool = False) -> None:
        """The file is whole; and, after one more write where a kill may leave `litter`, alone."""
        try:
            self.writer.version(self.folder)
            if litter:
                # A draft without a lock, killed while it was made or removed, goes a minute later.
                for draft in self.folder.rglob(".bntool-*.draft"):
                    if not (draft / "lock").exists():
                        os.utime(draft, (0, 0))
                self.writer.write(self.folder, 2.0)
                self.writer.write(self.folder, 1.0)
            found = _names(self.folder)
            # The data of an ONNX file has one of several names.
            extra = {re.sub(r"(\.data)\.\d+$", r"\1", n) for n in found} - self.clean
            if sum(".data" in n for n in found) > 1:
                extra |= {n for n in found if ".data" in n}
            if extra:
                raise ValueError(f"litter: {sorted(extra)}")
        except Exception as error:
            raise SystemExit(f"{self.writer.name}, {what}: {type(error).__name__}: {error}") from error


def killed(trial: Trial, draw: random.Random, how: signal.Signals) -> None:
    reader, begun = os.pipe()
    child = _forked(lambda: _again_and_again(trial.writer, trial.folder, begun))
    # Not in the middle of Python's own fork, which takes Ctrl-C for nothing.
    os.read(reader, 1)
    os.close(reader)
    os.close(begun)
    time.sleep(draw.uniform(0.002, 0.25))
    os.kill(child, how)
    code = _ended(child)
    if how == signal.SIGINT and code not in (130, -signal.SIGINT):
        raise SystemExit(f"{trial.writer.name}: ended with {code} after Ctrl-C")
    # Ctrl-C may come while the folder of drafts is being removed; the next run does it then.
    trial.check(how.name, litter=True)


def disk_full(trial: Trial, draw: random.Random) -> None:
    """Files may grow to a random size and no further; as on a full disk, writing fails in the middle."""

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limit = draw.randrange(1, 60_000)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        trial.writer.write(trial.folder, 2.0)

    code = _ended(_forked(work))
    if code not in (0, 7):
        raise SystemExit(f"{trial.writer.name}: ended with {code} on a full disk")
    trial.check("disk full")


def small_disk(every: list[Writer], folder: Path) -> str:
    """The same on a real file system that is full, where one may be mounted."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        return "no file system could be mounted"
    try:
        for writer in every:
            inside = folder / "files"
            inside.mkdir()
            trial = Trial(writer, inside)
            with (folder / "ballast").open("wb") as ballast:
                try:
                    ballast.write(bytes(9 << 20))
                    ballast.flush()
                except OSError:
                    pass
            code = _ended(_forked(lambda trial=trial: trial.writer.write(trial.folder, 2.0)))
            if code != 7:
                raise SystemExit(f"{writer.name}: ended with {code} on a full file system")
            trial.check("file system full")
            (folder / "ballast").unlink()
            shutil.rmtree(inside)
    finally:
        subprocess.run(["umount", str(folder)], check=True)
    return f"{len(every)} writers on a full file system"


def read_only(trial: Trial) -> str:
    """A folder in which nothing may be written: an error, and nothing changed."""

    def work() -> None:
        if os.geteuid() == 0:
            os.setuid(65534)
        trial.writer.write(trial.folder, 2.0)

    above = [p for p in (trial.folder, *trial.folder.parents) if p.stat().st_uid == os.geteuid()]
    for part in above[1:]:
        if not part.stat().st_mode & 0o001:
            part.chmod(part.stat().st_mode | 0o055)
    trial.folder.chmod(0o555)
    code = _ended(_forked(work))
    trial.folder.chmod(0o755)
    if code != 7:
        raise SystemExit(f"{trial.writer.name}: ended with {code} in a folder that is read-only")
    trial.check("read-only folder")
    return "read-only folder"


def together(trial: Trial, seconds: float) -> None:
    """Two processes write one output: it is whole at every look, and at the end.

    Not at every look for an ONNX file with its data, of which one may go between reading the two.
    """
    children = [_forked(lambda: _again_and_again(trial.writer, trial.folder)) for _ in range(2)]
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not trial.writer.name.startswith("onnx"):
            trial.writer.version(trial.folder)
        time.sleep(0.05)
    for child in children:
        os.kill(child, signal.SIGKILL)
        _ended(child)
    trial.check("two writers", litter=True)


def pairs(count: int, folder: Path, source: Path) -> None:
    """Two processes make one output at the same moment, without force: exactly one of them does.

    In turn a file, an ONNX file with its data, and both of them together.
    """
    for run in range(count):
        output = folder / f"{run}.onnx"
        there, here = os.pipe()

        def work(value: float, there: int = there, here: int = here, run: int = run) -> None:
            os.close(here)
            os.read(there, 1)  # until the end of the pipe is closed: both begin at once
            onnx_file = folder / f"{run}.onnx"
            if run % 3 == 0:
                write_atomically(onnx_file, lambda draft: draft.write_text(str(value)))
            elif run % 3 == 1:
                save_onnx(open_onnx(source / f"outside{value}.onnx"), onnx_file)
            else:
                target = Target()
                paths = [target.claim(onnx_file.with_suffix(ending)) for ending in (".pt", ".onnx")]
                with target.drafts() as drafts:
                    for path in paths:
                        drafts.of(path).write_text(str(value))

        children = [_forked(lambda value=value: work(value)) for value in VERSIONS]
        os.close(there)
        os.close(here)
        codes = sorted(map(_ended, children))
        if codes != [0, 7] or not output.exists():
            raise SystemExit(f"pair {run}: two writers ended with {codes}")
        found = {path.name: path for path in folder.iterdir()}
        if run % 3 == 1:
            _read_onnx(output)
        whole = {0: {output.name}, 1: {output.name, f"{output.name}.data"}, 2: {f"{run}.pt", output.name}}
        if found.keys() != whole[run % 3]:
            raise SystemExit(f"pair {run}: {sorted(found)} are there")
        if run % 3 == 2 and len({path.read_text() for path in found.values()}) != 1:
            raise SystemExit(f"pair {run}: one file of each of two writers")
        for path in found.values():
            path.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--full", type=int, default=50)
    parser.add_argument("--interrupts", type=int, default=50)
    parser.add_argument("--together", type=float, default=0.5, help="seconds that two write one output")
    parser.add_argument("--pairs", type=int, default=1000, help="pairs of writers without force")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    # Started in the background Ctrl-C is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    draw = random.Random(chosen.seed)  # noqa: S311 - moments, not secrets
    with tempfile.TemporaryDirectory(prefix="bntool-durability-") as place:
        source = Path(place, "source")
        source.mkdir()
        every = writers(source)
        trials = []
        for writer in every:
            folder = Path(place, writer.name.replace(" ", "-").strip("."))
            folder.mkdir()
            trials.append(Trial(writer, folder))
        counts = (
            (chosen.kills, "kill -9", lambda t: killed(t, draw, signal.SIGKILL)),
            (chosen.interrupts, "Ctrl-C", lambda t: killed(t, draw, signal.SIGINT)),
            (chosen.full, "disk full", lambda t: disk_full(t, draw)),
        )
        for count, what, mishap in counts:
            for run in range(count):
                mishap(trials[run % len(trials)])
            print(f"{count} times {what}: no file lost, none half-written, no litter", flush=True)
        for trial in trials:
            together(trial, chosen.together)
        print(f"two processes at once: {len(trials)} writers")
        together_folder = Path(place, "pairs")
        together_folder.mkdir()
        pairs(chosen.pairs, together_folder, source)
        print(f"{chosen.pairs} pairs at one moment, without force: exactly one of each wrote", flush=True)
        print(read_only(trials[0]), *(read_only(trial) for trial in trials[1:4]), sep="; ")
        disk = Path(place, "disk")
        disk.mkdir()
        print(small_disk(every, disk))


if __name__ == "__main__":
    sys.exit(main())
