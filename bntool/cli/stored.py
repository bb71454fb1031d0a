"""`bntool fold --plan`: the weights in a file, by a plan made before, without the model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bntool.cli.session import Voice
from bntool.core.errors import LoadError, UsageError
from bntool.core.refusals import require_known

if TYPE_CHECKING:
    from bntool.cli.fold import Asked


def fold_stored_file(voice: Voice, asked: Asked) -> int:
    """Fold a file of weights layer by layer, and write it with its side file."""
    from bntool.api import read_plan
    from bntool.cli.writing import claim_model
    from bntool.core.plan_parts import plan_parts
    from bntool.files.safetensors_files import INDEX_SUFFIX
    from bntool.files.sidecar import fill_sidecar, output_name
    from bntool.files.stored import open_stored
    from bntool.results.results import verdicts
    from bntool.results.tables import text_of
    from bntool.surgery.fold_stored import StoredFold

    name = asked.model.model
    of_the_model = (asked.load, asked.fold, asked.ask, asked.export, asked.place, asked.check)
    require_known("weights", *of_the_model, name=name or "")
    if not name or not Path(name).is_file():
        raise LoadError(
            f"no such file: {name or '(no MODEL)'}",
            next_step="bntool fold weights.safetensors --plan other_folded.pt.bntool.json",
        )
    path = Path(name)
    plan = read_plan(str(asked.ask.plan_file))
    stored = open_stored(path)
    suffix = INDEX_SUFFIX if stored.sharded else ".safetensors"
    named = asked.write.output or output_name(path, "fold", suffix=suffix)
    output = Path(named)
    if not output.name.endswith(suffix):
        raise UsageError(f"{output.name}: --plan writes {suffix}", next_step=f"-o NAME{suffix}")
    voice.target.read(*stored.files)
    place = None if asked.write.dry_run else claim_model(output, voice.target)
    with voice.progress(f"folding {path.name}"), voice.target.drafts() as drafts:
        fold = StoredFold(stored, plan)
        if place is not None and place.sidecar is not None:
            digest = fold.write_draft(place.model, drafts)
            fill_sidecar(drafts.of(place.sidecar), _document(plan, path, output, digest))
    voice.say(text_of(plan_parts(plan, verbose=not voice.quiet)))
    voice.note("not verified: that needs the model (bntool verify, or fold with --arch)")
    if place is not None:
        voice.say(f"wrote       {output}")
    voice.emit(
        {
            "status": "ok",
            "kind": "weights",
            **verdicts(plan),
            "output": str(output) if place is not None else None,
            "dry_run": asked.write.dry_run,
            "checks": [],
        }
    )
    return 0


def _document(plan: Any, path: Path, output: Path, digest: str) -> dict[str, Any]:
    from bntool.files.atomic import sha256_of
    from bntool.files.sidecar import Origin, make_document

    return make_document(
        "fold",
        Origin(str(path), sha256_of(path)),
        output,
        digest=digest,
        plan=plan.to_dict(),
    )
