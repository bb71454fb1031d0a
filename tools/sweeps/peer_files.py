"""Compare bntool with the best folders of ONNX files, on graphs in the styles of six exporters, at every
opset from 7 to 23: `make peers AS=onnx`.

Each tool works on each graph in a process of its own with a time limit. Results are appended to
`docs/peers-onnx.jsonl`, one line a graph, so that the sweep can be stopped and gone on with; a section of
`docs/peers.md` is written from them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

from tools.sweeps.onnx_styles import STYLES, drawn
from tools.sweeps.peer_page import FILES_RESULTS, FILES_START, files_section
from tools.sweeps.peer_tools import ON_FILES, Case, versions
from tools.sweeps.processes import in_own_process
from tools.sweeps.styled_files import OPSETS
from tools.sweeps.sweeping import Results, arguments

ROUNDS = 3
"""Graphs of each style at each opset."""


def names() -> list[str]:
    """`paddle-11-25`: the style, the opset and the seed of each graph."""
    seeds = range(len(STYLES) * len(OPSETS) * ROUNDS)
    return [f"{STYLES[s % len(STYLES)]}-{OPSETS[s // len(STYLES) % len(OPSETS)]}-{s}" for s in seeds]


def prepare(name: str, folder: Path) -> dict[str, Any]:
    """Write the graph, run it, and keep in `folder` what every tool is held against."""
    import onnx

    from bntool.subjects.onnx import OnnxSubject
    from bntool.verifying.onnx_checking import OnnxReference
    from tools.sweeps.fingerprints import fingerprints, trace_onnx

    style, opset, seed = name.split("-")
    path = folder / "unfolded.onnx"
    model = drawn(int(seed), style, int(opset))[0]
    onnx.save(model, path)
    subject = OnnxSubject(path)
    reference = OnnxReference(path, subject.counts[0], count=1)
    for output in model.graph.output:  # onnxsim asks for the rank of each
        for axis in range(reference.outputs[0][output.name].dim()):
            output.type.tensor_type.shape.dim.add().dim_param = f"{output.name}_{axis}"
    onnx.save(model, path)
    batch_norms, own = fingerprints(subject.graph()), trace_onnx(path)
    seen = own.left(batch_norms)
    found = {bn: vectors for bn, vectors in batch_norms.items() if bn in seen}
    kept = (reference.inputs[0], reference.outputs, reference.limits, subject.counts[0], found, own)
    (folder / "reference.pickle").write_bytes(pickle.dumps(kept))
    return {"status": "ok", "bn": len(found)}


def judge(tool: str, folder: Path) -> dict[str, Any]:
    """Let one tool fold the graph; say how many BatchNorms are left, and whether the result is right."""
    import torch

    from bntool.verifying.comparing import compare, noise_limits

    kept = (folder / "reference.pickle").read_bytes()
    inputs, expected, limits, nodes, batch_norms, own = pickle.loads(kept)  # noqa: S301 - written by `prepare`
    os.chdir(folder)  # for what a tool leaves beside
    outcome = ON_FILES[tool](Case(lambda: None, inputs, folder / "unfolded.onnx", folder))
    got = dict(zip(expected[0], outcome.outputs.values(), strict=True))
    if outcome.rest is not None:
        rest = dict(zip(expected[0], outcome.rest.values(), strict=True))
        theirs = noise_limits(expected, [rest], nodes, torch.finfo(torch.float32).eps)
        limits = {name: max(limit, theirs[name], key=lambda x: x.limit) for name, limit in limits.items()}
    check = compare(expected, [got], limits, stage="fold", device="cpu", provider=tool)
    left = len(outcome.trace.left(batch_norms)) + outcome.trace.unnamed(batch_norms, own)
    return {"status": "ok" if check.agrees else "wrong", "left": left}


def examine(name: str, limit: float) -> dict[str, Any]:
    """What each tool leaves of a graph's BatchNorms."""
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        row = {"model": name, **in_own_process(functools.partial(prepare, name, folder), limit)}
        if row["status"] == "ok" and row["bn"]:
            row["tools"] = {
                tool: in_own_process(functools.partial(judge, tool, folder), limit) for tool in ON_FILES
            }
        return {**row, "versions": versions()}


def main() -> None:
    chosen = arguments(__doc__, FILES_RESULTS, limit=120).parse_args()
    import torch

    for module in ("onnxruntime", "onnxsim", "onnxslim", "onnxoptimizer", "openvino"):
        with contextlib.suppress(ImportError):
            importlib.import_module(module)  # once, before the forks
    torch.set_num_threads(1)
    results = Results(chosen.results)
    if chosen.again:
        results.forget(lambda row: row["status"] != "ok")
    for name in results.missing(chosen.names or names(), chosen.minutes):
        row = examine(name, chosen.limit)
        results.add(row)
        told = {
            tool: found["left"] if found["status"] == "ok" else found["status"]
            for tool, found in row.get("tools", {}).items()
        }
        print(len(results.rows), name, row["status"], row.get("bn", 0), told, flush=True)
    page = chosen.results.with_name("peers.md")
    before = page.read_text(encoding="utf-8").partition(FILES_START)[0] if page.exists() else ""
    page.write_text(f"{before.rstrip()}\n\n{files_section(results.rows)}", encoding="utf-8")


if __name__ == "__main__":
    main()
