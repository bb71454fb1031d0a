"""What the proof of a fold finds: networks made at random, a share of them folded wrongly on purpose.

    make faults                                 # this proof
    python -m tools.sweeps.random_faults --out a.json
    # then --against a.json: beside the proof of another version

A fault is one number of a folded weight that is off, or one edit of the plan that is left out. Of each
network it is told whether the fault can be seen at all: how far the outputs move, in float64, on inputs of
several sizes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bntool.core.errors import BntoolError, ObserveError
from bntool.core.options import FoldOptions
from bntool.core.plan import Plan
from bntool.subjects.base import Checking
from bntool.subjects.module import ModuleSubject
from tools.sweeps.random_nets import SIDE, RandomNet
from tools.sweeps.random_trials import has_norms, outputs_of

SHARES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
"""By how much of the largest number of its weight a number is off."""
SEEN = 1e-4
"""A fault that moves an output by this share of its peak, in float64, is one that a proof must find."""


def tried(seed: int, share: float) -> dict[str, Any] | None:
    """One network: whether it is broken, how far that moves its outputs, and what the proof says."""
    draw = random.Random(seed)  # noqa: S311 - networks, not secrets
    net = RandomNet(seed)
    if not has_norms(net):
        return None
    torch.manual_seed(seed)
    example = torch.randn(2, net.channels, SIDE, SIDE)
    subject = ModuleSubject(net.float(), (example,))
    try:
        plan = subject.plan_fold(FoldOptions(), thorough=False)
    except ObserveError:  # it has float64 constants
        subject = ModuleSubject(net.double(), (example.double(),))
        plan = subject.plan_fold(FoldOptions(), thorough=False)
    if not plan:
        return None
    broken = draw.random() < share
    fault, after = _broken(subject, plan, draw) if broken else ("", subject.folded(plan))
    found, told = _judged(subject, plan if not isinstance(after, tuple) else after[0], after)
    moved = _moved(net, after[1].model if isinstance(after, tuple) else after.model)
    return {"seed": seed, "fault": fault, "moved": moved, "found": found, "told": told}


def _broken(subject: ModuleSubject, plan: Plan, draw: random.Random) -> tuple[str, Any]:
    """The fold with a fault: another candidate, or a plan that lacks an edit with the candidate it makes."""
    edits = [(i, j) for i, site in enumerate(plan.fold_sites) for j, e in enumerate(site.edits) if e.map]
    if edits and draw.random() < 0.5:
        i, j = draw.choice(edits)
        sites = list(plan.fold_sites)
        left = tuple(edit for k, edit in enumerate(sites[i].edits) if k != j)
        sites[i] = dataclasses.replace(sites[i], edits=left)
        wrong = dataclasses.replace(plan, sites=tuple(sites))
        return "an edit left out", (wrong, subject.folded(wrong))
    after = subject.folded(plan)
    names = [name for name, tensor in after.model.named_parameters() if tensor.numel()]
    if not names:
        return "", after
    name, share = draw.choice(names), draw.choice(SHARES)
    with torch.no_grad():
        weight = after.model.get_parameter(name)
        other = nn.Parameter(weight.clone())
        other.view(-1)[draw.randrange(weight.numel())] += share * float(weight.abs().max() or 1.0)
        for module in after.model.modules():
            for key, held in module._parameters.items():
                if held is weight:
                    module._parameters[key] = other
    return f"a number off by {share:g}", after


def _judged(subject: ModuleSubject, plan: Plan, after: Any) -> tuple[bool, str]:
    """Whether the proof finds anything wrong, and where."""
    candidate = after[1] if isinstance(after, tuple) else after
    try:
        rows = subject.proof(Checking()).rows(plan, candidate)
    except BntoolError as error:
        return True, type(error).__name__
    failed = [f"{row.precision or 'own'}" for row in rows if not row.agrees]
    return bool(failed), ", ".join(failed)


def _moved(net: nn.Module, candidate: nn.Module) -> float:
    """The largest difference of an output, relative to its peak, in float64 on inputs of several sizes."""
    worst = 0.0
    before, after = net.double(), candidate.double()
    for batch, side in ((2, SIDE), (3, SIDE), (1, SIDE + 8), (2, SIDE + 33)):
        x = torch.randn(batch, net.channels, side, side, dtype=torch.float64)  # type: ignore[call-overload]
        try:
            pairs = list(zip(outputs_of(before, x), outputs_of(after, x), strict=True))
        except (RuntimeError, ValueError, IndexError):
            continue
        worst = max([worst, *(_apart(a, b) for a, b in pairs)])
    return worst


def _apart(old: Tensor, new: Tensor) -> float:
    if not torch.equal(torch.isfinite(old), torch.isfinite(new)):
        return float("inf")
    numbers = torch.isfinite(old)
    if not bool(numbers.any()):
        return 0.0
    return float((old - new)[numbers].abs().max()) / max(float(old[numbers].abs().max()), 1e-12)


def told_of(rows: list[dict[str, Any]]) -> list[str]:
    """The figures, one a line."""
    broken = [row for row in rows if row["fault"]]
    whole = [row for row in rows if not row["fault"]]
    seen = [row for row in broken if row["moved"] > SEEN]
    other = [row for row in broken if row["moved"] <= SEEN]
    kinds = Counter(row["fault"] for row in broken if row["found"])
    return [
        f"{len(rows)} networks folded, {len(broken)} of them with a fault",
        f"faults that move an output by more than {SEEN:g}: {len(seen)}, found {_found(seen)}",
        f"other faults: {len(other)}, found {_found(other)}",
        f"without a fault: {len(whole)}, refused {_found(whole)}",
        *(f"  found, {kind}: {count}" for kind, count in sorted(kinds.items())),
        *(f"  NOT FOUND: {_fault(row)}" for row in seen if not row["found"]),
    ]


def _found(rows: list[dict[str, Any]]) -> int:
    return sum(row["found"] for row in rows)


def _fault(row: dict[str, Any]) -> str:
    return f"seed {row['seed']}, {row['fault'] or 'no fault'}, moves {row['moved']:.2g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--nets", type=int, default=600)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--share", type=float, default=0.5, help="of the networks, that get a fault")
    parser.add_argument("--out", type=Path, help="write what was found, network by network")
    parser.add_argument("--against", type=Path, help="what another version found")
    chosen = parser.parse_args()
    rows = [
        row
        for seed in range(chosen.first, chosen.first + chosen.nets)
        if (row := tried(seed, chosen.share)) is not None
    ]
    print(*told_of(rows), sep="\n")
    if chosen.out:
        chosen.out.write_text(json.dumps(rows), encoding="utf-8")
    if chosen.against:
        before = {row["seed"]: row for row in json.loads(chosen.against.read_text(encoding="utf-8"))}
        for row in rows:
            old = before.get(row["seed"])
            if old is not None and old["found"] != row["found"]:
                change = "now found" if row["found"] else "no longer found"
                print(f"{change}: {_fault(row)} ({old['told'] or row['told']})")


if __name__ == "__main__":
    main()
