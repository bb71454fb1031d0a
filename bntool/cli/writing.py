"""Write a surgery's outputs: the model, its side file, and the memory of this folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from bntool.files.atomic import require_writable
from bntool.files.memory import Record, remember
from bntool.files.sidecar import make_document, output_name, sidecar_path, write_sidecar

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


def chosen_output(session: Session, action: Any, output: str | None, force: bool) -> Path:
    """The output path, after making sure that it and its side file may be written."""
    from bntool.files.saving import require_fitting_name

    source = session.loaded.path or session.loaded.reference
    path = Path(output) if output else output_name(source, action)
    require_fitting_name(session.loaded, path)
    require_writable(path, force=force, forbid=session.loaded.files)
    require_writable(sidecar_path(path), force=force)
    return path


def write_model(session: Session, command: str, result: Result, path: Path, force: bool) -> None:
    """Save the model as the kind of file it came from, and the side file; remember both for this folder."""
    from bntool.files.saving import allow_entries_of, save_model

    loaded = session.loaded
    digest = save_model(loaded, result.model, path, force=force)
    document = make_document(
        command,
        source=session.source,
        source_hash=loaded.source_hash,
        output=path,
        arch=loaded.arch,
        weights=loaded.weights,
        key=loaded.key,
        plan=result.plan.to_dict() if result.plan is not None else None,
        parameters=result.parameters,
        checks=[check.to_dict() for check in result.checks],
    )
    if session.earlier_plans:
        document["earlier_plans"] = [plan.to_dict() for plan in session.earlier_plans]
    write_sidecar(path, document, force=force)
    needed = loaded.allow if loaded.kind != "reference" else allow_entries_of(path)
    record = Record(
        command=command,
        output=str(path.resolve()),
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
    problem = remember(Path.cwd(), record)
    if problem:
        session.voice.note(problem)
