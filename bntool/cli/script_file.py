"""`bntool fold` on a TorchScript archive: torch's own pass in float64, proved by running both."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, cast

from bntool.errors import NothingToDo, UsageError

if TYPE_CHECKING:
    import torch

    from bntool.cli.session import Session

_NOT_HERE = {
    "export_to": "--export (bntool export does it)",
    "bench": "--bench",
    "dtype": "--dtype",
    "unshare": "--unshare",
    "include": "--include",
    "exclude": "--exclude",
    "repro": "--repro",
}


def with_converted_script(session: Session) -> Session:
    """The session with the script as a module that can be exported, on the same inputs."""
    from bntool.script_folding import converted

    session.observe()
    module = converted(cast("torch.jit.ScriptModule", session.model), session.example)
    loaded = dataclasses.replace(session.loaded, model=module)
    return dataclasses.replace(session, loaded=loaded, _observation=None)


def fold_script_file(session: Session, options: dict[str, Any]) -> int:
    """Fold, check, and only then write a TorchScript archive again."""
    from bntool.cli.writing import Made, chosen_output, write_model
    from bntool.report.counting import parameter_delta
    from bntool.script_folding import fold_script

    voice = session.voice
    given = [flag for name, flag in _NOT_HERE.items() if options.get(name)]
    if given:
        raise UsageError(
            f"{given[0]} is not for TorchScript", next_step="fold the nn.Module that it was made from"
        )
    place = None if options["dry_run"] else chosen_output(session, "fold", options["output"])
    script = cast("torch.jit.ScriptModule", session.model)
    if options["check"] != "none" and session.inputs is None:
        session.observe()
    with voice.progress("folding"):
        result = fold_script(script, None if options["check"] == "none" else session.inputs)
    for name in result.folded:
        voice.say(f"folded      {name}")
    for skip in result.skips:
        voice.say(f"kept        {skip.name} [{skip.reason}] {skip.detail}")
    document = {**result.to_dict(), "parameters": parameter_delta(script, result.model), "output": None}
    total = len(result.folded) + len(result.skips)
    if not result.folded or (options["require_all"] and result.skips):
        what = "none can be folded" if total and not result.folded else f"{len(result.skips)} stay"
        voice.fail(
            NothingToDo(
                f"of {total} BatchNorm layers {what}" if total else "the module calls no BatchNorm",
                where=session.loaded.reference,
                next_step="fold the nn.Module that it was made from: torch's pass for TorchScript knows "
                "only a BatchNorm right behind its convolution",
            ),
            document,
        )
    if result.error is None:
        voice.note("not verified (--check none)")
    else:
        voice.say(f"checked     both run in float64, apart by {result.error:.2g} of the peak")
    if place is not None:
        write_model(session, "fold", Made(result.model, document["parameters"], None), place)
        voice.say(f"wrote       {place.named}")
    output = str(place.named) if place else None
    voice.emit({"status": "ok", **document, "output": output, "dry_run": options["dry_run"]})
    return 0
