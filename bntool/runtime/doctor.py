"""What this machine can run, found out by trying: versions, clashes, and providers that really work."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import re
from collections.abc import Iterator
from typing import Any, Literal

from bntool.core.errors import BntoolError, DeviceError
from bntool.core.text import as_lines
from bntool.runtime.cuda_versions import CUDNN_MAJOR, OLDEST_DRIVER, built_for, driver_cuda, wheel_version
from bntool.runtime.libraries import CPU, CUDA, TENSORRT, first_line
from bntool.runtime.providers import GPU_EXTRA, onnxruntime, run_tiny_convolution, why_no_cuda
from bntool.runtime.wheels import wheels_of, whose_library

Status = Literal["ok", "warn", "fail"]

# Before 0.5.7 its default rewriting turned a ResNet-18 into noise.
_ONNXSCRIPT_LEAST = (0, 5, 7)
_PYTHON_LEAST = (3, 10)
_TORCH_LEAST = (2, 10)
_TORCH_EXTRA = "pip install --upgrade torch (a build for the CUDA of your driver), or use --device cpu"
_DRIVER_FIRST = "the NVIDIA driver first, or use --device cpu"


@dataclasses.dataclass(frozen=True)
class Row:
    """One finding; `fix` says what to do, and is empty where there is nothing to do."""

    name: str
    status: Status
    detail: str
    fix: str = ""

    def to_dict(self) -> dict[str, str]:
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """Everything found; true when nothing fails (a machine without a GPU only warns)."""

    rows: tuple[Row, ...]

    def __bool__(self) -> bool:
        return all(row.status != "fail" for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        return {"ok": bool(self), "rows": [row.to_dict() for row in self.rows]}

    def __str__(self) -> str:
        width = max((len(row.name) for row in self.rows), default=0)
        lines = []
        for row in self.rows:
            lines.append(f"{row.status:4}  {row.name:{width}}  {row.detail}")
            if row.fix:
                lines.append(f"{'':{width + 6}}  fix: {row.fix}")
        return as_lines(*lines)


def diagnose() -> Diagnosis:
    """Look at Python, torch, the CUDA driver, ONNX and ONNX Runtime, and really run a convolution."""
    return Diagnosis(
        (_python(), *_torch(), *_converters(), *_runtime_wheels(), *_providers()),
    )


def _python() -> Row:
    version = platform.python_version()
    new_enough = _numbers(version)[:2] >= _PYTHON_LEAST
    detail = f"{version} on {platform.system()} {platform.machine()}"
    return Row(
        "python", "ok" if new_enough else "fail", detail, "" if new_enough else "use Python 3.10 or newer"
    )


def _torch() -> Iterator[Row]:
    import torch

    built = torch.version.cuda
    least = ".".join(map(str, _TORCH_LEAST))
    old = _numbers(torch.__version__)[:2] < _TORCH_LEAST
    flavour = f"built for CUDA {built}" if built else "built for the CPU"
    fix = f'pip install --upgrade "torch>={least}"' if old else ""
    yield Row("torch", "fail" if old else "ok", f"{torch.__version__}, {flavour}", fix)
    yield from _cuda(built)


def _cuda(built: str | None) -> Iterator[Row]:
    """The driver against what torch and ONNX Runtime were built for, and a convolution in torch."""
    import torch

    driver, wanted = driver_cuda(), {"torch": built_for(built), "onnxruntime": _runtime_cuda()}
    needs = {name: version for name, version in wanted.items() if version}
    told = ", ".join(f"{name} needs {_dotted(version)}" for name, version in needs.items())
    if not needs:
        yield Row("cuda driver", "warn", "not looked for: torch and ONNX Runtime are CPU builds", GPU_EXTRA)
        return
    major = max(version[0] for version in needs.values())
    oldest = OLDEST_DRIVER.get(major, "the newest")
    if driver is None:
        fix = f"install an NVIDIA driver, {oldest} or newer, or use --device cpu"
        yield Row("cuda driver", "warn", f"none found; {told}", fix)
    elif driver[0] < major:
        fix = f"update the NVIDIA driver to {oldest} or newer, or install builds for CUDA {driver[0]}"
        yield Row("cuda driver", "fail", f"too old: it runs CUDA {_dotted(driver)}; {told}", fix)
    else:
        yield Row("cuda driver", "ok", f"runs CUDA {_dotted(driver)}; {told}")
    if len({version[0] for version in needs.values()}) > 1:
        fix = "install torch and onnxruntime-gpu of one CUDA version: each loads its own libraries otherwise"
        yield Row("cuda versions", "warn", told, fix)
    yield from _libraries(needs.get("onnxruntime") or needs["torch"])
    if driver is not None:
        yield _torch_convolution(torch)


def _libraries(needed: tuple[int, int]) -> Iterator[Row]:
    major = needed[0]
    runtime, cudnn = wheel_version("nvidia-cuda-runtime", major), wheel_version("nvidia-cudnn", major)
    for name, found, least in (
        ("cuda libraries", runtime, f"CUDA {major}"),
        ("cudnn", cudnn, f"cuDNN {CUDNN_MAJOR}"),
    ):
        expected = CUDNN_MAJOR if name == "cudnn" else major
        if found is None:
            detail = f"{least} needed; no Python package has it, so the system's is used if there is one"
            yield Row(name, "warn", detail, GPU_EXTRA)
        elif built_for(found) is None or _numbers(found)[0] < expected:
            yield Row(name, "warn", f"{least} needed, {found} found", GPU_EXTRA)
        else:
            yield Row(name, "ok", f"{least} needed, {found} found")


def _torch_convolution(torch: Any) -> Row:
    try:
        one = torch.ones(1, 1, 3, 3, device="cuda")
        result = float(torch.nn.functional.conv2d(one, one))
        card = torch.cuda.get_device_name(0)
    except Exception as error:  # noqa: BLE001 - whatever the driver, CUDA or cuDNN raise
        return Row("torch on CUDA", "warn", f"no convolution runs: {first_line(error)}", _TORCH_EXTRA)
    if result != 9.0:
        return Row("torch on CUDA", "fail", f"a convolution on {card} gives {result}, not 9", _TORCH_EXTRA)
    return Row("torch on CUDA", "ok", f"a convolution ran on {card}")


def _runtime_cuda() -> tuple[int, int] | None:
    """The CUDA that the installed ONNX Runtime was built for; None for a CPU build, or none."""
    try:
        return built_for(getattr(onnxruntime(), "cuda_version", None) or None)
    except DeviceError:
        return None


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def _converters() -> Iterator[Row]:
    for name in ("onnx", "onnx-ir", "onnxscript"):
        version = installed_version(name)
        if version is None:
            yield Row(name, "fail", "not installed", f"pip install {name}")
        elif name == "onnxscript" and _numbers(version) < _ONNXSCRIPT_LEAST:
            detail = f"{version} folds BatchNorm wrongly when it optimises"
            yield Row(name, "fail", detail, 'pip install --upgrade "onnxscript>=0.5.7"')
        else:
            yield Row(name, "ok", version)


def _runtime_wheels() -> Iterator[Row]:
    found = wheels_of("onnxruntime")
    try:
        ort = onnxruntime()
    except DeviceError as error:
        yield Row("onnxruntime", "fail", error.what, error.next_step)
        return
    winner = found[0] if len(found) == 1 else whose_library(ort, found)
    if len(found) > 1:
        which = f"the files are those of {winner}" if winner else "the files are of more than one"
        kept = winner or "onnxruntime-gpu"
        yield Row(
            "onnxruntime wheels",
            "fail",
            f"{' and '.join(found)} are installed together and overwrite each other: {which}",
            f"pip uninstall -y {' '.join(found)}, then pip install {kept}",
        )
    yield Row("onnxruntime", "ok", f"{ort.__version__} ({winner or 'another build'})")


def _providers() -> Iterator[Row]:
    try:
        ort = onnxruntime()
    except DeviceError:
        return  # its own row has said so
    try:
        yield Row("CPU provider", "ok", f"a convolution ran on {run_tiny_convolution(ort, 'cpu')}")
    except BntoolError as error:
        yield Row(
            "CPU provider", "fail", error.what, error.next_step or "pip install --upgrade onnxruntime-gpu"
        )
    listed = CUDA in ort.get_available_providers()
    reason = why_no_cuda()
    if not reason:
        yield Row("CUDA provider", "ok", f"a convolution ran on {CUDA}")
    elif listed:
        fix = GPU_EXTRA if driver_cuda() else _DRIVER_FIRST
        yield Row("CUDA provider", "warn", f"listed, but not usable: {reason}", fix)
    else:
        yield Row("CUDA provider", "warn", reason, GPU_EXTRA)
    for name in ort.get_available_providers():
        if name not in (CPU, CUDA):
            yield _other_provider(ort, name)


def _other_provider(ort: Any, name: str) -> Row:
    title = f"{name.removesuffix('ExecutionProvider')} provider"
    try:
        run_tiny_convolution(ort, name)
    except BntoolError as error:
        fix = _DRIVER_FIRST if name == TENSORRT and not driver_cuda() else error.next_step
        return Row(title, "warn", f"listed, but not usable: {error.where or error.what}", fix)
    return Row(title, "ok", f"a convolution ran on {name}")


def installed_version(package: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: `2.14.1+cu130` is (2, 14, 1), `3.12.0rc1` is (3, 12, 0)."""
    release = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, release[0].split("."))) if release else ()
