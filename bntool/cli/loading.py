"""Load a model with what the user granted for that file, and with the surgery that its side file tells of."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from bntool.cli.session import Voice
    from bntool.core.command_options import LoadOptions
    from bntool.core.plan import Plan
    from bntool.files.loaded import Loaded
    from bntool.files.memory import Record


def load_granted(
    name: str, record: Record | None, asked: LoadOptions, voice: Voice, *, stand_ins: bool = False
) -> tuple[Loaded, list[Plan]]:
    """Load a model with what was granted for it, made to fit the surgery that its side file tells of.

    `record` holds what was granted before, `asked` what is granted now. With `stand_ins`, also a model whose
    classes are not here, to be looked at and not run.
    """
    from bntool.files.loading import load
    from bntool.files.memory import Grant
    from bntool.files.references import is_reference
    from bntool.files.sidecar import untrained

    is_file = Path(name).exists() or not is_reference(name)
    grant = record.granted(name) if record is not None and is_file else Grant()
    told = side_file_of(name) if is_file else None
    arch = asked.arch
    if told and arch is None:
        arch = _architecture_in(told, name)
        if arch:
            voice.note(f"--arch {arch}, as its side file says")
    plans, prepare = replay_of(name, told) if told and arch else ([], None)
    with voice.progress(f"loading {name}") as tell:
        granted = dataclasses.replace(
            asked,
            arch=arch,
            allow=(*asked.allow, *grant.allow),
            trust_pickle=asked.trust_pickle or grant.trust_pickle,
        )
        loaded = load(name, granted, prepare=prepare, stand_ins=stand_ins, tell=tell)
    note = untrained(told) if told and asked.weights is None else ""
    if note:
        loaded = dataclasses.replace(loaded, notes=(*loaded.notes, note))
    return loaded, plans


def side_file_of(path: str) -> dict[str, Any] | None:
    """What the side file of a file tells; None where there is none, or it is that of another file."""
    from bntool.files.sidecar import describes, read_sidecar

    told = read_sidecar(path) if Path(path).is_file() else None
    return told if told and describes(told, path) else None


def recorded_architecture(path: str) -> str | None:
    """The architecture that the side file names: only a registry's, since a stranger may have written it."""
    told = side_file_of(path)
    return _architecture_in(told, path) if told else None


def _architecture_in(told: dict[str, Any], path: str) -> str | None:
    from bntool.files.detect import Kind, detect

    reload = told.get("reload")
    arch = reload.get("arch") if isinstance(reload, dict) else None
    if not isinstance(arch, str) or not arch.startswith(("torchvision:", "timm:")):
        return None
    weights = (Kind.TORCH_ZIP, Kind.TORCH_LEGACY, Kind.SAFETENSORS, Kind.SAFETENSORS_INDEX)
    return arch if detect(path).kind in weights else None


def replay_of(path: str, told: dict[str, Any]) -> tuple[list[Plan], Any]:
    """The plans that made a file of weights, so that its architecture can be made to fit it.

    Raises `LoadError`, with the place in the side file, for a plan that is none or that does not fit the
    architecture: then when it is replayed.
    """
    from bntool.core.errors import DamagedPlan, LoadError, PlanError
    from bntool.core.plan import Plan
    from bntool.files.sidecar import damaged, sidecar_path

    last = told.get("plan")
    raw = {f"earlier_plans[{i}]": plan for i, plan in enumerate(told.get("earlier_plans", ()))}
    raw |= {"plan": last} if last else {}
    plans: list[Plan] = []

    def refused(error: PlanError, place: str) -> LoadError:
        if isinstance(error, DamagedPlan):
            return damaged(sidecar_path(path), error.why, f"{place}.{error.where}".rstrip("."))
        return damaged(sidecar_path(path), error.what, place)

    for place, data in raw.items():
        try:
            plans.append(Plan.from_dict(data))
        except DamagedPlan as error:
            raise refused(error, place) from error
        except PlanError as error:  # of a newer bntool
            where = f"{sidecar_path(path)}, {place}"
            raise LoadError(error.what, where=where, next_step=error.next_step) from error

    def prepare(model: nn.Module) -> nn.Module:
        from bntool.api import apply

        for place, plan in zip(raw, plans, strict=True):
            try:
                model = apply(model, plan, check="none", share=True).model
            except PlanError as error:
                raise refused(error, place) from error
        return model

    return plans, prepare
