"""Versions of what CUDA is made of: what the driver can, what torch and ONNX Runtime were built for."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import re

Version = tuple[int, int]

# NVIDIA's table of minor version compatibility: the oldest Linux driver of each major version of CUDA.
OLDEST_DRIVER = {11: "450", 12: "525", 13: "580"}
CUDNN_MAJOR = 9
"""What onnxruntime-gpu has asked for since 1.19; its cuDNN is opened at run time, and recorded nowhere."""


def driver_cuda() -> Version | None:
    """The newest CUDA that the installed driver can run; None where no driver is installed."""
    try:
        library = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
        found = ctypes.c_int(0)
        if library.cuDriverGetVersion(ctypes.byref(found)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return found.value // 1000, found.value % 1000 // 10


def built_for(version: str | None) -> Version | None:
    """`13.0` as numbers; None for a build without CUDA."""
    match = re.match(r"(\d+)(?:\.(\d+))?", version or "")
    return (int(match[1]), int(match[2] or 0)) if match else None


def wheel_version(stem: str, major: int) -> str | None:
    """The version of an nvidia wheel, whose name has had the major version in it or not."""
    for name in (f"{stem}-cu{major}", stem):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if name != stem or stem.endswith("cudnn") or version.startswith(f"{major}."):
            return version
    return None
