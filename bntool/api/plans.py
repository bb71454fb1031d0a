"""Plans: read from a file, and replayed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bntool.api.asked import CheckLevel, Model, checking_of, owned
from bntool.core.errors import DamagedPlan, PlanError
from bntool.core.plan import Plan
from bntool.core.schema import Damaged, read
from bntool.pipeline import surgeries
from bntool.results.results import SurgeryResult
from bntool.subjects import subject_of


@torch.inference_mode(False)
def apply(
    model: Model,
    plan: Plan | str | Path,
    example_inputs: Any = None,
    *,
    check: CheckLevel = "fast",
    share: bool = False,
) -> SurgeryResult:
    """Replay a plan on a fresh model of the same architecture, and check what it did there.

    A fold plan rests on signs, paddings and hooks of the model it was made for; so a replayed fold is
    checked like a new one, unless `check="none"`. An insertion must find each of its places again, and with
    `init="identity"` it is held to the bit. On a graph, whose names say nothing of what is computed, the plan
    is made anew with its own options, and must come out the same.

    Args:
        model: of the kind that the plan was made for: an `nn.Module`, an `ExportedProgram`, or a path or
            reference of one, or of an ONNX file. Or weights without their model, in a file: there each
            BatchNorm must go straight into the layer before it, nothing is run, and the result's model holds
            the new tensors by name, each made when it is read.
        plan: the plan, or the path of a plan or side file.
        example_inputs: as for `fold`.
        check: as for `fold` and `insert`.
        share: let the result share the untouched tensors with `model`.

    Returns:
        A result whose model is new; after a fold in eval mode.

    Raises:
        DamagedPlan: the plan is none, or names what the model has not; where in it is told.
        PlanError: the plan was made for another model; the first difference is named.
        CheckFailed: the plan does not hold on this model.
        UsageError: TorchScript, which torch's own pass folds, without a plan.
    """
    if not isinstance(plan, Plan):
        plan = read_plan(plan)
    subject = subject_of(model, example_inputs, bare=True)
    result, _ = surgeries.apply(subject, plan, checking_of(check))
    return owned(result, subject, share)


def read_plan(path: str | Path) -> Plan:
    """A plan from a plan file, or from the side file that `insert` and `fold` write.

    Raises:
        DamagedPlan: the file holds no plan; where in it the fault is.
        PlanError: the file cannot be read, or is of a newer bntool.
    """
    prefix = ""
    try:
        data = read(Path(path))
        if isinstance(data, dict) and isinstance(data.get("plan"), dict):
            data, prefix = data["plan"], "plan."
        return Plan.from_dict(data)
    except OSError as error:
        raise PlanError(
            f"cannot read a plan from {path}: {error.strerror}", next_step="name a plan"
        ) from error
    except Damaged as error:
        raise DamagedPlan.of(error.why, str(path)) from error
    except DamagedPlan as error:
        error.where = f"{path}, {prefix}{error.where}" if error.where else str(path)
        raise
