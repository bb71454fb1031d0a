"""`bntool inspect`: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from bntool.cli import options as opt
from bntool.cli.completing import files
from bntool.cli.session import Voice


@click.command("inspect", short_help="What a file is and holds, without loading it.")
@click.argument("file", metavar="FILE", callback=opt.not_empty, shell_complete=files)
@opt.max_size_option()
@opt.common_options()
def command(**options: Any) -> int:
    """Say what a file is, which classes it needs, its tensors, and anything suspicious.

    Nothing in the file is run, and no weights are read. Exit 3 for a file that is damaged, hostile or of a
    kind that bntool does not load.
    """
    from bntool.files.inspecting import inspect_file
    from bntool.files.limits import Limit
    from bntool.report.inspection import inspection_text

    voice = Voice.of(options)
    inspection = inspect_file(Path(options["file"]), Limit(options["max_size"]))
    voice.say(inspection_text(inspection, quiet=options["quiet"], verbose=options["verbose"]))
    if inspection.error is not None:
        voice.fail(inspection.error, inspection.to_dict())
    voice.emit(inspection.to_dict())
    return 0
