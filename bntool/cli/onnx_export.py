"""`bntool export` of an ONNX file: into another opset."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bntool.core.errors import BntoolError, CheckFailed

if TYPE_CHECKING:
    from bntool.cli.opening import Opened
    from bntool.cli.session import Voice
    from bntool.core.verdicts import Check


def export_file(voice: Voice, opened: Opened, asked: Any) -> int:
    """Convert the file to --opset, and verify the result against it where ONNX Runtime runs the original."""
    from bntool.cli.devices import require_places
    from bntool.core.verdicts import first_failed
    from bntool.files.onnx_files import put_onnx
    from bntool.results.checks import checks_text

    source, opset = Path(opened.source), asked.export.opset
    named = Path(asked.write.output or source.with_name(f"{source.stem}_opset{opset}.onnx"))
    place = voice.target.claim(named)
    devices = require_places(asked.place, onnx_too=True)
    rows: list[Check] = []
    with voice.target.drafts() as drafts:
        draft = drafts.folder_for(place) / place.name
        made = opened.subject.export(draft, asked.export, {})
        if asked.check.check == "none":
            voice.note("not verified (--check none)")
        else:
            rows = _verified(voice, opened, draft, asked, devices.onnx)
        failed = first_failed(rows)
        if failed is not None:
            voice.say(checks_text(rows))
            raise CheckFailed(
                f"in opset {opset} it does not compute the same: {failed.figures}",
                where=f"output {failed.worst[0]} on {failed.provider} ({failed.stage})",
                next_step="try another --opset; --atol and --rtol set another limit",
            )
        put_onnx(draft, made.data_path, place, drafts)
    if rows:
        voice.say(checks_text(rows))
    voice.say(f"wrote       {named}")
    made = dataclasses.replace(made, path=named, data_path=drafts.part_of(place))
    checks = [row.to_dict() for row in rows]
    voice.emit(
        {
            "status": "ok",
            "kind": opened.kind,
            "onnx": str(named),
            "export": made.to_dict(),
            "checks": checks,
        }
    )
    return 0


def _verified(voice: Voice, opened: Opened, draft: Path, asked: Any, device: str) -> list[Check]:
    """The rows; none, with a note, where ONNX Runtime does not run the original."""
    from bntool.verifying.conditions import Conditions
    from bntool.verifying.onnx_verifying import check_files, seeded_file_inputs

    path = opened.subject.model
    batches = (1, 2, 3) if asked.check.check == "full" else (1,)
    try:
        inputs = list(opened.inputs) or seeded_file_inputs(
            path, batches, asked.load.seed, opened.subject.shapes
        )
    except BntoolError as error:
        voice.note(f"not verified: {error.what}")
        return []
    return check_files(path, draft, inputs, Conditions(device, asked.check.tolerance))
