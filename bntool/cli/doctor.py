"""`bntool doctor`: parse, call, print."""

from __future__ import annotations

import click

from bntool.cli.documents import emit
from bntool.cli.streams import say


@click.command("doctor", short_help="What this machine can run, found out by trying.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def command(as_json: bool, debug: bool) -> int:  # noqa: ARG001 - read by main
    """Look at Python, torch, CUDA and ONNX Runtime, and really run a small convolution on each."""
    from bntool.doctor import diagnose

    found = diagnose()
    if as_json:
        emit({"status": "ok" if found else "failed", **found.to_dict()})
    else:
        say(str(found))
    return 0 if found else 5
