"""The process in which a file is tried first: it may die there. Knows nothing of bntool, and no torch.

Each line that comes in is a JSON object with the `path` of an ONNX file and `shapes` of some of its inputs; a
line with what happened goes out. What the file does is of no interest, only whether the process survives it.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def _shape(info: Any, batch: int, side: int, given: dict[str, list[int | None]]) -> list[int]:
    axes = given.get(info.name, info.shape)
    return [n if isinstance(n, int) else side if axis else batch for axis, n in enumerate(axes)]


def _drawn(info: Any, shape: list[int]) -> Any:
    import numpy as np

    kind = info.type.removeprefix("tensor(").removesuffix(")")
    names = {"float": "float32", "double": "float64", "string": "str"}
    numbers = np.random.default_rng(0)
    if "float" in kind or kind == "double":
        return numbers.standard_normal(shape).astype(names.get(kind, kind))
    return numbers.integers(0, 2, shape).astype(names.get(kind, kind))


def _try(path: str, shapes: dict[str, list[int | None]]) -> str:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    refused = "no input fits"
    for side in (64, 96, 224, 16, 8):
        fed = {i.name: _drawn(i, _shape(i, 1, side, shapes)) for i in session.get_inputs()}
        try:
            session.run(None, fed)
        except Exception as error:  # noqa: BLE001 - all but the death of this process is an answer
            refused = str(error)
        else:
            return "ran"
    return refused


def main() -> None:
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            said = _try(asked["path"], asked["shapes"])
        except Exception as error:  # noqa: BLE001 - all but the death of this process is an answer
            said = str(error)
        sys.stdout.write(json.dumps({"said": said}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
