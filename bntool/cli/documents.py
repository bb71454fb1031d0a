"""With `--json`, stdout holds one document and nothing else, whatever a model's own code prints."""

from __future__ import annotations

import json
from typing import Any

from bntool.cli.streams import say_result
from bntool.core.errors import BntoolError
from bntool.core.text import Lines


def emit(command: str, document: dict[str, Any]) -> None:
    """Print the document of a command, with all keys that it has."""
    from bntool.core.documents import whole

    say_result(Lines(json.dumps(whole(command, document), indent=1)))


def failure(error: BntoolError) -> dict[str, Any]:
    """The part of a document that says what failed."""
    return {"status": error.status, "error": error.to_dict()}
