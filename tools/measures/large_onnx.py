"""Fold an ONNX model of more than 2 GB, and say how long it took and how much memory it needed.

    python tools/measures/large_onnx.py [FOLDER]

The model is a stack of wide linear layers with BatchNorms, its weights in a data file beside it.
"""

from __future__ import annotations

import gc
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from bntool.pipeline.onnx_folding import fold_onnx

WIDTH, LAYERS = 8192, 9
"""9 · 8192² float32 weights are 2.4 GB; a protobuf message ends at 2 GiB."""


def write(folder: Path) -> Path:
    """The model, its weights drawn row by row straight into the data file."""
    random = np.random.default_rng(0)
    nodes, tensors = [], []
    with (folder / "large.onnx.data").open("wb") as data:

        def store(name: str, shape: tuple[int, ...], low: float, high: float) -> None:
            offset = data.tell()
            for _ in range(shape[0] if len(shape) > 1 else 1):
                data.write(random.uniform(low, high, shape[-1]).astype(np.float32).tobytes())
            tensor = onnx.TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape)
            tensor.data_location = TensorProto.EXTERNAL
            told = {"location": "large.onnx.data", "offset": offset, "length": data.tell() - offset}
            for key, value in told.items():
                tensor.external_data.add(key=key, value=str(value))
            tensors.append(tensor)

        value = "x"
        for i in range(LAYERS):
            store(f"w{i}", (WIDTH, WIDTH), -0.02, 0.02)
            for slot, low, high in (("g", 0.5, 1.5), ("b", -1, 1), ("m", -1, 1), ("v", 0.5, 2)):
                store(f"{slot}{i}", (WIDTH,), low, high)
            nodes.append(helper.make_node("Gemm", [value, f"w{i}"], [f"c{i}"], transB=1))
            statistics = [f"{slot}{i}" for slot in "gbmv"]
            nodes.append(helper.make_node("BatchNormalization", [f"c{i}", *statistics], [f"n{i}"]))
            nodes.append(helper.make_node("Relu", [f"n{i}"], [f"r{i}"]))
            value = f"r{i}"
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "large",
        [info("x", TensorProto.FLOAT, ["N", WIDTH])],
        [info(value, TensorProto.FLOAT, ["N", WIDTH])],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    path = folder / "large.onnx"
    onnx.save(model, path)
    return path


class Peak:
    """The most memory of its own that this process has, in GiB, sampled: not the pages of mapped files.

    The system takes those back when it needs them, so they are told beside it.
    """

    def __init__(self) -> None:
        self.own = self.mapped = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.05):
            lines = Path("/proc/self/status").read_text("ascii").splitlines()
            held = dict(line.split(":", 1) for line in lines if line.startswith("Rss"))
            own, mapped = (int(held[name].split()[0]) / 2**20 for name in ("RssAnon", "RssFile"))
            self.own, self.mapped = max(self.own, own), max(self.mapped, mapped)


def main() -> None:
    parent = sys.argv[1] if len(sys.argv) > 1 else None
    with tempfile.TemporaryDirectory(dir=parent) as name:
        path = write(Path(name))
        size = (Path(name) / "large.onnx.data").stat().st_size
        for level in ("none", "fast"):
            start = time.perf_counter()
            with Peak() as peak:
                result = fold_onnx(path, Path(name) / f"{level}.onnx", check=level)
            took = time.perf_counter() - start
            folded = f"{len(result.plan.sites)} of {LAYERS} folded"
            rows = [check.passed for check in result.checks]
            print(f"{size / 2**30:.2f} GiB, check {level}: {folded}, {rows}")
            print(f"  {took:.0f} s, peak {peak.own:.2f} GiB, and {peak.mapped:.2f} GiB of mapped files")
            del result  # which holds the weights, in cycles
            gc.collect()
            for written in Path(name).glob(f"{level}.onnx*"):
                written.unlink()


if __name__ == "__main__":
    main()
