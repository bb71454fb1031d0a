"""torch's older exporter, which traces: for models that torch.export cannot capture, and for old opsets.

A trace records one run. A decision on a value, a loop's length, a size read as a number stay as they were in
it, and only a run on other inputs shows whether that is right.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit._trace import TracerWarning
from torch.overrides import TorchFunctionMode

from bntool.core.errors import BntoolError, ExportError
from bntool.export.capturing import essence, fixed_batch, silent, user_line, why_no_batch_axis
from bntool.export.dynamic_axes import DynamicAxes, name_of, sample_for
from bntool.export.onnx_versions import LEAST_OPSET
from bntool.graph.inputs import Inputs, outputs_of
from bntool.observe.isolation import Isolation, fresh
from bntool.observe.stand_in import own_copy

_PREFIX = "model."


class _Flat(nn.Module):
    """The model as a function of tensors that returns a tuple of tensors; `names` are those of the outputs.

    It alone says that it trains: the exporter then folds no BatchNorm, and merges weights only where they
    are the same memory, not where they hold the same numbers.
    """

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.model = model
        self.inputs = inputs
        self.names: list[str] = []
        self.training = True

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        following: Iterator[Tensor] = iter(tensors)
        inputs = self.inputs.map(lambda _: next(following))
        outputs = outputs_of(self.model(*inputs.args, **dict(inputs.kwargs)))
        self.names = list(outputs)
        return tuple(outputs.values())


class _BatchNormCalls(TorchFunctionMode):
    """Counts the calls of a batch normalisation, and those that differ: the tracer makes one node of calls
    that do the same to the same numbers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.different: set[tuple[Any, ...]] = set()
        self._held: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.nn.functional.batch_norm, torch.batch_norm):
            self.count += 1
            given = {**dict(enumerate(args)), **(kwargs or {})}
            data: Tensor = given.pop("input" if "input" in given else 0)
            tensors = [item for item in given.values() if isinstance(item, Tensor)]
            self._held += tensors  # else another could get the number of one that is gone
            stored = tuple(map(id, tensors))
            # data of one sum counts as the same: where it is not, a node less than there are is let by
            self.different.add((*stored, data.shape, str(data.sum(dtype=torch.float64))))
        return func(*args, **(kwargs or {}))


def trace(
    model: nn.Module, inputs: Inputs, dynamic: DynamicAxes, opset: int | None
) -> tuple[Any, list[str], range, list[str]]:
    """The ONNX model with nothing folded, the names of its outputs, how many BatchNorms it may have, and what
    to tell. `model` is in eval mode.

    The torch model calls that many BatchNorms; fewer where several calls do the same to the same numbers.

    Raises `ExportError` when the exporter refuses the model, and `UsageError` for an axis that there is not.
    """
    import onnx_ir as ir

    asked = dynamic.named_for(inputs)
    axes = {name: set(of) for name, of in asked.items()}
    why_fixed = why_no_batch_axis(inputs) if dynamic.batch else ""
    if dynamic.batch and not why_fixed:
        for name, tensor in inputs.tensors().items():
            if tensor.dim():
                axes.setdefault(name, set()).add(0)
    sample = sample_for(inputs, {name: sorted(of) for name, of in axes.items()})
    named = sample.tensors()
    file: Any = io.BytesIO()
    try:
        isolation = Isolation(model)
        with silent(), isolation.run() as run, torch.no_grad(), _BatchNormCalls() as calls:
            _Flat(run, sample)(*fresh(Inputs(tuple(named.values()))).args)
        # the trace runs the model again, unwatched
        flat = _Flat(own_copy(model) if isolation.written else model, sample)
        with silent(), _no_graph_on_stdout(), warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("ignore")  # that this exporter is deprecated, which is not news
            warnings.simplefilter("always", TracerWarning)
            torch.onnx.export(
                flat,
                fresh(Inputs(tuple(named.values()))).args,
                file,
                dynamo=False,
                training=torch.onnx.TrainingMode.PRESERVE,
                do_constant_folding=False,
                opset_version=opset or LEAST_OPSET,
                input_names=list(named),
                dynamic_axes={n: {axis: name_of(n, axis) for axis in sorted(of)} for n, of in axes.items()},
            )
    except BntoolError:
        raise
    except Exception as error:
        raise ExportError(
            f"torch's legacy exporter refuses the model: {essence(error)}",
            where=user_line(error),
            next_step="try another --opset, or leave --exporter legacy out",
        ) from error
    notes = [_what_a_trace_is(warned)]
    if why_fixed:
        notes.append(fixed_batch(inputs, why_fixed))
    onnx_model = ir.serde.deserialize_model(_parsed(file.getvalue()))
    _strip_prefix(onnx_model)
    return onnx_model, flat.names, range(len(calls.different), calls.count + 1), notes


@contextlib.contextmanager
def _no_graph_on_stdout() -> Iterator[None]:
    """Where it fails the exporter logs its graph to the process's own standard output, past Python's.

    It switches that log on by itself, whatever was asked for: so there is none.
    """
    log = torch._C._jit_onnx_log
    torch._C._jit_onnx_log = lambda *_: None
    try:
        yield
    finally:
        torch._C._jit_onnx_log = log


def _parsed(data: bytes) -> Any:
    import onnx

    return onnx.load_model_from_string(data)


def _strip_prefix(onnx_model: Any) -> None:
    """Weights get the names they have in the model itself."""
    for name, value in list(onnx_model.graph.initializers.items()):
        if name.startswith(_PREFIX):
            value.name = name.removeprefix(_PREFIX)


def _what_a_trace_is(warned: list[warnings.WarningMessage]) -> str:
    frozen = [w for w in warned if issubclass(w.category, TracerWarning)]
    own = [w for w in frozen if "site-packages" not in w.filename]
    if not own:
        return "the legacy exporter traced one run; sizes and decisions in Python stay as they were in it"
    places = ", ".join(dict.fromkeys(f"{w.filename}, line {w.lineno}" for w in own))
    return f"the legacy exporter traced one run; what is decided on values stays as it was in it: {places}"
