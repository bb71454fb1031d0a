"""Why ONNX Runtime has no CUDA here: which shared library does not load."""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path
from typing import Any

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"


def explain_missing_cuda(ort: Any) -> str:
    """The most likely reason why this ONNX Runtime has no CUDA, in one line."""
    if CUDA not in ort.get_available_providers():
        return "the installed ONNX Runtime was built without CUDA"
    return explain_missing(ort, CUDA)


def explain_missing(ort: Any, provider: str) -> str:
    """The most likely reason why a provider of this ONNX Runtime does not load, in one line."""
    folder = Path(ort.__file__).parent / "capi"
    suffix = ".dll" if os.name == "nt" else ".so"
    prefix = "" if os.name == "nt" else "lib"
    kind = provider.removesuffix("ExecutionProvider").lower()
    # The provider's library finds its host functions in the shared one, which must be visible first.
    for name, mode in (("shared", ctypes.RTLD_GLOBAL), (kind, ctypes.DEFAULT_MODE)):
        library = folder / f"{prefix}onnxruntime_providers_{name}{suffix}"
        if not library.exists():
            return f"{library.name} is not in the installed wheel"
        try:
            ctypes.CDLL(str(library), mode=mode)
        except OSError as error:
            return _missing_library(str(error), ort)
    return "the libraries load, but no usable GPU was found"


def _missing_library(message: str, ort: Any) -> str:
    missing = message.partition(":")[0]
    if missing.startswith("libcuda."):
        return f"{missing} not found: no NVIDIA driver on this machine"
    if missing.startswith(("libnvinfer", "libnvonnxparser")):
        return f"{missing} not found: TensorRT {missing.rpartition('.')[2]} is not installed"
    needs = getattr(ort, "cuda_version", "") or "its own version"
    return f"{message.strip()} (onnxruntime {ort.__version__} needs CUDA {needs} and cuDNN 9)"


def first_line(error: BaseException) -> str:
    """The first line of an error's text that says something, without ONNX Runtime's numbering."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : (\w+) : ", r"\1: ", text)
