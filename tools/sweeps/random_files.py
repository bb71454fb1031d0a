"""Networks made at random as ONNX files, written by both of torch's exporters.

They run in ONNX's reference implementation: ONNX Runtime has no convolution in float64. A file is compared
with the file before, not with the network, for ONNX rounds every ε to float32.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch import Tensor

import bntool
from bntool.core.errors import ExportError
from bntool.export.dynamic_axes import DynamicAxes
from bntool.export.legacy_exporting import trace
from bntool.graph.inputs import Inputs
from bntool.inserting import InsertOptions
from bntool.pipeline.onnx_folding import fold_onnx, insert_onnx
from tools.sweeps.random_nets import RandomNet
from tools.sweeps.random_trials import Run, Trial, any_is_wrong, difference, has_norms, inputs_of

EXPORTERS = ("raw", "legacy", "dynamo")
"""What torch's older exporter traced, as it is; that, cleaned; what torch's newer exporter made."""


def exporter_of(seed: int) -> str:
    """The newer exporter takes seconds, so that it is one in ten."""
    return "dynamo" if seed % 10 == 9 else EXPORTERS[seed % 2]


def write(net: RandomNet, path: Path, exporter: str, dtype: torch.dtype = torch.float64) -> None:
    """Write the network, which is of this type; by the newer exporter where the older one refuses."""
    example = (inputs_of(net).to(dtype),)
    for dynamic in (True, False):
        try:
            if exporter == "raw":
                ir.save(trace(net, Inputs.of(example), DynamicAxes(dynamic), None)[0], path)
            else:
                bntool.export_onnx(net, example, path, dynamic_batch=dynamic, exporter=exporter)
        except ExportError:
            continue
        return
    if exporter == "dynamo":
        raise ExportError("no exporter takes this network")
    write(net, path, "dynamo", dtype)


def batches_of(path: Path, net: RandomNet) -> list[int]:
    """The batch sizes that a file takes: a trace may have fixed the one it saw, whatever the input says."""
    run = _run(path)
    taken = [2]
    with contextlib.suppress(RuntimeError, ValueError):
        run(inputs_of(net, 3))
        taken.append(3)
    return taken


def file_trials(net: RandomNet, exporter: str) -> Iterator[Trial]:
    """The network as an ONNX file."""
    with tempfile.TemporaryDirectory() as folder:
        path, new, back = (Path(folder) / f"{name}.onnx" for name in ("net", "new", "back"))
        write(net, path, exporter)
        batches = batches_of(path, net)

        def error(after: Path) -> float:
            return difference(_run(path), _run(after), net, batches) if after.exists() else 0.0

        inserted = insert_onnx(path, new, InsertOptions(activations=("any",)))
        yield Trial(f"{exporter}, insert", inserted.plan, any_is_wrong(error(new)))
        if inserted.modified:
            result = fold_onnx(new, back, check="none")
            yield Trial(f"{exporter}, insert and fold", result.plan, error(back))
        if has_norms(net):
            for what, unshare in (("fold", False), ("fold, unshared", True)):
                new.unlink(missing_ok=True)
                result = fold_onnx(path, new, check="none", unshare=unshare)
                yield Trial(f"{exporter}, {what}", result.plan, error(new))


class ConvTranspose(OpRun):
    """As torch writes it: the reference implementation knows no groups."""

    op_domain = ""

    def _run(self, x, w, b=None, dilations=None, group=None, pads=None, strides=None, **_):  # type: ignore[no-untyped-def]
        assert not any(pads), "torch's transposed convolutions here have no padding"
        numbers = [None if a is None else torch.from_numpy(np.ascontiguousarray(a)) for a in (x, w, b)]
        made = torch.nn.functional.conv_transpose2d(
            *numbers, stride=strides, groups=group, dilation=dilations
        )
        return (made.numpy(),)


def _run(path: Path) -> Run:
    evaluator = ReferenceEvaluator(onnx.load(path), new_ops=[ConvTranspose])

    def run(x: Tensor) -> list[Tensor]:
        outputs = evaluator.run(None, {evaluator.input_names[0]: x.numpy()})
        return [torch.from_numpy(np.ascontiguousarray(array)) for array in outputs]

    return run
