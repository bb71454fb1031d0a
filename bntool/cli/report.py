"""`bntool report`: parse, call, print."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import click

from bntool.cli.options import some, takes
from bntool.cli.session import Voice
from bntool.core.command_options import SpeechOptions, WriteOptions
from bntool.core.option import Options, option

_FORMATS = ("html", "md", "png", "svg")


@dataclasses.dataclass(frozen=True)
class PageOptions(Options):
    """What is drawn, and as what."""

    files: tuple[str, ...] = option((), "", metavar="FILE.json…", argument=True, required=True, names="file")
    kind: Literal["html", "md", "png", "svg"] | None = option(
        None, "Default: by the output's name, else html.", "--format"
    )
    figure: str | None = option(
        None, "With png and svg: which figure; a wrong name lists them.", metavar="NAME"
    )


@click.command("report", short_help="Draw what the commands found as one HTML file, Markdown or figures.")
@takes(
    PageOptions,
    some(WriteOptions, "output", "force"),
    some(SpeechOptions, "as_json", "debug"),
    output="Default: report.html; md to stdout.",
    force="Replace an output that exists.",
)
def command(voice: Voice, page: PageOptions, write: WriteOptions, speech: SpeechOptions) -> int:
    """Draw a report from FILE.json: what a command printed with --json, a .bntool.json beside an output, or
    the compare.json of a comparison. Several files become chapters of one report.

    The HTML file holds everything it needs and loads nothing. Nothing in the documents is run.
    """
    from bntool.cli.documents import emit
    from bntool.report.reading import read_document
    from bntool.report.writing import claim_report, report_text, write_figure, write_page

    chosen = page.kind or _by_name(write.output)
    documents = [read_document(name) for name in page.files]
    if chosen == "md" and write.output is None and not speech.as_json:
        voice.say(*report_text(documents).removesuffix("\n").split("\n"))
        return 0
    path = Path(write.output or f"report.{chosen}")
    claimed = claim_report(path, voice.target, chosen)
    with voice.target.drafts() as drafts:
        if chosen in ("png", "svg"):
            write_figure(documents, page.figure, drafts.of(claimed), chosen)
        else:
            write_page(documents, drafts.of(claimed), chosen)
    if speech.as_json:
        emit("report", {"status": "ok", "output": str(path), "format": chosen})
    voice.say(f"wrote       {path}")
    return 0


def _by_name(output: str | None) -> str:
    ending = Path(output).suffix.lstrip(".").lower() if output else ""
    return ending if ending in _FORMATS else "html"
