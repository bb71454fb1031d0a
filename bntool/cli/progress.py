"""A line of progress on a terminal, above which whatever is printed meanwhile stays visible and harmless."""

from __future__ import annotations

import sys
from typing import TextIO, cast

from rich.console import Console
from rich.progress import Progress, ProgressColumn, Task
from rich.text import Text

from bntool.cli.streams import Stream, styled
from bntool.core.text import visible


class _Bar(Progress):
    def start(self) -> None:
        super().start()
        # rich has put streams in place that obey the escapes and the markup written to them
        sys.stdout, sys.stderr = (cast(TextIO, Stream(stream)) for stream in (sys.stdout, sys.stderr))


def bar_of(*columns: ProgressColumn) -> Progress:
    """A line on standard error with these columns, which leaves nothing behind."""
    console = Console(file=styled(sys.stderr), markup=False, highlight=False, emoji=False)
    # Results that go to a file are no concern of the terminal's.
    return _Bar(*columns, console=console, transient=True, redirect_stdout=sys.stdout.isatty())


class Description(ProgressColumn):
    """The column that says what is being done, names and all."""

    def render(self, task: Task) -> Text:
        return Text(visible(task.description))
