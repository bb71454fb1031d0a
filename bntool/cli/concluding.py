"""How a command ends that has done its work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bntool.cli.session import Voice
from bntool.core.errors import Undecided
from bntool.core.verdicts import Check, nothing_shown


def conclude(
    voice: Voice, document: dict[str, Any], checks: Sequence[Check], *, model: object, new: Path | None = None
) -> int:
    """Give out the document; raises `Undecided` where the checks that ran have shown nothing.

    Args:
        voice: that of the command.
        document: what the command found out.
        checks: those that ran.
        model: what they are about, as the user names it; empty for a file that is compared with itself.
        new: the file that was made of it; None where none was written.
    """
    found = nothing_shown(checks)
    if found is not None:
        voice.fail(_undecided(found, model, new), document)
    voice.emit(document)
    return 0


def _undecided(found: Check, model: object, new: Path | None) -> Undecided:
    what = f"nothing was shown: on these inputs, {found.undecided}"
    command = " ".join(filter(None, ("bntool verify", str(model), str(new or "NEW"), "--inputs FILE")))
    answer = "with inputs that the model answers to; one whose head is zero answers once it is trained"
    next_step = f"{command}, {answer}"
    return Undecided(what, where=str(model), next_step=next_step)
