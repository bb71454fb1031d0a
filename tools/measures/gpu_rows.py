"""One network in one precision, on every runtime: right, proved to run there, how fast, how much memory.

Runs in a process of its own, started by `tools.measures.gpu_check`: a fault of the device ends one process,
not the record. Prints a line of JSON for each runtime as it is done.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import bntool
from bntool.core.errors import BntoolError, DeviceError
from bntool.core.verdicts import Check
from bntool.graph.inputs import Inputs
from bntool.precision import casting
from bntool.runtime.benchmarking import Candidate, On, benchmark
from bntool.runtime.libraries import CPU, CUDA, TENSORRT
from bntool.runtime.ort_runner import OrtRunner
from bntool.runtime.torch_runner import TorchRunner
from bntool.verifying import checking
from bntool.verifying.checking import check_surgery, seeded_batches
from bntool.verifying.comparing import compare
from bntool.verifying.conditions import Conditions
from bntool.verifying.export_checking import check_onnx
from bntool.verifying.reference import Reference
from bntool.verifying.tf32 import check_tf32
from tools.measures.gpu_nets import NETS

PRECISIONS = ("fp32", "TF32", "fp16")
RUNTIMES = {"torch CUDA": "cuda", "ORT CUDA": CUDA, "ORT TensorRT": f"{TENSORRT},{CUDA}"}
SHAPE_OPS = frozenset("Shape Size Gather Unsqueeze Squeeze Concat Slice Cast ConstantOfShape Range".split())
"""What ONNX Runtime keeps on the CPU on purpose: arithmetic on shapes. Anything else there computes."""


class Case:
    """A network before and after its fold, in torch and as ONNX files of one precision."""

    def __init__(self, name: str, precision: str, folder: Path, rehearse: bool) -> None:
        net = NETS[name]
        self.precision, self.rehearse = precision, rehearse
        self.example = Inputs((torch.zeros(1, *(net.tiny if rehearse else net.shape)),))
        self.model = net.model()
        self.folded = bntool.fold(self.model, self.example).model
        self.inputs = seeded_batches(self.example)
        dtype = "fp16" if precision == "fp16" else ""
        self.files = {
            kind: bntool.export_onnx(model, self.example, folder / f"{kind}.onnx", dtype=dtype)
            for kind, model in (("before", self.model), ("after", self.folded))
        }
        self._reference = Reference(self.model, self.inputs, device="cpu" if rehearse else "cuda")

    def row(self, runtime: str) -> dict[str, Any]:
        """Verdict, proof, latency and memory on one runtime."""
        device = RUNTIMES[runtime]
        if self.rehearse:
            device = "cpu" if runtime.startswith("torch") else CPU
        in_torch = runtime.startswith("torch")
        check = self._torch_check(device) if in_torch else self._onnx_check(device)
        nodes = {} if in_torch else self._nodes(device)
        return {
            "status": ("rehearsed" if self.rehearse else "passed") if check.passed else "failed",
            "why": "" if check.passed else f"differs: {check.detail}",
            "check": check.to_dict(),
            "nodes": nodes,
            **self._speed(device, in_torch),
        }

    def _torch_check(self, device: str) -> Check:
        if self.precision == "TF32":
            return check_tf32(self.folded, self._reference, device=device)
        if self.precision == "fp32":
            rows = check_surgery(self._reference, self.folded, stage="fold", how=Conditions(device))
            return rows[0]
        half = self._reference.in_arithmetic(casting.stored_as(torch.float16))
        runner = TorchRunner(self.folded, device, torch.float16)
        got = [runner.run(inputs) for inputs in half.inputs]
        return compare(half.outputs, got, half.limits, stage="fold", device=runner.device,
                       provider=runner.provider, detail=half.detail)  # fmt: skip

    def _onnx_check(self, device: str) -> Check:
        reference = self._reference
        if self.precision == "fp16":
            reference = reference.in_arithmetic(casting.stored_as(torch.float16))
        tf32 = self.precision == "TF32"
        rows = check_onnx(reference, self.files["after"], how=Conditions(device, tf32=tf32))  # fmt: skip
        if tf32 and rows[-1].precision != "TF32":
            raise DeviceError(rows[-1].detail)
        # Both stages in full float32 come first: the runtime row, unless the export already failed.
        return next((row for row in rows if not row.passed), rows[-1])

    def _nodes(self, device: str) -> dict[str, int]:
        """How many nodes each provider has. Raises `DeviceError` where the CPU computes beside it."""
        runner = OrtRunner(self.files["after"], device, tf32=self.precision == "TF32")
        strays = [node for node in runner.cpu_nodes if node.partition(" ")[0] not in SHAPE_OPS]
        if strays:
            raise DeviceError(f"{runner.provider} did not take every compute node: {', '.join(strays)}")
        return runner.nodes

    def _speed(self, device: str, in_torch: bool) -> dict[str, Any]:
        example = self.example
        candidates = [Candidate(kind, path) for kind, path in self.files.items()]
        if in_torch:
            pair = {"before": self.model, "after": self.folded}
            if self.precision == "fp16":
                pair = {kind: casting.cast_copy(model, torch.float16) for kind, model in pair.items()}
                example = example.to(dtype=torch.float16)
            candidates = [Candidate(kind, model) for kind, model in pair.items()]
        found = benchmark(
            candidates,
            example.batched(),
            batches=(1,) if self.rehearse else (1, 32),
            rounds=11 if self.rehearse else 30,
            seconds=2 if self.rehearse else 10,
            on=On(
                "cpu" if self.rehearse else "cuda",
                None if in_torch else device,
                tf32=self.precision == "TF32",
            ),
        )
        return {"latency": [row.to_dict() for row in found.rows], "remarks": list(found.notes),
                "verdicts": [versus.verdict for versus in found.versus]}  # fmt: skip


def rows(name: str, precision: str, rehearse: bool) -> Iterator[dict[str, Any]]:
    if rehearse:
        checking.no_tf32 = lambda provider, eps: ""  # the path is walked; the flags change nothing on a CPU
    with tempfile.TemporaryDirectory(prefix="bntool.gpu.") as folder:
        try:
            case = Case(name, precision, Path(folder), rehearse)
        except (BntoolError, ImportError) as error:
            why = f"{type(error).__name__}: {getattr(error, 'what', error)}"
            status = "impossible" if isinstance(error, ImportError) else "failed"
            for runtime in RUNTIMES:
                yield {"runtime": runtime, "status": status, "why": why}
            return
        for runtime in RUNTIMES:
            yield {"runtime": runtime, **_told(case, runtime)}


def _told(case: Case, runtime: str) -> dict[str, Any]:
    try:
        return case.row(runtime)
    except BntoolError as error:
        why = "; ".join(filter(None, (error.what, error.where)))
        return {"status": "impossible" if _not_installed(runtime, why) else "failed", "why": why}
    except Exception as error:  # noqa: BLE001 - the row is the report
        return {"status": "failed", "why": f"{type(error).__name__}: {error}"[:500]}


def _not_installed(runtime: str, why: str) -> bool:
    """TensorRT is wanted where it is there; CUDA is what was promised."""
    return "TensorRT" in runtime and ("is not installed" in why or "was built without it" in why)


def main() -> None:
    name, precision, how = sys.argv[1:]
    warnings.simplefilter("ignore")
    for row in rows(name, precision, how == "rehearse"):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
