"""Execution providers by ONNX Runtime's own names, and the options that each is given."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence, Set
from typing import Any

from bntool.core.errors import DeviceError, UsageError
from bntool.runtime.libraries import CUDA, TENSORRT

_ENDING = "ExecutionProvider"
_TF32 = "NVIDIA_TF32_OVERRIDE"


def named_providers(device: str) -> tuple[str, ...]:
    """The providers that a device names in ONNX Runtime's words, by commas; none for `auto` or `cuda`."""
    return tuple(name for name in device.split(",") if name) if _ENDING in device else ()


def require_known(names: Sequence[str], ort: Any) -> None:
    """Refuse what cannot be opened.

    Raises `UsageError`, with the closest name, for a provider that ONNX Runtime has never heard of, and
    `DeviceError` for one that the installed wheel was built without.
    """
    for name in names:
        known, here = ort.get_all_providers(), ort.get_available_providers()
        if name not in known:
            by_small = {each.lower(): each for each in known}
            small = [name.lower(), f"{name.lower()}executionprovider"]
            close = [m for s in small for m in difflib.get_close_matches(s, by_small, n=1, cutoff=0.5)]
            best = max(close, key=lambda m: max(difflib.SequenceMatcher(None, m, s).ratio() for s in small),
                       default="")  # fmt: skip
            raise UsageError(
                f"ONNX Runtime knows no {name!r}" + (f"; did you mean {by_small[best]}?" if best else ""),
                next_step=f"this build has {', '.join(here)}",
            )
        if name not in here:
            raise DeviceError(
                f"{name} was asked for, and the installed ONNX Runtime was built without it",
                where=f"this build has {', '.join(here)}",
                next_step="install the build that has it, or name another with --providers",
            )


def on_nvidia(provider: str) -> bool:
    return provider in (CUDA, TENSORRT)


def torch_device_of(names: Sequence[str]) -> str:
    """Where torch runs beside these providers."""
    return "cuda" if any(on_nvidia(name) for name in names) else "cpu"


def options_of(
    provider: str, index: str, *, tf32: bool, cuda_graph: bool, stored: Set[str] = frozenset()
) -> dict[str, str]:
    """What a provider is opened with; `index` is the number of the GPU, `stored` the types of the weights."""
    if provider == CUDA:
        # The exhaustive search times the algorithms anew in each session, and results then wobble.
        options = {
            "device_id": index,
            "use_tf32": "1" if tf32 else "0",
            "cudnn_conv_algo_search": "DEFAULT",
        }
        return options | ({"enable_cuda_graph": "1"} if cuda_graph else {})
    if provider == TENSORRT:
        # Types stay those of the file: TensorRT must be allowed what it holds, and nothing else. An engine of
        # an earlier run proves nothing about this one.
        options = {
            "device_id": index,
            "trt_fp16_enable": str(int("FLOAT16" in stored)),
            "trt_bf16_enable": str(int("BFLOAT16" in stored)),
            "trt_int8_enable": "0",
            "trt_engine_cache_enable": "0",
            "trt_timing_cache_enable": "0",
        }
        return options | ({"trt_cuda_graph_enable": "1"} if cuda_graph else {})
    return {}


def tell_tensorrt(*, tf32: bool) -> None:
    """TensorRT takes TF32 on its own, and its provider has no option against it: NVIDIA's variable is all.

    Engines of open axes are built at the first run, so it stays set. Where the variable did not reach
    TensorRT, the limit of full float32 fails the check.
    """
    if tf32:
        os.environ.pop(_TF32, None)
    else:
        os.environ[_TF32] = "0"
