"""Run an ONNX file with ONNX Runtime on a provider that is read back and proved."""

from __future__ import annotations

import collections
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from bntool.core.errors import BntoolError, DeviceError, ExportError
from bntool.graph.inputs import Inputs
from bntool.runtime.assignments import assignments
from bntool.runtime.libraries import CPU, first_line
from bntool.runtime.naming import on_nvidia
from bntool.runtime.providers import GPU_EXTRA, open_session
from bntool.runtime.runner import fits

_NARROW = {"tensor(float16)": torch.float16, "tensor(bfloat16)": torch.bfloat16}
_OF_THE_DEVICE = ("CUDA", "CUDNN", "cuDNN", "CUBLAS", "Failed to allocate memory", "TensorRT")
_BFLOAT16 = 16  # TensorProto.BFLOAT16: numpy has no such type, so it travels as its 16 bits


class OrtRunner:
    """Runs an ONNX file; `provider` is read back, `cpu_nodes` lists what it left on the CPU, `note` says what
    `auto` chose and why.

    `optimize` switches ONNX Runtime's graph optimisations, or names their level, `basic` or `extended`;
    `tf32` lets CUDA round float32 products; `threads` is how many it computes with on the CPU (0: its own
    choice); `cuda_graph` has CUDA replay one recorded run, for inputs of one shape that are bound with
    `bound(..., fixed_outputs=True)`.
    Raises `DeviceError` when CUDA is asked for and not honoured, `ExportError` when the file is refused.
    """

    def __init__(
        self,
        path: str | Path,
        device: str = "auto",
        *,
        optimize: bool | str = True,
        tf32: bool = False,
        threads: int = 0,
        cuda_graph: bool = False,
    ) -> None:
        self._path = Path(path)
        opened = open_session(
            str(path), device, optimize=optimize, tf32=tf32, threads=threads, cuda_graph=cuda_graph
        )
        self._session = opened.session
        self._optimize = optimize
        self._provider = opened.provider
        self.cpu_nodes = opened.cpu_nodes
        self.note = opened.note
        self.input_names: tuple[str, ...] = tuple(i.name for i in self._session.get_inputs())
        self.output_names: tuple[str, ...] = tuple(o.name for o in self._session.get_outputs())

    @property
    def label(self) -> str:
        return f"ONNX Runtime {self._path.name} (optimisations {'on' if self._optimize else 'off'})"

    @property
    def device(self) -> str:
        """`cpu`, or `cuda:0 (name of the card)`, from the provider that the session really has."""
        if self._provider == CPU:
            return "cpu"
        if not on_nvidia(self._provider):
            return self._provider.removesuffix("ExecutionProvider").lower()
        index = int(self._cuda_index)
        name = f" ({torch.cuda.get_device_name(index)})" if torch.cuda.is_available() else ""
        return f"cuda:{index}{name}"

    @property
    def provider(self) -> str:
        return self._provider

    @property
    def nodes(self) -> dict[str, int]:
        """How many nodes each provider was given, as the session recorded it."""
        return dict(collections.Counter(node.provider for node in assignments(self._session)))

    @property
    def signature(self) -> list[tuple[str, str, list[int | str | None]]]:
        """Name, type and axes of every input; an axis that the file leaves open is a name or None."""
        return [(i.name, i.type, list(i.shape)) for i in self._session.get_inputs()]

    def accepts(self, inputs: Inputs) -> bool:
        """Whether every fixed axis of the file's inputs has the length that these inputs have."""
        fed = self._by_name(inputs)
        return all(fits(i.shape, fed[i.name].shape) for i in self._session.get_inputs())

    def bound(self, inputs: Inputs, *, fixed_outputs: bool = False) -> Callable[[], None]:
        """A function that runs the file once on these inputs, which are held on the device, as are outputs.

        With `fixed_outputs` every run writes to the same memory. Raises as `run`.
        """
        kind, index = ("cuda", int(self._cuda_index)) if on_nvidia(self._provider) else ("cpu", 0)
        binding = self._session.io_binding()
        for name, value in self.values(inputs, kind, index).items():
            binding.bind_ortvalue_input(name, value)
        for name in self.output_names:
            binding.bind_output(name, kind, index)

        def run() -> None:
            try:
                self._session.run_with_iobinding(binding)
            except Exception as error:  # its exceptions share no base class but Exception
                raise self._failed(error, inputs) from error

        if fixed_outputs:
            run()
            outputs = binding.get_outputs()
            binding.clear_binding_outputs()
            for name, value in zip(self.output_names, outputs, strict=True):
                binding.bind_ortvalue_output(name, value)
        return run

    @property
    def _cuda_index(self) -> str:
        return str(self._session.get_provider_options()[self._provider].get("device_id", 0))

    def _failed(self, error: Exception, inputs: Inputs) -> BntoolError:
        reason = first_line(error)
        if on_nvidia(self._provider) and any(word in str(error) for word in _OF_THE_DEVICE):
            memory = "out of memory" in str(error).lower() or "Failed to allocate memory" in str(error)
            step = "take a smaller batch or input, or use --device cpu" if memory else GPU_EXTRA
            return DeviceError(f"CUDA failed while running: {reason}", where=str(self._path), next_step=step)
        return ExportError(
            f"ONNX Runtime cannot run the file on {inputs.shapes()}: {reason}",
            where=str(self._path),
            next_step="pass inputs of the shape it was exported for, or export again",
        )

    def run(self, inputs: Inputs) -> dict[str, Tensor]:
        """Every output by name, on the CPU.

        Inputs are matched by name, else in order. Raises `ExportError` when they do not fit the file or
        when it does not run, `DeviceError` when CUDA fails while running.
        """
        fed = self.values(inputs)
        try:
            values = self._session.run_with_ort_values(list(self.output_names), fed)
        except Exception as error:  # its exceptions share no base class but Exception
            raise self._failed(error, inputs) from error
        named = dict(zip(self.output_names, values, strict=True))
        odd = [name for name, v in named.items() if not v.is_tensor() or "string" in v.data_type()]
        if odd:
            raise ExportError(
                f"the output {odd[0]} is a {named[odd[0]].data_type()}, which cannot be compared",
                where=str(self._path),
                next_step="compare the model without that output",
            )
        return {name: _to_tensor(value) for name, value in named.items()}

    def values(self, inputs: Inputs, kind: str = "cpu", index: int = 0) -> dict[str, Any]:
        """The inputs as ONNX Runtime takes them; floating ones in half precision where the file says."""
        declared = {i.name: _NARROW.get(i.type) for i in self._session.get_inputs()}
        return {
            name: _to_value(
                t.to(declared[name]) if declared[name] and t.is_floating_point() else t, kind, index
            )
            for name, t in self._by_name(inputs).items()
        }

    def _by_name(self, inputs: Inputs) -> dict[str, Tensor]:
        given = inputs.tensors()
        if set(self.input_names) <= set(given):
            return {name: given[name] for name in self.input_names}
        if len(given) == len(self.input_names):
            return dict(zip(self.input_names, given.values(), strict=True))
        takes, got = (", ".join(names) or "nothing" for names in (self.input_names, given))
        raise ExportError(
            f"the file takes {takes}; given: {got}",
            where=str(self._path),
            next_step="name the inputs with --input NAME:SHAPE",
        )


def _to_value(tensor: Tensor, kind: str, index: int) -> Any:
    from onnxruntime import OrtValue

    array = tensor.detach().cpu().contiguous()
    if array.dtype == torch.bfloat16:
        return OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(torch.int16).numpy(), _BFLOAT16)
    return OrtValue.ortvalue_from_numpy(array.numpy(), kind, index)


def _to_tensor(value: Any) -> Tensor:
    if value.data_type() == "tensor(bfloat16)":
        return from_dlpack(value._ortvalue)
    return torch.from_numpy(value.numpy().copy())
