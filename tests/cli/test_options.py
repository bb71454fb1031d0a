from __future__ import annotations

import dataclasses
from typing import Any, Literal

import click
import pytest
from click.testing import CliRunner

from bntool.cli.options import some, takes
from bntool.cli.session import Voice
from bntool.core.option import Options, option


@dataclasses.dataclass(frozen=True)
class CakeOptions(Options):
    files: tuple[str, ...] = option((), "", metavar="FILE…", argument=True, required=True, names="file")
    eggs: int = option(3, "How many eggs.", least=1, most=9)
    flour: str | None = option(None, "Which flour.")
    form: Literal["round", "square"] | None = option(None, "What it is baked in.")
    sugar: bool = option(True, "Leave the sugar out.")


@dataclasses.dataclass(frozen=True)
class OvenOptions(Options):
    racks: tuple[int, ...] = option(
        (1, 2), "Which racks.", parse=lambda text: tuple(map(int, text.split(",")))
    )
    fan: bool = option(False, "With the fan.")


Given = dict[str, Any]


def given_to(*classes: Any, words: list[str], **told: Any) -> Given:
    """What a command of these classes is given for these words."""
    found: Given = {}

    @click.command()
    @takes(*classes, **told)
    def command(voice: Voice, cake: CakeOptions) -> int:
        found.update(voice=voice, cake=cake)
        return 0

    result = CliRunner().invoke(command, words)
    return found or {"code": result.exit_code, "output": result.output}


def test_a_command_is_given_the_objects_that_its_parameters_name() -> None:
    found = given_to(CakeOptions, OvenOptions, words=["a", "b", "--no-sugar", "--form", "round", "--fan"])
    assert isinstance(found["voice"], Voice)
    assert found["cake"] == CakeOptions(("a", "b"), form="round", sugar=False)


def test_of_some_options_the_others_keep_their_defaults_and_are_no_flags() -> None:
    few = some(CakeOptions, "flour")
    assert given_to(few, words=["--flour", "rye"])["cake"] == CakeOptions(flour="rye")
    refused = given_to(few, words=["--eggs", "4"])
    assert refused["code"] == 2
    assert "No such option '--eggs'" in refused["output"]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["a"], "Missing option '--flour'"),
        (["--flour", "rye"], "Missing argument 'FILE…'"),
        (["a", "--flour", "rye", "--eggs", "0"], "eggs is 0, and must be from 1 to 9"),
        (["a", "--flour", "rye", "--eggs", "10"], "eggs is 10, and must be from 1 to 9"),
        (["a", "", "--flour", "rye"], "it is empty"),
    ],
)
def test_what_is_missing_or_out_of_bounds(words: list[str], text: str) -> None:
    refused = given_to(CakeOptions, words=words, required=("flour",))
    assert refused["code"] == 2
    assert text in refused["output"]


def test_help_tells_meanings_defaults_and_what_is_required() -> None:
    help_text = given_to(CakeOptions, OvenOptions, words=["--help"], required=("flour",), eggs="", fan="Hot.")
    lines = [line.strip() for line in help_text["output"].splitlines()]
    assert "--eggs INTEGER         [default: 3]" in lines
    assert "--flour TEXT           Which flour.  [required]" in lines
    assert "--racks TEXT           Which racks.  [default: 1,2]" in lines
    assert "--fan                  Hot." in lines
