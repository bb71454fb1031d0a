"""ONNX Runtime sessions whose execution provider is proved, never believed.

Asked for CUDA on a machine that cannot, ONNX Runtime builds a CPU session and raises nothing. So the
provider is read back from the session, and the device of every heavy node from its node assignment.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import glob
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch  # before onnxruntime: it loads the CUDA libraries that onnxruntime needs  # noqa: F401

from bntool.core.errors import DeviceError, ExportError, UsageError
from bntool.runtime.assignments import assignments, prove_heavy_nodes
from bntool.runtime.libraries import CPU, CUDA, TENSORRT, explain_missing, explain_missing_cuda, first_line
from bntool.runtime.naming import named_providers, on_nvidia, options_of, require_known, tell_tensorrt
from bntool.runtime.native_paths import opened_by
from bntool.runtime.tiny_model import tiny_convolution

GPU_EXTRA = 'pip install "onnxruntime-gpu[cuda,cudnn]", or use --device cpu'
TENSORRT_EXTRA = 'pip install "tensorrt-cu13<11", or use --device cuda'

# ONNX Runtime has a setter for its default log level and no getter; this is the level it starts with.
_DEFAULT_SEVERITY, _SILENT = 2, 4
_LARGE = 2**30
"""From so many bytes on a model's weights are not held twice."""

_LEVELS: dict[bool | str, str] = {
    False: "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    True: "ORT_ENABLE_ALL",
}


@dataclasses.dataclass(frozen=True)
class OpenSession:
    """A live session, the provider read back from it, and the nodes it keeps on the CPU."""

    session: Any
    provider: str
    cpu_nodes: tuple[str, ...] = ()
    note: str = ""


def onnxruntime() -> Any:
    """Import onnxruntime after torch. Raises `DeviceError` when it is not installed or does not load."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            import onnxruntime as ort
    except ImportError as error:
        raise DeviceError(
            f"ONNX Runtime cannot be imported: {first_line(error)}",
            next_step="pip install onnxruntime-gpu (or onnxruntime where there is no NVIDIA GPU)",
        ) from error
    return ort


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """How a session is to be opened; `threads` 0 leaves their number to ONNX Runtime."""

    optimize: bool | str
    tf32: bool = False
    threads: int = 0
    cuda_graph: bool = False


def open_session(
    model: str | bytes,
    device: str,
    *,
    optimize: bool | str,
    tf32: bool = False,
    threads: int = 0,
    cuda_graph: bool = False,
    ort: Any = None,
) -> OpenSession:
    """Open a model (path or bytes) on `cpu`, `cuda`, `auto` (CUDA where it truly works), or on providers by
    ONNX Runtime's own names, by commas, in their order; the first is the one to be proved.

    `optimize`: ONNX Runtime's optimisations, all or none, or those of the level `basic` or `extended`.

    Raises `DeviceError` when CUDA, or a provider by name, is asked for and not honoured, `ExportError` when
    ONNX Runtime refuses the model, `UsageError` for a provider that there is not.
    """
    ort = ort or onnxruntime()
    wanted = _Wanted(optimize, tf32, threads, cuda_graph)
    names = named_providers(device)
    if names:
        require_known(names, ort)
        if names[0] == CPU and len(names) > 1:
            raise UsageError(
                f"{CPU} takes every node, so nothing is left for {', '.join(names[1:])}",
                next_step=f"name it last: {','.join([*names[1:], CPU])}",
            )
        return _open_cpu(ort, model, wanted) if names == (CPU,) else _open_on(ort, model, wanted, names)
    if device == "cpu":
        return _open_cpu(ort, model, wanted)
    if device == "auto":
        reason = why_no_cuda()
        if reason:
            return dataclasses.replace(_open_cpu(ort, model, wanted), note=f"CPU used: {reason}")
        try:
            return _open_on(ort, model, wanted, (CUDA,))
        except DeviceError as error:
            return dataclasses.replace(_open_cpu(ort, model, wanted), note=f"CPU used: {error.what}")
    if device.partition(":")[0] == "cuda":
        return _open_on(ort, model, wanted, (CUDA,), index=device.partition(":")[2] or "0")
    raise DeviceError(f"unknown device {device!r}", next_step="use --device auto, cpu or cuda")


def _open_cpu(ort: Any, model: str | bytes, wanted: _Wanted) -> OpenSession:
    session = _create(ort, model, wanted, [CPU])
    return OpenSession(session, session.get_providers()[0])


def _open_on(
    ort: Any, model: str | bytes, wanted: _Wanted, names: tuple[str, ...], index: str = "0"
) -> OpenSession:
    """A session on these providers, CPU last if at all; every heavy node proved to be on the others."""
    devices = tuple(name for name in names if name != CPU)
    stored = _stored_types(model) if TENSORRT in devices else frozenset()
    asked = {
        name: options_of(name, index, tf32=wanted.tf32, cuda_graph=wanted.cuda_graph, stored=stored)
        for name in devices
    }
    listed: list[Any] = list(asked.items())
    if any(on_nvidia(name) for name in devices):
        preload_cuda(ort)
    if TENSORRT in devices:
        tell_tensorrt(tf32=wanted.tf32)
    strict = {"session.disable_cpu_ep_fallback": "1"}
    session = None
    if CPU not in names:
        # Shape ops that ONNX Runtime puts on the CPU on purpose also fail the strict session, as does
        # a machine without CUDA, and a broken model; the second try tells the three apart.
        with contextlib.suppress(ExportError):
            session = _create(ort, model, wanted, listed, strict)
    session = session or _create(ort, model, wanted, [*listed, CPU])
    _require_providers(ort, session, devices)
    for name, options in asked.items():
        _require_options(session, name, options)
    found = assignments(session)
    cpu_nodes = prove_heavy_nodes(found, *devices)
    if not any(node.provider == devices[0] for node in found):
        raise DeviceError(
            f"{devices[0]} was asked for, and took no node of the model",
            where=f"its nodes are on {', '.join(sorted({node.provider for node in found}))}",
            next_step=f"use --providers {','.join(devices[1:]) or CPU}",
        )
    return OpenSession(session, devices[0], cpu_nodes)


def _stored_types(model: str | bytes) -> frozenset[str]:
    """The types of a model's weights by ONNX's names; none where it cannot be read, which is told later."""
    import onnx

    try:
        if isinstance(model, bytes):
            read = onnx.load_model_from_string(model)
        else:
            read = onnx.load(model, load_external_data=False)
    except Exception:  # noqa: BLE001 - whatever protobuf raises
        return frozenset()
    return frozenset(onnx.TensorProto.DataType.Name(t.data_type) for t in read.graph.initializer)


def _require_providers(ort: Any, session: Any, devices: Sequence[str]) -> None:
    """Raise `DeviceError` for a provider that was asked for and left out without a word."""
    got = session.get_providers()
    for name in (name for name in devices if name not in got):
        if name == CUDA and got[0] == CPU:
            raise DeviceError(
                f"CUDA was asked for, but ONNX Runtime built a {got[0]} session",
                where=explain_missing_cuda(ort),
                next_step=GPU_EXTRA,
            )
        raise DeviceError(
            f"{name} was asked for, but ONNX Runtime built a session of {', '.join(got)}",
            where=explain_missing(ort, name),
            next_step=TENSORRT_EXTRA if name == TENSORRT else "name another with --providers",
        )


def _create(
    ort: Any,
    model: str | bytes,
    wanted: _Wanted,
    providers: list[Any],
    config: dict[str, str] | None = None,
) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = _SILENT
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = getattr(level, _LEVELS[wanted.optimize])
    options.use_deterministic_compute = True
    if wanted.threads:
        options.intra_op_num_threads = wanted.threads
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if isinstance(model, str) and _bytes_beside(model) > _LARGE:
        # weights reordered for a kernel are a second copy of them
        options.add_session_config_entry("session.disable_prepacking", "1")
    for key, value in (config or {}).items():
        options.add_session_config_entry(key, value)
    try:
        with quiet(ort):
            return ort.InferenceSession(opened_by(model), options, providers=providers)
    except Exception as error:  # its exceptions share no base class but Exception
        raise ExportError(
            f"ONNX Runtime refuses the model: {first_line(error)}",
            where=model if isinstance(model, str) else "",
            next_step=_after_refusal(str(error)),
        ) from error


def _bytes_beside(model: str) -> int:
    """Of a model and of the files whose names begin with its own, where its data may lie."""
    path = Path(model)
    return sum(one.stat().st_size for one in path.parent.glob(f"{glob.escape(path.name)}*") if one.is_file())


def _after_refusal(message: str) -> str:
    if "NOT_IMPLEMENTED" in message:
        return "this provider has no kernel for that op and type: convert the model to float32"
    if "External data path" in message:
        return "copy the data beside the model"
    if "is not a registered function/op" in message:
        return "run it where the library of that op is registered; bntool fold --check none needs no run"
    if "bfloat16" in message:
        return "ONNX Runtime has no such op for bfloat16 here: convert the model to float32"
    return "try another --opset, or report the model to bntool"


def _require_options(session: Any, provider: str, asked: dict[str, str]) -> None:
    taken = session.get_provider_options().get(provider, {})
    for key, value in asked.items():
        if key in taken and str(taken[key]) != value:
            raise DeviceError(
                f"the {provider.removesuffix('ExecutionProvider')} provider did not take {key}={value} "
                f"(it has {taken[key]})",
                next_step="pip install --upgrade onnxruntime-gpu, or use --device cpu",
            )


@contextlib.contextmanager
def quiet(ort: Any) -> Iterator[None]:
    """Keep ONNX Runtime's banners off stdout and its own log off stderr: the errors raised say it all."""
    ort.set_default_logger_severity(_SILENT)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        ort.set_default_logger_severity(_DEFAULT_SEVERITY)


def preload_cuda(ort: Any) -> None:
    """Load the CUDA and cuDNN libraries that the nvidia wheels carry, silently."""
    with contextlib.suppress(Exception), quiet(ort):
        ort.preload_dlls()


@functools.cache
def why_no_cuda() -> str:
    """Why ONNX Runtime cannot use CUDA here, or `""` after a convolution really ran on it."""
    ort = onnxruntime()
    if CUDA not in ort.get_available_providers():
        return "the installed ONNX Runtime was built without CUDA"
    try:
        run_tiny_convolution(ort, "cuda")
    except (DeviceError, ExportError) as error:
        return error.where or error.what
    return ""


def run_tiny_convolution(ort: Any, device: str) -> str:
    """Really run one convolution on `device`; return the provider that ran it.

    Raises `DeviceError` when it does not run there or gives a wrong result.
    """
    import numpy as np

    opened = open_session(tiny_convolution(), device, optimize=False, ort=ort)
    try:
        (result,) = opened.session.run(None, {"x": np.ones((1, 1, 3, 3), np.float32)})
    except Exception as error:
        raise DeviceError(
            f"a tiny convolution does not run on {opened.provider}: {first_line(error)}", next_step=GPU_EXTRA
        ) from error
    if float(result.reshape(-1)[0]) != 9.0:
        raise DeviceError(f"a tiny convolution on {opened.provider} gives {result.reshape(-1)[0]}, not 9")
    return opened.provider
