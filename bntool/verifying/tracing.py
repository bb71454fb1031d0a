"""What every layer of a torch model gives on the way to the outputs."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from bntool.core.blame import Step
from bntool.graph.inputs import Inputs
from bntool.runtime.torch_runner import TorchRunner


@dataclasses.dataclass(frozen=True)
class Trace:
    """The steps of one run in their order, every value by name, and which of them the model returns."""

    steps: tuple[Step, ...]
    values: Mapping[str, Tensor]
    outputs: tuple[str, ...]


def trace_module(model: nn.Module, inputs: Inputs, *, float64: bool = False) -> Trace:
    """Run a model in eval mode and keep what each of its leaf layers was given and returned.

    Values are named after the layer's qualified name, `name#2` at its second call. What is computed between
    layers, in a `forward`, is a step of its own, `before NAME`. Layers that return no tensor are left out.
    """
    import torch

    runner = TorchRunner(model, "cpu", torch.float64 if float64 else None)
    recorder = _Recorder()

    def hook(running: nn.Module) -> None:
        for name, leaf in running.named_modules():
            if name and not any(leaf.children()):
                leaf.register_forward_pre_hook(recorder.reading(name))
                leaf.register_forward_hook(recorder.giving(name))

    return recorder.trace(runner.run(inputs, prepare=hook))


class _Recorder:
    def __init__(self) -> None:
        self._calls: dict[str, int] = {}
        self._steps: list[Step] = []
        self._values: dict[str, Tensor] = {}
        # by id, with a reference that tells when the tensor is gone and its id may be another's
        self._made_by: dict[int, tuple[weakref.ref[Tensor], str, int]] = {}
        self._loose: dict[str, None] = {}
        self._reads: dict[str, tuple[str, ...]] = {}

    def reading(self, name: str) -> Any:
        """A hook before one layer: what it reads, under the name of the layer that made it."""

        def note(_: nn.Module, args: tuple[Any, ...]) -> None:
            label = self._label(name)
            fed = [a for a in args if isinstance(a, Tensor)]
            self._reads[name] = tuple(self._read(label, i, tensor) for i, tensor in enumerate(fed))

        return note

    def giving(self, name: str) -> Any:
        """A hook after one layer. It keeps a copy: what comes later may write into the very same tensor."""

        def keep(module: nn.Module, _: tuple[Any, ...], output: Any) -> None:
            label, reads = self._label(name), self._reads.pop(name, ())
            self._calls[name] = self._calls.get(name, 0) + 1
            if not isinstance(output, Tensor):
                return
            self._steps.append(Step(label, type(module).__name__, reads, (label,)))
            self._values[label] = output.detach().cpu().clone()
            self._made_by[id(output)] = (weakref.ref(output), label, output._version)
            self._loose[label] = None

        return keep

    def _label(self, name: str) -> str:
        count = self._calls.get(name, 0)
        return f"{name}#{count + 1}" if count else name

    def _read(self, label: str, index: int, tensor: Tensor) -> str:
        maker = self._made_by.get(id(tensor))
        if maker is not None and maker[0]() is tensor and maker[2] == tensor._version:
            self._loose.pop(maker[1], None)
            return maker[1]
        made = f"{label}:{index}"
        self._values[made] = tensor.detach().cpu().clone()
        self._steps.append(Step(f"before {label}", "forward", tuple(self._loose), (made,)))
        self._loose.clear()
        return made

    def trace(self, outputs: Mapping[str, Tensor]) -> Trace:
        returned = tuple(f"output {name}" for name in outputs)
        last = [Step("the end of forward", "forward", tuple(self._loose), (name,)) for name in returned]
        values = {**self._values, **dict(zip(returned, outputs.values(), strict=True))}
        return Trace((*self._steps, *last), values, returned)


def once_called(trace: Trace) -> Iterator[tuple[str, Tensor]]:
    """The layers that ran exactly once, and what they returned."""
    more = {name.partition("#")[0] for name in trace.values if "#" in name}
    for step in trace.steps:
        if step.kind != "forward" and step.name not in more and "#" not in step.name:
            yield step.name, trace.values[step.name]
