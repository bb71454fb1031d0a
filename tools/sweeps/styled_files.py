"""Fold, insert into and verify ONNX files in the styles of many exporters: `make styles`.

Each graph is judged twice: in float32 by ONNX Runtime without optimisations, against the limits that bntool
derives, and in float64 by ONNX's own reference implementation, to 1e-9 of the peak. ONNX Runtime's optimiser
folds the same file: it must not leave fewer BatchNormalization nodes.
"""

from __future__ import annotations

import argparse
import collections
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from bntool.core.errors import BntoolError
from bntool.pipeline.onnx_folding import fold_onnx, insert_onnx
from bntool.verifying.conditions import Conditions
from bntool.verifying.onnx_checking import check_onnx_unchanged
from bntool.verifying.onnx_verifying import check_itself, seeded_file_inputs
from tools.sweeps.onnx_styles import SIDE, STYLES, drawn

OPSETS = (7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23)
_ALLOWED = 1e-9
"""In float64: some hundred roundings of 1e-16, and ε and Clip's bounds of old opsets, which are float32."""


class BatchNormalization(OpRun):
    """In inference at every opset: before 14 the reference implementation takes the batch's statistics."""

    op_domain = ""

    def _run(self, x, scale, bias, mean, var, epsilon=None, **_):  # type: ignore[no-untyped-def]
        shape = (1, -1) + (1,) * (x.ndim - 2)
        s, b, m, v = (a.reshape(shape) for a in (scale, bias, mean, var))
        return ((x - m) / np.sqrt(v + np.float32(epsilon)) * s + b,)


def trial(folder: Path, seed: int, style: str, opset: int) -> dict[str, Any]:
    """What came of one graph: `folded` of `norms`, what ONNX Runtime leaves, and what went wrong."""
    model, norms = drawn(seed, style, opset)
    path, folded, again = (folder / f"{name}.onnx" for name in ("net", "folded", "again"))
    onnx.save(model, path)
    row: dict[str, Any] = {"seed": seed, "style": style, "opset": opset, "norms": norms, "wrong": []}
    try:
        result = fold_onnx(path, folded, force=True)
        row["kept"] = [(skip.name, str(skip.reason)) for skip in result.skips]
        after = folded if result.modified else path
        inserted = insert_onnx(after, again, force=True)
        if inserted.modified:
            inputs = seeded_file_inputs(after, (1, 2))
            if not check_onnx_unchanged(after, again, inputs).agrees:
                row["wrong"].append("insert")
        for file in (path, after):
            if not all(
                check.agrees
                for check in check_itself(file, seeded_file_inputs(file, (1, 2)), how=Conditions("cpu"))
            ):
                row["wrong"].append(f"verify {file.stem}")
        row["left"], row["ort_left"] = norms_in(after), norms_in(optimised(path, folder / "ort.onnx"))
        error = difference(folder, seed, style, opset)
        row["error"] = error
        if not error < _ALLOWED:
            row["wrong"].append(f"float64: {error:.1e}")
        if row["left"] > row["ort_left"]:
            row["wrong"].append("ONNX Runtime folds more")
    except BntoolError as error:
        row["wrong"].append(f"{type(error).__name__}: {error.what}")
    return row


def difference(folder: Path, seed: int, style: str, opset: int) -> float:
    """How far the fold of the same graph in float64 is from it, relative to the peak."""
    path, folded = folder / "wide.onnx", folder / "wide_folded.onnx"
    onnx.save(drawn(seed, style, opset, np.float64)[0], path)
    if not fold_onnx(path, folded, check="none", force=True).modified:
        return 0.0
    shape = (2, SIDE, SIDE, 3) if style == "keras" else (2, 3, SIDE, SIDE)
    x = np.random.default_rng(1).normal(size=shape)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        before, after = (
            ReferenceEvaluator(onnx.load(file), new_ops=[BatchNormalization]).run(None, {"x": x})[0]
            for file in (path, folded)
        )
    return float(np.abs(before - after).max() / np.abs(before).max())


def optimised(path: Path, output: Path) -> Path:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(output)
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return output


def norms_in(path: Path) -> int:
    return sum(node.op_type == "BatchNormalization" for node in onnx.load(path).graph.node)


def rows(count: int, first: int = 0) -> list[dict[str, Any]]:
    """`count` graphs, each style at each opset in turn."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(first, first + count):
            style = STYLES[seed % len(STYLES)]
            opset = OPSETS[(seed // len(STYLES)) % len(OPSETS)]
            found.append(trial(Path(folder), seed, style, opset))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=len(STYLES) * len(OPSETS) * 3)
    parser.add_argument("--first", type=int, default=0)
    asked = parser.parse_args()
    found = rows(asked.count, asked.first)
    wrong = [row for row in found if row["wrong"]]
    for row in wrong:
        print(row)
    kept = collections.Counter(reason for row in found for _, reason in row.get("kept", ()))
    norms = sum(row["norms"] for row in found)
    left, theirs = (sum(row.get(key, 0) for row in found) for key in ("left", "ort_left"))
    print(f"{len(found)} graphs, {norms} BatchNorms, {len(wrong)} wrong; kept: {dict(kept)}")
    print(f"BatchNormalization nodes left: {left}; by ONNX Runtime's optimiser {theirs}")
    print(f"largest error in float64 {max(row.get('error', 0.0) for row in found):.1e} of the peak")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
