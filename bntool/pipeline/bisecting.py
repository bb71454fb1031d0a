"""Fold, run, and keep what does not stand up: one loop for modules, exported programs and ONNX files.

A fold that does not stand up is not done: the BatchNorm at fault is found by bisection, stays with the reason
`not-proved`, and the rest is folded without it.
"""

from __future__ import annotations

import dataclasses
import glob
from collections.abc import Callable, Sequence
from typing import TypeVar

from bntool.core.errors import CheckFailed
from bntool.core.plan import Plan
from bntool.core.reasons import Reason
from bntool.core.sites import Skip

_MOST_UNPROVED = 32
"""Beyond this many BatchNorms at fault the model, not the fold, is what changes from run to run."""

Done = TypeVar("Done")


def settle(
    plan_without: Callable[[Sequence[str], bool], Plan],
    carry_out: Callable[[Plan], Done],
    agrees: Callable[[Plan], bool],
    exclude: Sequence[str] = (),
    merge: bool = False,
    look_again: Callable[[], bool] = lambda: False,
) -> tuple[Plan, Done]:
    """Plan and carry out until all that is left of the plan is proved.

    `plan_without` plans without the BatchNorms that patterns name, and with merged branches or not;
    `carry_out` applies a plan and checks it; `agrees` tells whether a part of a plan stands up. Where merged
    branches do not, there are none, and a note says so. `look_again` is asked first, and tells whether
    `plan_without` now plans more thoroughly. Raises `CheckFailed` where no BatchNorm is at fault.
    """
    unproved: dict[str, Skip] = {}
    notes: tuple[str, ...] = ()
    while True:
        plan = plan_without((*exclude, *(glob.escape(name) for name in unproved)), merge)
        try:
            done = carry_out(plan)
            return _settled(plan, unproved, exclude, notes), done
        except CheckFailed as failure:
            if look_again():
                continue
            if plan.merges:
                merge, notes = False, (f"parallel branches are left as they are: {failure.what}",)
                continue
            name = first_at_fault(plan, agrees)
            if not name or len(unproved) == _MOST_UNPROVED:
                raise
            unproved[name] = Skip(name, Reason.NOT_PROVED, failure.what)


def first_at_fault(plan: Plan, agrees: Callable[[Plan], bool]) -> str:
    """The BatchNorm whose fold first makes the outputs differ, or the model fail; empty where none does.

    None does where all of them stand up, and where not even nothing does: then it is the model or the inputs.
    Bisection over the sites in their order: it takes a fault that shows with the first sites to show with
    more of them, which is so unless two faults cancel out.
    """
    sites = list(plan.fold_sites)

    def stands(count: int) -> bool:
        try:
            return agrees(dataclasses.replace(plan, sites=tuple(sites[:count])))
        except CheckFailed:
            return False

    if not sites or stands(len(sites)) or not stands(0):
        return ""
    low, high = 0, len(sites)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if stands(middle) else (low, middle)
    return sites[high - 1].bn


def _settled(plan: Plan, unproved: dict[str, Skip], exclude: Sequence[str], notes: tuple[str, ...]) -> Plan:
    skips = tuple(unproved.get(skip.name, skip) for skip in plan.skips)
    options = {**plan.options, "exclude": list(exclude)}
    return dataclasses.replace(plan, skips=skips, options=options, notes=(*plan.notes, *notes))
