"""Write a surgery's outputs: the model, its side file, and the memory of this folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from bntool.files.memory import Record, remember
from bntool.files.sidecar import fill_sidecar, is_sidecar, make_document, output_name, sidecar_path
from bntool.files.targets import Drafts, Target

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram

    from bntool.cli.session import Session
    from bntool.plan import Plan
    from bntool.verdicts import Check


class Result(Protocol):
    """What a command made: a model, the counts before and after, the plan it followed, and its checks."""

    @property
    def model(self) -> nn.Module | ExportedProgram: ...
    @property
    def parameters(self) -> dict[str, dict[str, int]]: ...
    @property
    def plan(self) -> Plan | None: ...
    @property
    def checks(self) -> tuple[Check, ...]: ...


@dataclasses.dataclass(frozen=True)
class Made:
    """A model that was trained: its counts, and the insertion before it where there was one."""

    model: nn.Module
    parameters: dict[str, dict[str, int]]
    plan: Plan | None
    checks: tuple[Check, ...] = ()


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a model and its side file go: as the user named it, and the real paths that were claimed."""

    named: Path
    model: Path
    sidecar: Path
    target: Target


def chosen_output(session: Session, action: Any, output: str | Path | None) -> Place:
    """The output, after making sure that it and its side file may be written."""
    from bntool.files.saving import require_fitting_name

    source = session.loaded.path or session.loaded.reference
    path = Path(output) if output else output_name(source, action)
    require_fitting_name(session.loaded, path)
    return claim_model(path, session.voice.target)


def claim_model(path: Path, target: Target) -> Place:
    """Claim a model's file and its side file."""
    return Place(path, target.claim(path), target.claim_beside(sidecar_path(path), is_sidecar), target)


def draft_model(session: Session, command: str, result: Result, place: Place, drafts: Drafts) -> Record:
    """Drafts of the model, as the kind of file it came from, and of its side file; what to remember."""
    from bntool.files.saving import allow_entries_of, save_draft

    loaded = session.loaded
    digest = save_draft(loaded, result.model, place.model, drafts)
    document = make_document(
        command,
        source=session.source,
        source_hash=loaded.source_hash,
        output=place.named,
        digest=digest,
        arch=loaded.arch,
        weights=loaded.weights,
        key=loaded.key,
        plan=result.plan.to_dict() if result.plan is not None else None,
        parameters=result.parameters,
        checks=[check.to_dict() for check in result.checks],
    )
    if session.earlier_plans:
        document["earlier_plans"] = [plan.to_dict() for plan in session.earlier_plans]
    fill_sidecar(drafts.of(place.sidecar), document)
    needed = loaded.allow if loaded.kind != "reference" else allow_entries_of(drafts.draft_of(place.model))
    return Record(
        command=command,
        output=str(place.named.resolve()),
        output_sha256=digest,
        source=session.source,
        source_sha256=loaded.source_hash,
        arch=loaded.arch,
        weights=str(Path(loaded.weights).resolve()) if loaded.weights else None,
        key=loaded.key,
        allow=tuple(dict.fromkeys((*needed, *loaded.allow))),
        trust_pickle=loaded.trust_pickle,
        input_shapes=session.shapes(),
    )


def write_model(session: Session, command: str, result: Result, place: Place) -> None:
    """Save the model and its side file, both or neither; remember them for this folder."""
    with place.target.drafts() as drafts:
        record = draft_model(session, command, result, place, drafts)
    keep_in_mind(session, record)


def keep_in_mind(session: Session, record: Record | None) -> None:
    """Remember for this folder what was written, once it stands in its place."""
    problem = remember(Path.cwd(), record) if record is not None else None
    if problem:
        session.voice.note(problem)
