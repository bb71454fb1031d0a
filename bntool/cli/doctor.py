"""`bntool doctor`: parse, call, print."""

from __future__ import annotations

import click

from bntool.cli.documents import emit
from bntool.cli.options import some, takes
from bntool.cli.streams import say
from bntool.core.command_options import SpeechOptions


@click.command("doctor", short_help="What this machine can run, found out by trying.")
@takes(some(SpeechOptions, "as_json", "debug"))
def command(speech: SpeechOptions) -> int:
    """Look at Python, torch, CUDA and ONNX Runtime, and really run a small convolution on each."""
    from bntool.runtime.doctor import diagnose

    found = diagnose()
    if speech.as_json:
        emit("doctor", {"status": "ok" if found else "failed", **found.to_dict()})
    else:
        say(str(found))
    return 0 if found else 5
