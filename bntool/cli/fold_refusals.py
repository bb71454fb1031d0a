"""Why a fold is not worth an output: nothing to do, bad statistics, or not all that was asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bntool.cli.opening import Opened
from bntool.core.errors import BntoolError, NothingToDo, StateError
from bntool.core.reasons import Reason

if TYPE_CHECKING:
    from bntool.cli.fold import Asked
    from bntool.core.plan import Plan


def require_no_node(count: int, opened: Opened) -> None:
    if count:
        raise NothingToDo(
            f"--require-all: the ONNX graph keeps {count} BatchNormalization nodes",
            where=opened.subject.name,
            next_step="bntool fold without --require-all says why each stays",
        )


def why_not(plan: Plan, opened: Opened, asked: Asked) -> BntoolError | None:
    """Why a fold by this plan is not worth writing, if it is not."""
    if asked.ask.plan_file:
        return None  # what it says of other weights is not asked of these
    where = opened.subject.name
    bad = [s for s in plan.skips if s.reason is Reason.BAD_STATISTICS]
    if bad:
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        return StateError(
            f"the statistics of BatchNorm {bad[0].name} are bad{more}: {bad[0].detail}",
            where=where,
            next_step=f"train or calibrate the model again, or leave it out with --exclude {bad[0].name}",
        )
    in_graph = opened.subject.only_in_a_graph(asked.fold) if asked.ask.export_to else frozenset()
    kept = [s for s in plan.skips if s.reason not in {Reason.NOT_OBSERVED, *in_graph}]
    if not plan and not any(skip.reason in in_graph for skip in plan.skips):
        return _nothing_to_fold(plan, opened)
    if asked.ask.require_all and kept:
        return NothingToDo(
            f"--require-all: {len(kept)} of {len(plan.sites) + len(kept)} BatchNorm layers stay, "
            f"the first is {kept[0].name} [{kept[0].reason}]",
            where=where,
            next_step=f"bntool explain {kept[0].reason}",
        )
    return None


def _nothing_to_fold(plan: Plan, opened: Opened) -> NothingToDo:
    where, skips = opened.subject.name, plan.skips
    if not skips:
        exports = f"bntool export {where} writes it as ONNX as it is"
        return NothingToDo(
            "the model has no BatchNorm",
            where=where,
            next_step=exports if opened.subject.on_torch else "there is nothing to do for this file",
        )
    if all(skip.reason is Reason.EXCLUDED for skip in skips):
        return NothingToDo(
            f"--include and --exclude leave out all {len(skips)} BatchNorm layers",
            where=where,
            next_step=f"their names are written like {skips[0].name}",
        )
    return NothingToDo(
        f"none of the {len(skips)} BatchNorm layers can be folded",
        where=where,
        next_step=f"bntool explain {skips[0].reason}",
    )
