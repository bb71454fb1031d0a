"""The command line: one small file per command, each imported only when it runs. No torch at import."""

from __future__ import annotations

import gc
import importlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import click

from bntool.cli.completing import VARIABLE as COMPLETION_VARIABLE
from bntool.cli.documents import emit, failure
from bntool.cli.examples import epilog
from bntool.cli.folder import require_folder
from bntool.cli.job import first_to_fail, require_alone
from bntool.cli.streams import Streams, say
from bntool.core.errors import BntoolError, InvariantError, LoadError, UsageError

_COMMANDS = {
    "insert": "Put BatchNorm between convolutions and their activations.",
    "summary": "Layers, shapes, trainable / frozen / buffers; before and after.",
    "inspect": "What a file is and holds, without loading it.",
    "fold": "Fold BatchNorm into the weights; export and verify.",
    "export": "Write a model as ONNX and verify it.",
    "bench": "Time two models beside each other.",
    "verify": "Compare two models, or a model and an ONNX file.",
    "calibrate": "Recompute running statistics from data.",
    "compare": "Train with and without BatchNorm, and compare.",
    "report": "Draw what the commands found as one HTML file.",
    "explain": "What a reason code means, and what to do.",
    "doctor": "What this machine can run, found out by trying.",
    "demo": "The three lines on the sample network.",
    "completion": "Completion for bash, zsh or fish.",
}
_SHARED = ("calibrate", "compare")
"""What several processes do together."""
_ALONE = ("insert", "summary", "fold", "export", "demo")
"""What each of several processes would do, and write, for itself."""
_LONGEST = 400  # characters of what went wrong; a library's own words can fill a screen
_BUG = 70
_STOPPED = 130


class _LazyGroup(click.Group):
    """Knows its commands by name; imports one when it is called or asked for help."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's protocol
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"bntool.cli.{cmd_name}")
        command: click.Command = module.command
        command.epilog = epilog(cmd_name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in _COMMANDS and not args[0].startswith("-"):
            import difflib

            close = difflib.get_close_matches(args[0], _COMMANDS, n=2)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise click.UsageError(f"no such command: {args[0]}{hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Help from the table above, so that no command is imported for it."""
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        # click takes the one for a reader that left, and ends the process with 1; the other for Ctrl-C.
        except (BrokenPipeError, EOFError) as error:
            raise InvariantError(f"{type(error).__name__}: {error}") from error


def _show_version(ctx: click.Context, param: click.Parameter, asked: bool) -> None:  # noqa: ARG001
    if asked and not ctx.resilient_parsing:
        from bntool.cli.versions import version_text

        say(version_text())
        ctx.exit()


@click.group(
    cls=_LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    invoke_without_command=True,
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="Show the versions of bntool, torch, ONNX Runtime and CUDA, and exit.",
)
@click.pass_context
def cli(ctx: click.Context) -> None:
    """BatchNorm surgery for PyTorch models.

    \b
      bntool insert model.pt       BatchNorm between conv and ReLU, outputs unchanged
      bntool summary               layers, shapes and counts, before and after
      bntool fold --export onnx    BN folded into the weights, ONNX verified

    A command given no MODEL takes the file that the last bntool command in this folder wrote.
    """  # noqa: D301 - click's mark for lines to keep
    if ctx.invoked_subcommand is None:
        say(*ctx.get_help().split("\n"))
    elif not {"-h", "--help"} & set(ctx.args):
        require_folder()
        if ctx.invoked_subcommand in _ALONE:
            require_alone(f"bntool {ctx.invoked_subcommand}", but=_SHARED)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    # A short-lived process that imports torch and traces graphs makes millions of objects that live to its
    # end; looking through them for cycles again and again took a third of the time of `fold --export onnx`.
    gc.set_threshold(100_000, 50, 100)
    if os.environ.get(COMPLETION_VARIABLE):
        cli.main(prog_name="bntool")  # a shell asks for the words that fit: click answers and exits
    argv = _words(args)
    # Never put back: what is printed at the very end goes the same ways.
    streams = Streams(document=_as_json(argv))
    code = streams.outcome(_run(argv))
    gc.freeze()  # nor is there anything to look for at the very end
    sys.exit(code)


def run(args: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code instead of exiting."""
    argv = _words(args)
    with Streams(document=_as_json(argv)) as streams:
        return streams.outcome(_run(argv))


def _words(args: Sequence[str] | None) -> list[str]:
    return list(sys.argv[1:] if args is None else args)


def _as_json(argv: list[str]) -> bool:
    return "--json" in argv and not {"-h", "--help"} & set(argv)


def _run(argv: list[str]) -> int:
    as_json, debug = _as_json(argv), "--debug" in argv
    fail = _speaker(as_json, _command_of(argv), whole=bool({"-v", "--verbose", "--debug"} & set(argv)))
    try:
        result: Any = cli.main(args=argv, prog_name="bntool", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except (click.Abort, KeyboardInterrupt):
        if first_to_fail():
            if as_json:
                stopped = {"what": "stopped", "where": "", "next": ""}
                emit(_command_of(argv), {"status": "stopped", "error": stopped})
            say("bntool: stopped", err=True)
        return _STOPPED
    except click.ClickException as error:
        return fail(_usage(error))
    except SystemExit as stop:
        what = f"the model's own code ended the program with sys.exit({stop.code!r})"
        return fail(LoadError(what, next_step="take that call out of the code"))
    except BntoolError as error:
        _trace(debug)
        return fail(error)
    except OSError as error:
        _trace(debug)
        if error.filename is None:
            return _bug(error, _command_of(argv), as_json)
        next_step = "check the name, the folder's permissions and the space on the disk"
        return fail(UsageError(f"{error.strerror}", where=str(error.filename), next_step=next_step))
    except Exception as error:  # noqa: BLE001 - whatever is left is a bug, told without a traceback
        _trace(debug)
        return _bug(error, _command_of(argv), as_json)


def _command_of(argv: list[str]) -> str:
    return next((word for word in argv if word in _COMMANDS), "")


def _speaker(as_json: bool, command: str, *, whole: bool) -> Callable[[BntoolError], int]:
    """How an error is told: what, where and what to do next. Returns the exit code."""

    def fail(error: BntoolError) -> int:
        error.next_step = error.next_step or " ".join(filter(None, ("bntool", command, "--help")))
        if not first_to_fail():
            return error.exit_code
        if as_json:
            emit(command, failure(error))
        else:
            too_long = len(error.what) > _LONGEST and not (whole or error.uncut)
            if too_long and _has_verbose(command):
                error.what = f"{error.what[:_LONGEST].rstrip()} … (-v shows all of it)"
            say(error.told("error: "), err=True)
        return error.exit_code

    return fail


def _has_verbose(name: str) -> bool:
    command = cli.get_command(click.Context(cli), name)
    return command is not None and any("--verbose" in option.opts for option in command.params)


def _usage(error: click.ClickException) -> UsageError:
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "bntool"
    what = re.sub(r"\s*\n\s*", " ", error.format_message())  # click lists choices one below the other
    return UsageError(what, where=path, next_step=f"{path} --help")


def _bug(error: Exception, command: str, as_json: bool) -> int:
    text = str(error).strip().splitlines()
    what = f"a bug in bntool: {type(error).__name__}: {text[0] if text else ''}"
    next_step = "run it again with --debug and report the traceback"
    if not first_to_fail():
        return _BUG
    if as_json:
        emit(command, {"status": "bug", "error": {"what": what, "where": "", "next": next_step}})
    else:
        say(f"error: {what}", f"  next:  {next_step}", err=True)
    return _BUG


def _trace(debug: bool) -> None:
    if debug:
        say(*traceback.format_exc().split("\n"), err=True)
