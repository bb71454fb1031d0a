"""Say where candidate and reference part, and with `--repro` write what shows it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bntool.cli.session import Voice
from bntool.core.errors import CheckFailed

if TYPE_CHECKING:
    from bntool.verifying.blaming import Found


def require_place(repro: str | None) -> None:
    """Before any work: a repro goes into a folder of its own. Raises `UsageError`."""
    if repro:
        from bntool.verifying.repro import require_no_folder

        require_no_folder(Path(repro))


def report(voice: Voice, find: Callable[[], Found | None], repro: str | None) -> dict[str, Any]:
    """Find and print the first layer or node that differs; return the document's part about it."""
    from bntool.verifying.blaming import told

    with voice.progress("looking for the place where they part"):
        found = told(find)
    if isinstance(found, str):
        voice.note(f"which layer or node differs first cannot be told: {found}")
        return {"blame": None, "repro": None}
    voice.say(str(found.blame))
    return {"blame": found.blame.to_dict(), "repro": _written(voice, found, repro)}


def _written(voice: Voice, found: Found, repro: str | None) -> str | None:
    if not repro:
        return None
    from bntool.verifying.repro import write_repro

    try:
        script = write_repro(found, Path(repro))
    except CheckFailed as refusal:
        voice.note(refusal.what)
        return None
    voice.say(f"repro       python {script}")
    return str(script)
