"""`bntool inspect`: parse, call, print."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from bntool.cli.options import some, takes
from bntool.cli.session import Voice
from bntool.core.command_options import LoadOptions, SpeechOptions
from bntool.core.option import Options, option


@dataclasses.dataclass(frozen=True)
class InspectOptions(Options):
    """What is looked at."""

    file: str = option("", "", argument=True, required=True, names="file")


@click.command("inspect", short_help="What a file is and holds, without loading it.")
@takes(InspectOptions, some(LoadOptions, "max_size"), SpeechOptions)
def command(voice: Voice, inspect: InspectOptions, load: LoadOptions) -> int:
    """Say what a file is, which classes it needs, its tensors, and anything suspicious.

    Nothing in the file is run, and no weights are read. Exit 3 for a file that is damaged, hostile or of a
    kind that bntool does not load.
    """
    from bntool.core.limits import Limit
    from bntool.files.inspecting import inspect_file
    from bntool.results.inspection import inspection_text

    inspection = inspect_file(Path(inspect.file), Limit(load.max_size))
    voice.say(inspection_text(inspection, quiet=voice.quiet, verbose=voice.verbose))
    if inspection.error is not None:
        voice.fail(inspection.error, inspection.to_dict())
    voice.emit(inspection.to_dict())
    return 0
