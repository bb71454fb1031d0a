"""Fold and insert over every torchvision and timm model: `make zoo`.

Each model runs in its own process with a time limit. Results are appended to `docs/coverage.jsonl` as they
come, so that the sweep can be stopped and gone on with; `docs/coverage.md` is written from them.
"""

from __future__ import annotations

import collections
import functools
import glob
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools.sweeps.coverage_page import NARROWS, page
from tools.sweeps.kept_classes import classes
from tools.sweeps.sweeping import arguments, sweep

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "coverage.jsonl"
CLIPS = ("r3d_18", "mc3_18", "r2plus1d_18")
VIDEO = (1, 3, 4, 32, 32)
"""Clips for 3d convolutions, which are slow in float64: any size will do for them."""


def every_model() -> list[str]:
    import timm
    import torchvision

    vision = [f"torchvision:{name}" for name in torchvision.models.list_models()]
    return vision + [f"timm:{name}" for name in timm.list_models()]


GAINS = (1.0, 0.3)
"""Factors of γ. With the first, deep residual networks with gates can become chaotic: they amplify a rounding
of float64 beyond anything that could be compared. Those are tried again with the second."""


def randomise(model: Any, seed: int = 0, gain: float = 1.0, negative: float = 0.1) -> None:
    """Give every BatchNorm statistics and an affine of both signs that are not the initial ones."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def draw(n: int, low: float, high: float) -> Any:
        return torch.rand(n, generator=generator) * (high - low) + low

    with torch.no_grad():
        for module in model.modules():
            variance = getattr(module, "running_var", None)
            if not isinstance(variance, torch.Tensor):
                continue
            n = variance.numel()
            variance.copy_(draw(n, 0.5, 1.5))
            module.running_mean.copy_(draw(n, -0.3, 0.3))
            if isinstance(module.weight, torch.Tensor):
                sign = torch.where(torch.rand(n, generator=generator) < negative, -1.0, 1.0)
                module.weight.copy_(draw(n, 0.5, 1.5) * sign * gain)
                module.bias.copy_(draw(n, -0.3, 0.3))


def examine(name: str) -> dict[str, Any]:
    """Fold one model, insert what it lacks, check both."""
    from bntool.files.references import build

    return judged(lambda: build(name).model, functools.partial(observed, name))


def observed(name: str, model: Any) -> Any:
    """On the smallest images that the model takes: the algebra is the same, and the sweep ends some day."""
    import torch

    from bntool.files.references import recorded_inputs
    from bntool.graph.inputs import Inputs
    from bntool.observe.eager import observe
    from bntool.observe.inference import observe_inferred

    shape = VIDEO if name.split(":")[1] in CLIPS else None
    given = Inputs.of(torch.zeros(shape).normal_()) if shape else recorded_inputs(model)
    return observe(model, given) if given is not None else observe_inferred(model, small=True)


def judged(make: Callable[[], Any], observed: Callable[[Any], Any]) -> dict[str, Any]:
    """What becomes of a model, with the first gain at which that can be judged to float64's own digits."""
    from bntool.core.errors import CheckFailed
    from bntool.core.tolerances import ALGEBRA_LIMIT

    try:
        row = _judged(make, observed, GAINS[0])
    except CheckFailed as error:
        why = str(error)[:200]
    else:
        if row.get("float64", 0.0) <= ALGEBRA_LIMIT or NARROWS in row["note"]:
            return row
        why = f"{row['float64']:.1e} in float64, {row['note']}"
    # a fold that is wrong is wrong with any gain
    return {**_judged(make, observed, GAINS[1]), "gain": GAINS[1], "not judged": why}


def _judged(make: Callable[[], Any], observed: Callable[[Any], Any], gain: float) -> dict[str, Any]:
    """One model, and how long each step took."""
    from bntool.core.options import FoldOptions
    from bntool.core.reasons import Reason
    from bntool.subjects.module import ModuleSubject

    model = make()
    model.eval()  # which may return nothing
    row: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    randomise(model, gain=gain)
    start = time.perf_counter()
    observation = observed(model)
    row["seconds_observe"] = round(time.perf_counter() - start, 3)
    row["ops"] = len(observation.graph.ops)
    start = time.perf_counter()
    subject = ModuleSubject(model, observed=lambda: observation)
    plan = subject.plan_fold(FoldOptions(), thorough=True)
    folded = subject.folded(plan)
    row["seconds_fold"] = round(time.perf_counter() - start, 3)
    row["bn_total"] = len(plan.sites) + len(plan.skips)
    row["folded"] = len(plan.sites)
    row["no_verdict"] = _without_verdict(observation.graph, plan)
    row["kept"] = dict(collections.Counter(skip.reason.value for skip in plan.skips))
    row["classes"] = classes(observation.graph, plan)
    if plan.skips:
        row["folded_positive"] = _with_positive_scales(make, observed)
    if plan.sites:
        row.update(_checked(subject, plan, folded))
    if Reason.WEIGHT_COMPUTED in {skip.reason for skip in plan.skips}:
        row.update(_baked(subject, plan))
    row.update(_inserted(model, observation))
    row["peak_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    return {"status": "ok", **row}


def _without_verdict(graph: Any, plan: Any) -> list[str]:
    """The modules that ran, BatchNorms by their class or their statistics, of which the plan is silent."""
    told = {site.bn for site in plan.sites} | {skip.name for skip in plan.skips}
    return [
        name
        for name, module in graph.modules.items()
        if module.calls and name not in told and not module.children
        if "BatchNorm" in module.kind or f"{name}.running_var" in graph.tensors
        if "InstanceNorm" not in module.kind
    ]


def _checked(subject: Any, plan: Any, folded: Any) -> dict[str, Any]:
    from bntool.subjects.base import Checking

    checks = subject.proof(Checking()).rows(plan, folded)
    own = next((c for c in checks if not c.precision), None)
    exact = next((c for c in checks if c.precision), None)
    row: dict[str, Any] = {}
    if own is not None:
        row["error_over_noise"] = round(own.ratio, 3)
    if exact is not None:
        row["float64"] = float(f"{exact.relative:.2e}")
        row["note"] = exact.detail
    return row


def _with_positive_scales(make: Callable[[], Any], observed: Callable[[Any], Any]) -> int:
    """How many the plan folds where no γ is negative: one such channel keeps a BatchNorm before a ReLU."""
    from bntool.core.options import FoldOptions
    from bntool.subjects.module import ModuleSubject

    model = make()
    model.eval()
    randomise(model, negative=0.0)
    observation = observed(model)
    subject = ModuleSubject(model, observed=lambda: observation)
    return len(subject.plan_fold(FoldOptions(), thorough=True).sites)


def _baked(subject: Any, plan: Any) -> dict[str, Any]:
    """How many more fold where computed weights are stored first."""
    from bntool.core.options import FoldOptions

    baked = subject.baked()
    more = baked.plan_fold(FoldOptions(), thorough=True)
    checked = _checked(baked, more, baked.folded(more))
    return {"baked": len(more.sites) - len(plan.sites), "baked_float64": checked.get("float64")}


def _inserted(model: Any, observation: Any) -> dict[str, Any]:
    """Insert at every site that is left, to the last bit, and fold back to the weights that were."""
    import torch

    from bntool import api
    from bntool.inserting import InsertOptions
    from bntool.subjects.insertion import insert_observed
    from tools.sweeps.fx_pairs import disagreements

    plan, made, check = insert_observed(model, observation, InsertOptions(activations=("any",)))
    wrong = disagreements(model, plan)
    second: dict[str, Any] = {"fx": "cannot trace" if wrong is None else wrong or "agrees"}
    if not plan:
        return {"sites": 0, **second}
    names = [glob.escape(name) for site in plan.insert_sites for name in site.norms]
    back = api.fold(made, observation.inputs, include=names, check="none", merge=False)
    old = {plan.key_map.get(k, k): t for k, t in model.state_dict().items()}
    new = back.model.state_dict()
    inserted = {site.conv for site in plan.insert_sites}
    worst = 0.0
    for conv in inserted:
        key = plan.key_map.get(f"{conv}.weight", f"{conv}.weight")
        if key in new and key in old and new[key].shape == old[key].shape:
            peak = float(old[key].abs().max()) or 1.0
            worst = max(worst, float((new[key] - old[key]).abs().max()) / peak)
    del torch
    return {
        "sites": len(plan.sites),
        "forms": dict(collections.Counter(site.form for site in plan.insert_sites)),
        "insert_exact": check is None or check.agrees,
        "round_trip": worst,
        "sites_again": sites_again(made, observation.inputs),
        **second,
    }


def sites_again(inserted: Any, inputs: Any) -> int:
    """How many sites a second insertion finds: it should change nothing."""
    from bntool.inserting import InsertOptions
    from bntool.observe.eager import observe
    from bntool.subjects.insertion import insert_observed

    again, *_ = insert_observed(inserted, observe(inserted, inputs), InsertOptions(activations=("any",)))
    return len(again.sites)


def folded_of(row: dict[str, Any]) -> str:
    return f"{row.get('folded', '')}/{row.get('bn_total', '')}"


def main() -> None:
    chosen = arguments(__doc__, RESULTS, limit=120).parse_args()
    made = functools.partial(page, title="Coverage", target="zoo", file=chosen.results.name)
    sweep(chosen, every_model(), examine, made, folded_of)


if __name__ == "__main__":
    main()
