"""Where a command runs: what `--device` and `--providers` ask for must be there, before any work."""

from __future__ import annotations

import dataclasses

from bntool.core.errors import DeviceError, UsageError
from bntool.core.options import PlaceOptions


@dataclasses.dataclass(frozen=True)
class Devices:
    """Where torch runs, and where ONNX Runtime does: `auto`, `cpu`, `cuda:N`, or names of providers."""

    torch: str = "auto"
    onnx: str = "auto"
    named: bool = False
    """Whether `onnx` are providers that the user named."""

    def require_fitting(self, kind: str) -> None:
        """A program names the device that it runs on in its own graph, and is loaded for the CPU."""
        if kind == "program":
            require_cpu(self.torch)


def require_cpu(device: str) -> None:
    """Raise `DeviceError` where an exported program was to run elsewhere."""
    if device not in ("auto", "cpu"):
        raise DeviceError(
            f"an exported program is checked on the CPU, and --device {device} was asked for",
            next_step="leave --device out; bntool verify FILE.onnx checks its ONNX file on CUDA",
        )


def require_places(asked: PlaceOptions, *, torch_too: bool = False, onnx_too: bool = False) -> Devices:
    """Before any work: what `--device` or `--providers` asks for must be there, and really run."""
    if not asked.providers:
        require_device(asked.device, torch_too=torch_too, onnx_too=onnx_too)
        return Devices(asked.device, asked.device)
    if not onnx_too:
        raise UsageError(
            "--providers is about ONNX Runtime, and no ONNX file takes part",
            next_step="leave it out; --device says where torch runs",
        )
    if asked.device != "auto":
        raise UsageError(
            "--providers and --device both say where to run", next_step="leave --device out, torch follows"
        )
    from bntool.runtime.naming import require_known, torch_device_of
    from bntool.runtime.providers import onnxruntime, run_tiny_convolution

    ort = onnxruntime()
    require_known(asked.providers, ort)
    names = ",".join(asked.providers)
    run_tiny_convolution(ort, names)
    device = torch_device_of(asked.providers)
    require_device(device, torch_too=torch_too)
    return Devices(device, names, named=True)


def require_device(device: str, *, torch_too: bool = False, onnx_too: bool = False) -> None:
    """Before any work: CUDA that is asked for must be there. Raises `DeviceError` with the reasons."""
    if device in ("auto", "cpu"):
        return
    import torch

    from bntool.runtime.providers import GPU_EXTRA, why_no_cuda
    from bntool.runtime.torch_runner import require_torch_device

    if torch_too:
        try:
            require_torch_device(device)
        except DeviceError as error:
            reason = why_no_cuda()
            where = "; ".join(filter(None, (error.where, reason)))
            raise DeviceError(error.what, where=where, next_step=error.next_step) from error
        index, count = torch.device(device).index or 0, torch.cuda.device_count()
        if index >= count:
            found = f"torch finds {count} CUDA device(s)"
            raise DeviceError(f"there is no {device}", where=found, next_step="use --device cuda")
    reason = why_no_cuda() if onnx_too else ""
    if reason:
        what = "CUDA was asked for, but ONNX Runtime cannot use it"
        raise DeviceError(what, where=reason, next_step=GPU_EXTRA)


def torch_device(device: str) -> str:
    """Where torch checks: CUDA if it was asked for or is there, else the CPU. `DeviceError` if it cannot."""
    import torch

    from bntool.runtime.torch_runner import require_torch_device

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    require_torch_device(device)
    return device
