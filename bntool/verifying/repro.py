"""A mismatch as a folder that shows it: inputs, what they meet, what was expected, a short script."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from bntool.core.errors import CheckFailed, UsageError
from bntool.files.drafts import draft_folder
from bntool.files.placing import place_folder
from bntool.runtime.libraries import CPU, CUDA
from bntool.verifying.blaming import Found

_LEVELS = {False: "DISABLE_ALL", True: "ENABLE_ALL", "basic": "ENABLE_BASIC", "extended": "ENABLE_EXTENDED"}

_ONNX = '''"""{title}"""
import numpy as np, onnxruntime as ort, os
os.chdir(os.path.dirname(os.path.abspath(__file__)))
options = ort.SessionOptions()
options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_{level}
session = ort.InferenceSession("model.onnx", options, providers=["{provider}"])
inputs, expected = np.load("inputs.npz"), np.load("expected.npy")
feed = {{info.name: inputs[f"input_{{i}}"] for i, info in enumerate(session.get_inputs())}}
got = session.run(None, feed)[0]
'''
_TORCH = '''"""{title}"""
import numpy as np, os, torch
os.chdir(os.path.dirname(os.path.abspath(__file__)))
x = torch.from_numpy(np.load("inputs.npz")["input_0"])
reference, candidate = (torch.load(n, weights_only=False).eval() for n in ("reference.pt", "candidate.pt"))
with torch.no_grad():
    expected, got = reference(x).numpy(), candidate(x).numpy()
'''
_VERDICT = """alike = got.shape == expected.shape
worst = np.nan_to_num(np.abs(got.astype(float) - expected), nan=np.inf).max() if alike else np.inf
print("max |d|", worst, "peak", np.abs(expected).max(), "shapes", got.shape, expected.shape)
raise SystemExit(int(not worst <= {limit!r} * np.abs(expected).max()))  # 1: they differ
"""


def require_no_folder(folder: Path) -> None:
    """Raise `UsageError` where a repro would write among other files."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"--repro {folder} is there already", next_step="name a folder that does not exist")
    if not folder.resolve().parent.is_dir():
        raise UsageError(f"there is no folder {folder.resolve().parent}", next_step="make it first")


def write_repro(found: Found, folder: Path) -> Path:
    """Write the folder, whole or not at all; return its script, which exits with 1 while they differ.

    Raises `CheckFailed` where there is nothing smaller than the models themselves to show, `UsageError` where
    the folder cannot be written.
    """
    require_no_folder(folder)
    if found.cut is None and found.layers is None:
        raise CheckFailed(
            f"no repro is written: {found.blame.name} cannot be taken out of the model",
            next_step="the models and the inputs themselves show the difference",
        )
    try:
        with draft_folder(folder) as beside:
            draft = beside / folder.name
            draft.mkdir(mode=0o755)
            _fill(found, draft)
            place_folder(draft, folder)
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"cannot write {folder}: {reason}", next_step="name another --repro DIR") from error
    return folder / "run.py"


def _fill(found: Found, folder: Path) -> None:
    blame = found.blame
    title = f"{blame.value}, given by {blame.name} ({blame.kind}), is not what the reference has there."
    order = found.cut.inputs if found.cut is not None else list(found.feeds)
    arrays = {f"input_{i}": _array(found.feeds[name]) for i, name in enumerate(order)}
    np.savez(folder / "inputs.npz", allow_pickle=False, **arrays)
    if found.cut is not None:
        found.cut.write(folder / "model.onnx")
        np.save(folder / "expected.npy", _array(found.expected))
        provider = found.device
        if not provider.endswith("ExecutionProvider"):
            provider = CUDA if provider.startswith("cuda") else CPU
        script = _ONNX.format(title=_plain(title), level=_LEVELS[found.optimize], provider=provider)
    elif found.layers is not None:
        for name, layer in zip(("reference", "candidate"), found.layers, strict=True):
            torch.save(layer, folder / f"{name}.pt")
        script = _TORCH.format(title=_plain(title))
    (folder / "run.py").write_text(script + _VERDICT.format(limit=blame.limit), encoding="utf-8")


def _array(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        raise CheckFailed(
            "no repro is written: numpy has no bfloat16",
            next_step="the models and the inputs themselves show the difference",
        )
    return tensor.detach().cpu().numpy()


def _plain(text: str) -> str:
    """A text that a docstring can hold, whatever a layer or node is called."""
    return text.encode("unicode_escape").decode("ascii").replace('"', "'").replace("\\", "/")
