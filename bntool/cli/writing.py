"""Write a surgery's outputs: the model, its side file, and the memory of this folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from bntool.core.errors import UsageError
from bntool.core.refusals import KINDS
from bntool.files.atomic import sha256_of
from bntool.files.drafting import Drafts
from bntool.files.memory import Record, remember
from bntool.files.sidecar import Origin, fill_sidecar, is_sidecar, make_document, output_name, sidecar_path
from bntool.files.targets import Target

if TYPE_CHECKING:
    from torch import nn

    from bntool.cli.opening import Opened
    from bntool.cli.session import Session, Voice
    from bntool.core.command_options import WriteOptions
    from bntool.core.options import ExportOptions
    from bntool.core.plan import Plan
    from bntool.core.verdicts import Check

_ENDINGS = frozenset({".pt", ".pth", ".pt2", ".safetensors", ".json", ".onnx"})


class Result(Protocol):
    """What a command made: a model, the counts before and after, the plan it followed, and its checks."""

    @property
    def model(self) -> Any: ...
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
    """Where a model and its side file go: as the user named it, and the real paths that were claimed.

    An ONNX file has no side file.
    """

    named: Path
    model: Path
    sidecar: Path | None
    target: Target


@dataclasses.dataclass(frozen=True)
class OnnxPlace:
    """Where an ONNX file goes: as the user named it, and really; whether one that fails its check is kept."""

    named: Path
    path: Path
    keep_unverified: bool = False


@dataclasses.dataclass(frozen=True)
class Places:
    """Where the outputs of a command go; None for what it does not write."""

    kind: str
    model: Place | None = None
    onnx: OnnxPlace | None = None

    def to_dict(self) -> dict[str, str | None]:
        """The part of a document that says what was written."""
        output = str(self.model.named) if self.model else None
        onnx = str(self.onnx.named) if self.onnx else output if self.kind == "onnx" else None
        return {"output": output, "onnx": onnx}


def chosen_places(
    voice: Voice, opened: Opened, write: WriteOptions, export: ExportOptions | None = None
) -> Places:
    """The outputs of a fold, after making sure that all of them may be written; none for a dry run."""
    if write.dry_run:
        return Places(opened.kind)
    place = chosen_output(voice, opened, "fold", write.output)
    if export is None:
        return Places(opened.kind, place)
    path = output_name(place.named, "export")
    return Places(opened.kind, place, OnnxPlace(path, voice.target.claim(path), export.keep_unverified))


def chosen_output(voice: Voice, opened: Opened, action: Any, output: str | Path | None) -> Place:
    """The output, after making sure that it and its side file may be written."""
    if opened.session is None:
        suffix = opened.subject.suffix
        path = Path(output) if output else output_name(opened.source, action, suffix=suffix)
        if path.suffix in _ENDINGS and not path.name.endswith(suffix):
            raise UsageError(
                f"{path.name}: the output of {KINDS[opened.kind]} is saved as {suffix}",
                next_step=f"name it {path.name.partition('.')[0]}{suffix}",
            )
        if not opened.subject.runs:
            return claim_model(path, voice.target)
        return Place(path, voice.target.claim(path), None, voice.target)
    path = Path(output) if output else output_name(opened.source, action)
    from bntool.files.saving import require_fitting_name

    require_fitting_name(opened.session.loaded, path)
    return claim_model(path, voice.target)


def claim_model(path: Path, target: Target) -> Place:
    """Claim a model's file and its side file."""
    return Place(path, target.claim(path), target.claim_beside(sidecar_path(path), is_sidecar), target)


def draft_result(
    opened: Opened, command: str, done: tuple[Result, Any], place: Place | None, drafts: Drafts
) -> Record | None:
    """Drafts of a new model of any kind, and of its side file; what to remember."""
    if place is None:
        return None
    result, after = done
    if opened.session is not None:
        return draft_model(opened.session, command, result, place, drafts)
    digest = after.draft(place.model, drafts)
    if place.sidecar is not None:
        source = Path(opened.source)
        document = make_document(
            command,
            Origin(str(source), sha256_of(source)),
            place.named,
            digest=digest,
            plan=result.plan.to_dict() if result.plan is not None else None,
            parameters=result.parameters,
        )
        fill_sidecar(drafts.of(place.sidecar), document)
    return None


def draft_model(session: Session, command: str, result: Result, place: Place, drafts: Drafts) -> Record:
    """Drafts of the model, as the kind of file it came from, and of its side file; what to remember."""
    from bntool.files.saving import allow_entries_of, save_draft

    loaded = session.loaded
    saved = save_draft(loaded, result.model, place.model, drafts)
    digest, arch = saved.digest, loaded.arch
    if saved.as_weights:
        arch = arch or (loaded.reference if loaded.kind == "reference" else None)
        session.voice.note(
            f"{place.named.name} holds the state_dict and loads with --arch {arch or 'REF'}, since the model "
            f"cannot be pickled: {saved.as_weights}"
        )
    document = make_document(
        command,
        Origin(
            session.source,
            loaded.source_hash,
            arch,
            None if saved.as_weights else loaded.weights,
            loaded.key,
            loaded.notes,
        ),
        place.named,
        digest=digest,
        plan=result.plan.to_dict() if result.plan is not None and loaded.kind != "script" else None,
        parameters=result.parameters,
        checks=[check.to_dict() for check in result.checks],
    )
    if session.earlier_plans:
        document["earlier_plans"] = [plan.to_dict() for plan in session.earlier_plans]
    assert place.sidecar is not None
    fill_sidecar(drafts.of(place.sidecar), document)
    needed = loaded.allow if loaded.kind != "reference" else allow_entries_of(drafts.draft_of(place.model))
    return Record(
        command=command,
        output=str(place.named.resolve()),
        output_sha256=digest,
        source=session.source,
        source_sha256=loaded.source_hash,
        arch=arch,
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
    keep_in_mind(session.voice, record)


def keep_in_mind(voice: Voice, record: Record | None) -> None:
    """Remember for this folder what was written, once it stands in its place."""
    problem = remember(Path.cwd(), record) if record is not None else None
    if problem:
        voice.note(problem)
