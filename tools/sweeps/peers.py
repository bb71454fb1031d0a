"""Compare bntool with the best BatchNorm folders there are, model by model: `make peers`.

Each tool works on each model in a process of its own with a time limit. Results are appended to
`docs/peers.jsonl`, one line a model, so that the sweep can be stopped and gone on with (without the file it
starts anew); `docs/peers.md` is written from them. The models are a sample of all kinds, and every one of the
sweep (`docs/coverage.jsonl`) on which bntool keeps a BatchNorm: on no other could a peer be ahead.
"""

from __future__ import annotations

import contextlib
import functools
import pickle
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from tools.sweeps.peer_models import MODELS, kept_in
from tools.sweeps.peer_page import page
from tools.sweeps.peer_tools import TOOLS, Case, versions
from tools.sweeps.processes import in_own_process
from tools.sweeps.sweeping import Results, arguments
from tools.sweeps.zoo import GAINS, VIDEO, randomise
from tools.sweeps.zoo import RESULTS as SWEEP

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "peers.jsonl"
_SIDE = 64
"""Small images show the same graph at a fraction of the time; models that take none get their own size."""


def make(name: str, gain: float = 1.0) -> Any:
    """The model in eval mode, with random weights and statistics, the same every time; γ is `gain` times."""
    from bntool.files.references import build

    model = build(name).model.eval()
    randomise(model, gain=gain)
    return model


def observed(model: Any) -> Any:
    """The model observed on a small image, or on the smallest that it takes."""
    import torch

    from bntool.core.errors import ObserveError
    from bntool.files.references import recorded_inputs
    from bntool.graph.inputs import Inputs
    from bntool.observe.eager import observe
    from bntool.observe.inference import observe_inferred

    def drawn(*shape: int) -> Any:
        return Inputs((torch.randn(shape, generator=torch.Generator().manual_seed(0)),))

    for inputs in (drawn(1, 3, _SIDE, _SIDE), recorded_inputs(model), drawn(*VIDEO)):
        with contextlib.suppress(ObserveError):
            if inputs is not None:
                return observe(model, inputs)
    return observe_inferred(model, small=True)


def prepare(name: str, folder: Path, gain: float = 1.0) -> dict[str, Any]:
    """Export the model unfolded, run the original, and keep in `folder` what every tool is held against."""
    from bntool.api import export_onnx
    from bntool.verifying.reference import Reference
    from tools.sweeps.fingerprints import fingerprints, trace_onnx

    model = make(name, gain)
    observation = observed(model)
    unfolded = folder / "unfolded.onnx"
    export_onnx(model, observation.inputs, unfolded, dynamic_batch=False)
    reference = Reference(model, [observation.inputs])
    batch_norms, own = fingerprints(observation.graph), trace_onnx(unfolded)
    kept = (observation.inputs, reference.outputs, reference.limits, reference.layers, batch_norms, own)
    (folder / "reference.pickle").write_bytes(pickle.dumps(kept))
    unseen = sorted(set(batch_norms) - set(own.left(batch_norms)))
    if unseen:
        raise LookupError(f"not found by value in the unfolded file: {', '.join(unseen)}")
    return {"status": "ok", "input": observation.inputs.shapes(), "bn": list(batch_norms)}


def judge(name: str, tool: str, folder: Path, gain: float = 1.0) -> dict[str, Any]:
    """Let one tool fold the model; say which BatchNorms are left, and whether the result is right."""
    import torch

    from bntool.verifying.comparing import compare, noise_limits

    kept = (folder / "reference.pickle").read_bytes()
    inputs, expected, limits, layers, batch_norms, own = pickle.loads(kept)  # noqa: S301 - written by `prepare`
    start = time.perf_counter()
    outcome = TOOLS[tool](Case(functools.partial(make, name, gain), inputs, folder / "unfolded.onnx", folder))
    seconds = time.perf_counter() - start
    got = named_as(expected[0], outcome.outputs)
    if outcome.rest is not None:
        rounding = named_as(expected[0], outcome.rest)
        theirs = noise_limits(expected, [rounding], layers, torch.finfo(torch.float32).eps)
        limits = {name: max(limit, theirs[name], key=lambda x: x.limit) for name, limit in limits.items()}
    check = compare(expected, [got], limits, stage="fold", device="cpu", provider=tool)
    decidable = not (check.undecided or any(limit.undecidable for limit in limits.values()))
    return {
        "status": "ok" if check.passed else "wrong" if decidable else "undecided",
        "left": outcome.trace.left(batch_norms),
        "unnamed": outcome.trace.unnamed(batch_norms, own),
        "error_over_noise": float(f"{check.ratio:.3g}"),
        "seconds": round(seconds, 1),
    }


def named_as(expected: dict[str, Any], outputs: dict[str, Any]) -> dict[str, Any]:
    """The outputs, in their order, under the names that the original gives them."""
    if len(outputs) != len(expected):
        raise ValueError(f"{len(outputs)} outputs, expected {len(expected)}")
    return dict(zip(expected, outputs.values(), strict=True))


def examine(name: str, limit: float) -> dict[str, Any]:
    """The row of one model, with the first gain at which rounding does not decide what it computes."""
    row = _examined(name, limit, GAINS[0])
    return {**_examined(name, limit, GAINS[1]), "gain": GAINS[1]} if undecided(row) else row


def undecided(row: dict[str, Any]) -> bool:
    found = row.get("tools", {}).values()
    return any(f["status"] == "undecided" or "rounding alone" in f.get("error", "") for f in found)


def _examined(name: str, limit: float, gain: float) -> dict[str, Any]:
    """What each tool leaves of a model's BatchNorms."""
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        row = {"model": name, **in_own_process(lambda: prepare(name, folder, gain), limit)}
        if row["status"] == "ok" and row["bn"]:
            row["tools"] = {
                tool: in_own_process(lambda tool=tool: judge(name, tool, folder, gain), limit)
                for tool in TOOLS
            }
        row["versions"] = versions()
        return row


def out_of_time(row: dict[str, Any]) -> bool:
    return any(found["status"] == "time limit" for found in (row, *row.get("tools", {}).values()))


def warm_up() -> None:
    """Import, and let torch's exporter build its tables, once before the forks and not in each of them."""
    import timm  # noqa: F401
    import torch
    import torchvision  # noqa: F401

    import bntool

    torch.set_num_threads(1)  # a fork after a team of threads has run would wait for them for ever
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = torch.nn.Conv2d(3, 3, 1)
        bntool.export_onnx(layer, (torch.randn(1, 3, 4, 4),), Path(folder) / "layer.onnx")
        torch.onnx.export(layer, (torch.randn(1, 3, 4, 4),), dynamo=True, optimize=True, verbose=False)


def main() -> None:
    chosen = arguments(__doc__, RESULTS, limit=300).parse_args()
    warm_up()
    results = Results(chosen.results)
    if chosen.again:
        results.forget(out_of_time)
    for name in results.missing(chosen.names or [*MODELS, *kept_in(SWEEP)], chosen.minutes):
        row = examine(name, chosen.limit)
        results.add(row)
        counts = {
            tool: len(found["left"]) if found["status"] == "ok" else found["status"]
            for tool, found in row.get("tools", {}).items()
        }
        print(len(results.rows), name, row["status"], len(row.get("bn", ())), counts, flush=True)
    results.path.with_suffix(".md").write_text(page(results.rows), encoding="utf-8")


if __name__ == "__main__":
    main()
