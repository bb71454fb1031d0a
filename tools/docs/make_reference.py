"""Write what `--help` says: a page, a man page, and completions. `python tools/docs/make_reference.py`."""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click
from click.shell_completion import get_completion_class

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from bntool import __version__  # noqa: E402
from bntool.cli import cli  # noqa: E402
from bntool.cli.completing import VARIABLE  # noqa: E402
from bntool.cli.examples import EXAMPLES  # noqa: E402
from bntool.core.documents import schema  # noqa: E402

PAGE = ROOT / "docs" / "reference" / "commands.md"
SCHEMA = ROOT / "docs" / "reference" / "schema.json"
MANUAL = ROOT / "man" / "bntool.1"
COMPLETIONS = ROOT / "completions"

_HEAD = """# Commands

The text of `bntool COMMAND --help`. `bntool --version` tells the versions of bntool, Python, torch, ONNX and
ONNX Runtime, and the CUDA they were built for. How a command ends is told by its [exit code](exit-codes.md).
"""
EXIT_CODES = {
    "0": "done",
    "1": "a verification failed",
    "2": "wrong usage",
    "3": "the input cannot be loaded",
    "4": "nothing to do, or --require-all not met",
    "5": "the device or the provider is not available",
    "6": "the export failed",
    "7": "bad model state",
    "8": "the processes of a job do not find each other",
    "9": "standard output is closed or full; the work was done",
    "10": "the checks have shown nothing; the work was done",
    "70": "a bug in bntool",
    "130": "stopped with Ctrl-C",
    "141": "the reader of the output went away",
}
_ENVIRONMENT = """.SH ENVIRONMENT
.TP
.B NO_COLOR
No colours on a terminal. Piped output never has any.
.TP
.B XDG_STATE_HOME
Where the last file written in each folder is remembered.
.TP
.B XDG_CACHE_HOME
Where the index of architectures is kept."""


def page() -> str:
    """Every command with its usage, options and examples, in Markdown."""
    return "\n".join((_HEAD, *(_section(*found) for found in _commands())))


def _commands() -> Iterator[tuple[str, click.Command, click.Context]]:
    top = cli.make_context("bntool", [], resilient_parsing=True)
    for name in cli.list_commands(top):
        command = cli.get_command(top, name)
        assert command is not None
        yield name, command, click.Context(command, info_name=name, parent=top)


def _section(name: str, command: click.Command, context: click.Context) -> str:
    options = "\n".join(
        f"| `{_cell(names)}` | {_cell(help_)} |" for names, help_ in _options(command, context)
    )
    examples = "\n".join(EXAMPLES[name])
    return (
        f"## {name}\n\n```text\nbntool {name} {_arguments(command, context)}\n```\n\n{_text(command)}\n"
        f"\n```bash\n{examples}\n```\n\n| option | meaning |\n|---|---|\n{options}\n"
    )


def _options(command: click.Command, context: click.Context) -> list[tuple[str, str]]:
    params = (param for param in command.get_params(context) if isinstance(param, click.Option))
    records = (param.get_help_record(context) for param in params)
    return [(names, " ".join(help_.split())) for names, help_ in filter(None, records)]


def _arguments(command: click.Command, context: click.Context) -> str:
    return " ".join(piece for part in command.collect_usage_pieces(context) for piece in part.split())


def _paragraphs(command: click.Command) -> Iterator[tuple[bool, str]]:
    """Each paragraph of the help, and whether its lines are to be kept as they are."""
    for text in re.split(r"\n\s*\n", inspect.cleandoc(command.help or "")):
        kept = text.startswith("\b")
        yield kept, text.removeprefix("\b\n") if kept else " ".join(text.split())


def _text(command: click.Command) -> str:
    return "\n\n".join(f"```text\n{text}\n```" if kept else text for kept, text in _paragraphs(command))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def manual() -> str:
    """One man page for all commands, in roff."""
    parts = [
        f'.TH BNTOOL 1 "" "bntool {__version__}" "User Commands"',
        ".SH NAME\nbntool \\- BatchNorm surgery for PyTorch models",
        ".SH SYNOPSIS\n.B bntool\n.I COMMAND\n.RI [ OPTIONS ]\n.RI [ MODEL ]",
        ".SH DESCRIPTION\n" + _roff_text(cli),
        ".SH COMMANDS",
        *(_roff_section(*found) for found in _commands()),
        ".SH EXIT STATUS\n"
        + "\n".join(f".TP\n.B {code}\n{_roff(text)}" for code, text in EXIT_CODES.items()),
        _ENVIRONMENT,
    ]
    return "\n".join(parts) + "\n"


def _roff_section(name: str, command: click.Command, context: click.Context) -> str:
    options = (f".TP\n.B {_roff(names)}\n{_roff(help_)}" for names, help_ in _options(command, context))
    lines = "\n".join(_roff(line) for line in EXAMPLES[name])
    usage = f".SS bntool {name} {_roff(_arguments(command, context))}"
    return "\n".join(
        (usage, _roff_text(command), *options, f".PP\nExamples:\n.PP\n.nf\n.RS\n{lines}\n.RE\n.fi")
    )


def _roff_text(command: click.Command) -> str:
    return "\n.PP\n".join(
        f".nf\n{_roff(text)}\n.fi" if kept else _roff(text) for kept, text in _paragraphs(command)
    )


def _roff(text: str) -> str:
    """Text that no line of which is a request, with dashes that can be searched and copied."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    return re.sub(r"^(?=[.'])", r"\\&", escaped, flags=re.MULTILINE)


def completions() -> dict[Path, str]:
    """The scripts that shells look for, where a wheel puts them: what `bntool completion` prints."""
    scripts = {}
    for shell, name in (("bash", "bntool"), ("zsh", "_bntool"), ("fish", "bntool.fish")):
        script = get_completion_class(shell)
        assert script is not None  # click knows all three
        scripts[COMPLETIONS / shell / name] = script(cli, {}, "bntool", VARIABLE).source() + "\n"
    return scripts


if __name__ == "__main__":
    texts = {PAGE: page(), MANUAL: manual(), SCHEMA: json.dumps(schema(), indent=1) + "\n", **completions()}
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")
