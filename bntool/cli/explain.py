"""`bntool explain`: parse, call, print."""

from __future__ import annotations

import click

from bntool.cli.completing import reason_codes
from bntool.cli.documents import emit
from bntool.cli.streams import say
from bntool.reasons import Reason


@click.command("explain", short_help="What a reason code means, and what to do.")
@click.argument("code", required=False, shell_complete=reason_codes)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def command(code: str | None, as_json: bool, debug: bool) -> int:  # noqa: ARG001 - read by main
    """Explain a reason CODE; without one, list them all."""
    from bntool.explanations import explain

    codes = [reason.value for reason in Reason] if code is None else [code]
    found = {name: explain(name) for name in codes}
    if as_json:
        emit({"status": "ok", "reasons": {name: e.to_dict() for name, e in found.items()}})
    elif code is not None:
        say(str(found[code]))
    else:
        width = max(len(name) for name in found)
        for name, explanation in found.items():
            say(f"{name:{width}}  {explanation.title}")
    return 0
