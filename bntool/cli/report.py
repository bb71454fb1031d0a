"""`bntool report`: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from bntool.cli import options as opt
from bntool.cli.completing import files

_FORMATS = ("html", "md", "png", "svg")


@click.command("report", short_help="Draw what the commands found as one HTML file, Markdown or figures.")
@click.argument(
    "files", nargs=-1, required=True, metavar="FILE.json…", callback=opt.none_empty, shell_complete=files
)
@click.option(
    "--format", "kind", type=click.Choice(_FORMATS), help="Default: by the output's name, else html."
)
@click.option("--figure", metavar="NAME", help="With png and svg: which figure; a wrong name lists them.")
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    callback=opt.not_empty,
    shell_complete=files,
    help="Default: report.html; md to stdout.",
)
@click.option("--force", is_flag=True, help="Replace an output that exists.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def command(files: tuple[str, ...], **options: Any) -> int:
    """Draw a report from FILE.json: what a command printed with --json, a .bntool.json beside an output, or
    the compare.json of a comparison. Several files become chapters of one report.

    The HTML file holds everything it needs and loads nothing. Nothing in the documents is run.
    """
    from bntool.cli.documents import emit
    from bntool.cli.streams import say
    from bntool.files.targets import Target
    from bntool.pages.reading import read_document
    from bntool.pages.writing import claim_report, report_text, write_figure, write_page

    output, as_json = options["output"], options["as_json"]
    chosen = options["kind"] or _by_name(output)
    documents = [read_document(name) for name in files]
    if chosen == "md" and output is None and not as_json:
        say(*report_text(documents).removesuffix("\n").split("\n"))
        return 0
    path = Path(output or f"report.{chosen}")
    target = Target(force=options["force"], reads=files)
    claimed = claim_report(path, target)
    with target.drafts() as drafts:
        if chosen in ("png", "svg"):
            write_figure(documents, options["figure"], drafts.of(claimed), chosen)
        else:
            write_page(documents, drafts.of(claimed), chosen)
    if as_json:
        emit({"status": "ok", "output": str(path), "format": chosen})
    else:
        say(f"wrote       {path}")
    return 0


def _by_name(output: str | None) -> str:
    ending = Path(output).suffix.lstrip(".").lower() if output else ""
    return ending if ending in _FORMATS else "html"
