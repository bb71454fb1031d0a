"""`bntool completion`: the script that makes a shell complete bntool's commands, options and files."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from bntool.cli.completing import VARIABLE
from bntool.cli.streams import say


@click.command("completion", short_help="Completion for bash, zsh or fish.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def command(shell: str, debug: bool) -> int:  # noqa: ARG001 - read by main
    """Print the script that completes commands, options, files and reason codes in SHELL.

    \b
    Install it once, then open a new shell:
      bash  bntool completion bash > ~/.local/share/bash-completion/completions/bntool
      zsh   bntool completion zsh > FOLDER/_bntool, FOLDER being one of $fpath
      fish  bntool completion fish > ~/.config/fish/completions/bntool.fish
    """  # noqa: D301 - click's mark for lines to keep
    from bntool.cli import cli

    script = get_completion_class(shell)
    assert script is not None  # click knows all three
    say(*script(cli, {}, "bntool", VARIABLE).source().split("\n"))
    return 0
