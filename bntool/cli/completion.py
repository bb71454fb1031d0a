"""`bntool completion`: the script that makes a shell complete bntool's commands, options and files."""

from __future__ import annotations

import dataclasses
from typing import Literal

import click
from click.shell_completion import get_completion_class

from bntool.cli.completing import VARIABLE
from bntool.cli.options import some, takes
from bntool.cli.streams import say
from bntool.core.command_options import SpeechOptions
from bntool.core.option import Options, option


@dataclasses.dataclass(frozen=True)
class CompletionOptions(Options):
    """Whose script is printed."""

    shell: Literal["bash", "zsh", "fish"] = option("bash", "", argument=True, required=True)


@click.command("completion", short_help="Completion for bash, zsh or fish.")
@takes(CompletionOptions, some(SpeechOptions, "debug"))
def command(completion: CompletionOptions) -> int:
    """Print the script that completes commands, options, files and reason codes in SHELL.

    \b
    Install it once, then open a new shell:
      bash  bntool completion bash > ~/.local/share/bash-completion/completions/bntool
      zsh   bntool completion zsh > FOLDER/_bntool, FOLDER being one of $fpath
      fish  bntool completion fish > ~/.config/fish/completions/bntool.fish
    """  # noqa: D301 - click's mark for lines to keep
    from bntool.cli import cli

    script = get_completion_class(completion.shell)
    assert script is not None  # click knows all three
    say(*script(cli, {}, "bntool", VARIABLE).source().split("\n"))
    return 0
