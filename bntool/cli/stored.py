"""`bntool fold --plan`: the weights in a file, by a plan made before, without the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bntool.cli.session import Voice
from bntool.errors import LoadError, UsageError

_NEEDS_MODEL = {
    "export_to": "--export",
    "bench": "--bench",
    "arch": "--arch",
    "weights": "--weights",
    "key": "--key",
    "dtype": "--dtype",
    "unshare": "--unshare",
    "include": "--include",
    "exclude": "--exclude",
    "require_all": "--require-all",
    "repro": "--repro",
}


def fold_stored_file(voice: Voice, options: dict[str, Any]) -> int:
    """Fold a file of weights layer by layer, and write it with its side file."""
    from bntool.api import read_plan
    from bntool.cli.writing import claim_model
    from bntool.files.safetensors_files import INDEX_SUFFIX
    from bntool.files.sidecar import fill_sidecar, output_name
    from bntool.files.stored import open_stored
    from bntool.results import fold_lines
    from bntool.surgery.fold_stored import StoredFold

    given = [flag for name, flag in _NEEDS_MODEL.items() if options.get(name)]
    if given:
        raise UsageError(
            f"--plan folds the weights in a file without the model; {given[0]} needs it",
            next_step=f"drop --plan, or {given[0]}",
        )
    if not options["model"] or not Path(options["model"]).is_file():
        raise LoadError(
            f"no such file: {options['model'] or '(no MODEL)'}",
            next_step="bntool fold weights.safetensors --plan other_folded.pt.bntool.json",
        )
    path = Path(options["model"])
    plan = read_plan(options["plan_file"])
    stored = open_stored(path)
    suffix = INDEX_SUFFIX if stored.sharded else ".safetensors"
    named = options["output"] or output_name(path, "fold", suffix=suffix)
    output = Path(named)
    if not output.name.endswith(suffix):
        raise UsageError(f"{output.name}: --plan writes {suffix}", next_step=f"-o NAME{suffix}")
    voice.target.read(*stored.files)
    place = None if options["dry_run"] else claim_model(output, voice.target)
    with voice.progress(f"folding {path.name}"), voice.target.drafts() as drafts:
        fold = StoredFold(stored, plan)
        if place is not None:
            digest = fold.write_draft(place.model, drafts)
            fill_sidecar(drafts.of(place.sidecar), _document(plan, path, output, digest))
    voice.say(*fold_lines(plan, None, not options["quiet"]))
    voice.note("not verified: that needs the model (bntool verify, or fold with --arch)")
    if not options["dry_run"]:
        voice.say(f"wrote       {output}")
    voice.emit(
        {
            "status": "ok",
            "sites": [{"bn": s.bn, "into": list(s.into), "laws": list(s.laws)} for s in plan.fold_sites],
            "skips": [skip.to_dict("bn") for skip in plan.skips],
            "output": None if options["dry_run"] else str(output),
            "dry_run": options["dry_run"],
            "checks": [],
        }
    )
    return 0


def _document(plan: Any, path: Path, output: Path, digest: str) -> dict[str, Any]:
    from bntool.files.atomic import sha256_of
    from bntool.files.sidecar import make_document

    return make_document(
        "fold",
        source=str(path),
        source_hash=sha256_of(path),
        output=output,
        digest=digest,
        plan=plan.to_dict(),
    )
