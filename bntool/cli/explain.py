"""`bntool explain`: parse, call, print."""

from __future__ import annotations

import dataclasses

import click

from bntool.cli.documents import emit
from bntool.cli.options import some, takes
from bntool.cli.streams import say
from bntool.core.command_options import SpeechOptions
from bntool.core.option import Options, option
from bntool.core.reasons import Reason


@dataclasses.dataclass(frozen=True)
class ExplainOptions(Options):
    """What is explained; without a code, all of them are listed."""

    code: str | None = option(None, "", argument=True, names="reason")


@click.command("explain", short_help="What a reason code means, and what to do.")
@takes(ExplainOptions, some(SpeechOptions, "as_json", "debug"))
def command(explain: ExplainOptions, speech: SpeechOptions) -> int:
    """Explain a reason CODE; without one, list them all."""
    from bntool.core.explanations import explain as explanation_of

    codes = [reason.value for reason in Reason] if explain.code is None else [explain.code]
    found = {name: explanation_of(name) for name in codes}
    if speech.as_json:
        emit("explain", {"status": "ok", "reasons": {name: e.to_dict() for name, e in found.items()}})
    elif explain.code is not None:
        say(str(found[explain.code]))
    else:
        width = max(len(name) for name in found)
        for name, explanation in found.items():
            say(f"{name:{width}}  {explanation.title}")
    return 0
