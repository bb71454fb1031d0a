"""The command line: one small file per command, each imported only when it runs. No torch at import."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from typing import Any

import click

from bntool import __version__
from bntool.errors import BntoolError, InvariantError

_COMMANDS = {
    "insert": "Put BatchNorm between convolutions and their activations.",
    "summary": "Layers, shapes, trainable / frozen / buffers; before and after.",
    "fold": "Fold BatchNorm into the weights; export and verify.",
    "export": "Write a model as ONNX and verify it.",
    "verify": "Compare two models, or a model and an ONNX file.",
    "explain": "What a reason code means, and what to do.",
    "doctor": "What this machine can run, found out by trying.",
    "demo": "The three lines on the sample network.",
}
SCHEMA_VERSION = 1
_BUG = 70


class _LazyGroup(click.Group):
    """Knows its commands by name; imports one when it is called or asked for help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"bntool.cli.{cmd_name}")
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in _COMMANDS and not args[0].startswith("-"):
            import difflib

            close = difflib.get_close_matches(args[0], _COMMANDS, n=2)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise click.UsageError(f"no such command: {args[0]}{hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Help from the table above, so that no command is imported for it."""
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="bntool")
def cli() -> None:
    """BatchNorm surgery for PyTorch models.

    \b
      bntool insert model.pt       BatchNorm between conv and ReLU, outputs unchanged
      bntool summary               layers, shapes and counts, before and after
      bntool fold --export onnx    BN folded into the weights, ONNX verified

    A command given no MODEL takes the file that the last bntool command in this folder wrote.
    """


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    sys.exit(run(args))


def run(args: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code instead of exiting."""
    argv = list(sys.argv[1:] if args is None else args)
    as_json, debug = "--json" in argv, "--debug" in argv
    try:
        result: Any = cli.main(args=argv, prog_name="bntool", standalone_mode=False)
    except BntoolError as error:
        if debug:
            raise
        return _report(error, as_json)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.Abort:
        click.echo("bntool: stopped", err=True)
        return 130
    except click.ClickException as error:
        if as_json:
            _emit_error("usage", {"what": error.format_message(), "where": "", "next": "bntool --help"})
        else:
            error.show()
        return 2
    except KeyboardInterrupt:
        click.echo("bntool: stopped", err=True)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except (InvariantError, Exception) as error:
        if debug:
            raise
        text = str(error).strip().splitlines()
        what = f"a bug in bntool: {type(error).__name__}: {text[0] if text else ''}"
        next_step = "run it again with --debug and report the traceback"
        if as_json:
            _emit_error("bug", {"what": what, "where": "", "next": next_step})
        else:
            click.echo(f"error: {what}\n  next:  {next_step}", err=True)
        return _BUG
    return result if isinstance(result, int) else 0


def _report(error: BntoolError, as_json: bool) -> int:
    if as_json:
        _emit_error(error.status, error.to_dict())
    else:
        click.echo(f"error: {error}", err=True)
    return error.exit_code


def _emit_error(status: str, error: dict[str, str]) -> None:
    document = {"schema_version": SCHEMA_VERSION, "status": status, "error": error}
    click.echo(json.dumps(document, indent=1))
