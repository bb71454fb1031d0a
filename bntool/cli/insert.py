"""`bntool insert`: parse, call, print."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import click

from bntool.cli.concluding import conclude
from bntool.cli.data import opened_data, tell_used
from bntool.cli.opening import Opened, open_model
from bntool.cli.options import chosen, takes_all
from bntool.cli.session import Voice
from bntool.cli.source import require_fitting, rewritten, show_source, tell_refusals, write_source
from bntool.core.command_options import (
    DataOptions,
    FileOptions,
    LoadOptions,
    ModelOptions,
    RealOptions,
    ReportOptions,
    SpeechOptions,
    WriteOptions,
)
from bntool.core.errors import NothingToDo, PlanError, UsageError
from bntool.core.option import Options, option
from bntool.core.options import CheckOptions, InsertOptions
from bntool.core.reasons import Reason

if TYPE_CHECKING:
    from bntool.core.plan import Plan
    from bntool.results.results import SurgeryResult
    from bntool.source.rewriting import Rewritten


@dataclasses.dataclass(frozen=True)
class AskOptions(Options):
    """Where the places come from, and whether the class itself gets the layers."""

    sites: str | None = option(
        None, "Only the layers that a JSON or TOML file lists.", metavar="FILE", names="file"
    )
    plan_file: str | None = option(
        None, "Replay a plan instead of making one.", "--plan", metavar="FILE", names="file"
    )
    source: bool = option(False, "Edit the class in file.py:Class; shows the diff.")
    in_place: bool = option(False, "With --source: write the file itself.")
    data_files: tuple[str, ...] = option(
        (), "Only images of --data whose path or name fits.", "--data-include", metavar="GLOB"
    )


@dataclasses.dataclass(frozen=True)
class Asked:
    """All that the command takes."""

    model: ModelOptions
    load: LoadOptions
    real: RealOptions
    file: FileOptions
    insert: InsertOptions
    data: DataOptions
    ask: AskOptions
    write: WriteOptions
    check: CheckOptions
    report: ReportOptions
    speech: SpeechOptions

    def require_fitting(self) -> None:
        """Raise `UsageError` for options that do not go together, before any work."""
        require_fitting(self)
        if self.ask.plan_file:
            others = {**chosen(self.insert, self.data), **({"--sites": None} if self.ask.sites else {})}
            for flag in others:
                raise UsageError(
                    f"--plan and {flag} do not go together: the plan says where and how",
                    next_step="leave one of them out",
                )
        if (self.data.data is not None) != (self.insert.init == "calibrate"):
            raise UsageError(
                "--data and --init calibrate go together", next_step="give both, or neither of them"
            )
        if self.ask.sites and self.insert.include != ("*",):
            raise UsageError("--sites and --include both say where", next_step="give one of them")

    def options(self) -> InsertOptions:
        """What is asked of the insertion, with the layers that a file lists."""
        from bntool.cli.site_list import read_site_list

        if not self.ask.sites:
            return self.insert
        return dataclasses.replace(self.insert, include=read_site_list(self.ask.sites))


@click.command("insert", short_help="Put BatchNorm between convolutions and their activations.")
@takes_all(Asked, without=("files",), position="", eps="", momentum="")
def command(voice: Voice, asked: Asked) -> int:
    """Put BatchNorm between convolutions and their activations; the model's output stays the same.

    MODEL is a file (.pt, .pth, .safetensors, .pt2, .onnx), torchvision:NAME, timm:NAME, pkg.mod:factory or
    path/file.py:Class. Writes NAME_bn beside it; the input is never touched.
    With --source the class itself gets the layers, in Python.
    """
    asked.require_fitting()
    opened = open_model(voice, asked.model.model, asked.load, asked.insert, asked.data, asked.ask, asked.file)
    opened = opened.reading(asked.file, asked.check)
    opened = opened.on(asked.real, asked.load, full=asked.check.check == "full")
    from bntool.cli import writing
    from bntool.cli.picturing import picture

    place = None
    if not asked.write.dry_run and not asked.ask.source:
        place = writing.chosen_output(voice, opened, "insert", asked.write.output)
    document: dict[str, Any] = {}
    with voice.target.drafts() as drafts:
        opened = opened.working_in(drafts, place)
        result, after = _inserted(voice, opened, asked)
        picture(voice, opened, after if result.modified else None)
        if not result.modified:
            for skip in result.skips:
                voice.say(f"not cut: {skip.name} [{skip.reason}] {skip.detail}")
            for note in result.plan.notes:
                voice.note(note)
            voice.fail(_no_site(opened, result), {**result.to_dict(), "dry_run": asked.write.dry_run})
        if asked.ask.source and opened.session is not None:
            source = rewritten(opened.session, result, asked)
            if not source.refusals:
                return _done_in_source(voice, source, result, asked)
            tell_refusals(voice, source)
            document["source"] = source.to_dict()
            if not asked.write.dry_run and (asked.write.output or asked.ask.in_place):
                place = writing.chosen_output(voice, opened, "insert", None)
            else:
                voice.note("nothing is written; -o FILE or --in-place writes the changed model")
        voice.say(result.render(verbose=not voice.quiet))
        for note in result.plan.notes:
            voice.note(note)
        _tell_checks(voice, result, asked)
        record = writing.draft_result(opened, "insert", (result, after), place, drafts)
    writing.keep_in_mind(voice, record)
    if place is not None:
        voice.say(f"wrote       {place.named}")
        if result.plan.key_map and place.sidecar is not None:
            moved = len(result.plan.key_map)
            voice.say(f"            {moved} keys moved; the map is in {place.sidecar.name}")
    if opened.kind == "module":
        voice.note("build the optimizer after the insertion, so that it trains the new layers")
    places = writing.Places(opened.kind, place).to_dict()
    document = {**result.to_dict(), **places, "dry_run": asked.write.dry_run, **document}
    new = place.named if place is not None else None
    return conclude(voice, document, result.checks, model=opened.source, new=new)


def _inserted(voice: Voice, opened: Opened, asked: Asked) -> tuple[SurgeryResult, Any]:
    from bntool.pipeline import surgeries
    from bntool.subjects.base import Checking

    checking = Checking.of(asked.check, seed=asked.load.seed, inputs=opened.inputs)
    subject = opened.subject
    with voice.progress("inserting") as step:
        if asked.ask.plan_file:
            return surgeries.apply(subject, _insert_plan(asked.ask.plan_file), checking)
        step("running both models")
        result, after = surgeries.insert(subject, asked.options(), checking)
        if result.modified and asked.data.data is not None and opened.session is not None:
            step("measuring")
            data = dataclasses.replace(asked.data, files=asked.ask.data_files)  # --include is for layers here
            batches = opened_data(opened.session, data, asked.load)
            result = surgeries.measured_insert(subject, result, batches)
            tell_used(voice, batches)
    return result, after


def _tell_checks(voice: Voice, result: SurgeryResult, asked: Asked) -> None:
    """How far the output stayed the same, on one line."""
    if asked.check.check == "none":
        voice.note("not verified (--check none)")
    if len(result.checks) == 1 and not result.checks[0].limit:
        check = result.checks[0]
        inputs = f"{check.batches} {'inputs' if check.batches > 1 else 'input'}"
        where = check.device if check.provider == "torch" else check.provider
        voice.say(f"output      unchanged to the last bit ({where}, {inputs}, eval mode)")
    elif result.checks:
        ratio = max(check.ratio for check in result.checks)
        voice.say(f"output      unchanged within rounding: {ratio:.2f} x the model's own noise, eval mode")


def _done_in_source(voice: Voice, source: Rewritten, result: SurgeryResult, asked: Asked) -> int:
    """Show and write the new source; the document holds its names, not those of a changed module."""
    show_source(voice, source, result)
    output = write_source(voice, source, asked)
    checks = (source.check,) if source.check is not None else ()
    named = dataclasses.replace(result, plan=source.plan, checks=checks).to_dict()
    for site in named["sites"]:
        site["form"] = "source"
    document = {**named, "output": output, "dry_run": asked.write.dry_run, "source": source.to_dict()}
    return conclude(voice, document, checks, model=asked.model.model, new=None)


def _insert_plan(path: str) -> Plan:
    from bntool.api import read_plan

    plan = read_plan(path)
    if plan.action != "insert":
        raise PlanError(f"{path} is the plan of a {plan.action}", next_step="name the plan of an insert")
    return plan


def _no_site(opened: Opened, result: SurgeryResult) -> NothingToDo:
    """Why nothing was inserted; the layers that were looked at are told one by one before it."""
    reasons = {skip.reason for skip in result.skips}
    if reasons:
        looked = "1 layer was" if len(result.skips) == 1 else f"{len(result.skips)} layers were"
        what = f"no place for a BatchNorm: {looked} looked at, none fits"
    else:
        what = "no place for a BatchNorm: the model has no convolution that runs"
    if Reason.OTHER_ACTIVATION in reasons:
        next_step = "--activation any takes every activation"
    elif not reasons and opened.subject.graph().of_kind("linear"):
        next_step = "--linear takes linear layers too"
    elif Reason.ALREADY_NORMALISED in reasons <= {Reason.ALREADY_NORMALISED, Reason.NO_ACTIVATION}:
        next_step = (
            "each place has a BatchNorm already, which bntool fold takes out; "
            f"bntool explain {Reason.ALREADY_NORMALISED}"
        )
    elif reasons:
        next_step = f"bntool explain {min(reasons)}"
    else:
        next_step = "name another MODEL"
    return NothingToDo(what, where=opened.subject.name, next_step=next_step)
