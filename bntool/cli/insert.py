"""`bntool insert`: parse, call, print."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from bntool.cli import options as opt
from bntool.cli.completing import files
from bntool.cli.data import opened_data
from bntool.cli.onnx_file import is_onnx
from bntool.cli.onnx_insert import insert_onnx_file
from bntool.cli.session import Session, Voice, open_session, require_no_script
from bntool.cli.source import require_fitting, rewritten, show_source, tell_refusals, write_source
from bntool.errors import CheckFailed, NothingToDo, PlanError, UsageError
from bntool.reasons import Reason

if TYPE_CHECKING:
    from bntool.inserting import InsertOptions
    from bntool.plan import Plan
    from bntool.results import SurgeryResult
    from bntool.source.rewriting import Rewritten

_PLAIN = (
    "position linear pooling exclude every skip_last per_call keep_keys portable drop_bias eps momentum init "
    "sync"
).split()
"""Options that the planner takes under the name and with the value that the command line has."""
_MAKE_A_PLAN = frozenset({*_PLAIN, "activation", "include", "sites", "no_affine", "data"})


@click.command("insert", short_help="Put BatchNorm between convolutions and their activations.")
@opt.model_options()
@click.option(
    "--activation",
    multiple=True,
    metavar="KIND",
    help="Activations that count: relu (default), silu, …, any.",
)
@click.option("--position", type=click.Choice(["before", "after"]), default="before", show_default=True)
@click.option(
    "--init",
    type=click.Choice(["identity", "calibrate", "default"]),
    default="identity",
    show_default=True,
    help="identity keeps the eval output to the last bit; calibrate measures --data and keeps the first "
    "training step close too; default is PyTorch's own, to train from scratch.",
)
@opt.data_options(required=False)
@click.option("--no-affine", is_flag=True, help="BatchNorm without γ and β.")
@click.option("--eps", type=float, default=1e-5, show_default=True)
@click.option("--momentum", type=float, default=0.1, show_default=True)
@click.option("--drop-bias", is_flag=True, help="Move a bias that a BatchNorm follows into its running mean.")
@click.option("--linear", is_flag=True, help="After linear layers too.")
@click.option("--pooling", is_flag=True, help="Where a pooling layer stands before the activation too.")
@click.option("--per-call", is_flag=True, help="A layer that runs several times gets one for each call.")
@click.option("--every", type=int, default=1, metavar="N", help="Only every N-th site, the first included.")
@click.option("--skip-last", is_flag=True, help="Leave the last site out.")
@click.option(
    "--sites",
    metavar="FILE",
    shell_complete=files,
    callback=opt.not_empty,
    help="Only the layers that a JSON or TOML file lists.",
)
@click.option("--sync", is_flag=True, help="SyncBatchNorm, for training on several GPUs.")
@click.option("--keep-keys", is_flag=True, help="Name newcomers 0_bn, so that no old key moves.")
@click.option("--portable", is_flag=True, help="No class of bntool's own in the model.")
@click.option(
    "--plan",
    "plan_file",
    metavar="FILE",
    shell_complete=files,
    callback=opt.not_empty,
    help="Replay a plan instead of making one.",
)
@click.option("--source", is_flag=True, help="Edit the class in file.py:Class; shows the diff.")
@click.option("--in-place", is_flag=True, help="With --source: write the file itself.")
@opt.pattern_options()
@opt.output_options()
@opt.check_option()
@opt.report_option()
@opt.common_options()
def command(**options: Any) -> int:
    """Put BatchNorm between convolutions and their activations; the model's output stays the same.

    MODEL is a file (.pt, .pth, .safetensors, .onnx), torchvision:NAME, timm:NAME, pkg.mod:factory or
    path/file.py:Class. Writes NAME_bn beside it; the input is never touched.
    With --source the class itself gets the layers, in Python.
    """
    voice = Voice.of(options)
    require_fitting(options)
    _require_plan_alone(options)
    if is_onnx(options["model"]):
        return insert_onnx_file(voice, options, _chosen(options))
    session = open_session(voice, options)
    require_no_script(session, "insert into")
    if session.program is not None:
        from bntool.cli.program_file import insert_program_file

        return insert_program_file(session, session.program, options, _chosen(options))
    from bntool.cli.picturing import picture_module
    from bntool.cli.writing import chosen_output, write_model

    place = None
    if not options["dry_run"] and not options["source"]:
        place = chosen_output(session, "insert", options["output"])
    result = _inserted(session, options)
    picture_module(session, result.model if result.modified else None)
    if not result.modified:
        for skip in result.skips:
            voice.say(f"not cut: {skip.name} [{skip.reason}] {skip.detail}")
        voice.fail(_no_site(session, result), {**result.to_dict(), "output": None})
    document: dict[str, Any] = {}
    if options["source"]:
        source = rewritten(session, result, options)
        if not source.refusals:
            return _done_in_source(voice, source, result, options)
        tell_refusals(voice, source)
        document["source"] = source.to_dict()
        if not options["dry_run"] and (options["output"] or options["in_place"]):
            place = chosen_output(session, "insert", None)
        else:
            voice.note("nothing is written; -o FILE or --in-place writes the changed model")
    voice.say(result.render(verbose=not options["quiet"]))
    if result.checks and not all(check.passed for check in result.checks):
        raise CheckFailed("the output of the new model differs", next_step="please report this model")
    for note in result.plan.notes:
        voice.note(note)
    if len(result.checks) == 1 and not result.checks[0].limit:
        check = result.checks[0]
        inputs = f"{check.batches} {'inputs' if check.batches > 1 else 'input'}"
        voice.say(f"output      unchanged to the last bit ({check.device}, {inputs}, eval mode)")
    elif result.checks:
        ratio = max(check.ratio for check in result.checks)
        voice.say(f"output      unchanged within rounding: {ratio:.2f} x the model's own noise, eval mode")
    if place is not None:
        write_model(session, "insert", result, place)
        voice.say(f"wrote       {place.named}")
        if result.plan.key_map:
            moved = len(result.plan.key_map)
            voice.say(f"            {moved} keys moved; the map is in {place.sidecar.name}")
    voice.note("build the optimizer after the insertion, so that it trains the new layers")
    output = str(place.named) if place else None
    document |= {**result.to_dict(), "output": output, "dry_run": options["dry_run"]}
    voice.emit(document)
    return 0


def _done_in_source(voice: Voice, source: Rewritten, result: SurgeryResult, options: dict[str, Any]) -> int:
    """Show and write the new source; the document holds its names, not those of a changed module."""
    show_source(voice, source, result)
    output = write_source(voice, source, options)
    checks = (source.check,) if source.check is not None else ()
    named = dataclasses.replace(result, plan=source.plan, checks=checks).to_dict()
    for site in named["sites"]:
        site["form"] = "source"
    voice.emit({**named, "output": output, "dry_run": options["dry_run"], "source": source.to_dict()})
    return 0


def _inserted(session: Session, options: dict[str, Any]) -> SurgeryResult:
    from bntool import surgeries
    from bntool.api import apply

    with session.voice.progress("inserting") as step:
        if options["plan_file"]:
            plan = _insert_plan(options["plan_file"])
            result = apply(session.model, plan, session.observe().inputs, share=True)
        else:
            chosen = _chosen(options)
            chosen.validate()
            result = surgeries.insert_with(session.model, session.observe(), chosen)
            if result.modified and options["data"] is not None:
                step("measuring")
                return surgeries.measured_insert(session.model, result, opened_data(session, options))
        keeps = result.plan.options.get("init") == "identity"
        if result.modified and keeps and options["check"] != "none":
            step("running both models")
            full = options["check"] == "full"
            rows = surgeries.check_insert(
                session.model, result.model, result.plan, session.example, full=full
            )
            result = surgeries.with_checks(result, rows)
    return result


def _require_plan_alone(options: dict[str, Any]) -> None:
    """`UsageError` where `--plan` was given with what would make another plan."""
    if not options["plan_file"]:
        return
    context = click.get_current_context()
    for parameter in context.command.params:
        given = context.get_parameter_source(str(parameter.name)) is ParameterSource.COMMANDLINE
        if given and parameter.name in _MAKE_A_PLAN:
            raise UsageError(
                f"--plan and {parameter.opts[0]} do not go together: the plan says where and how",
                next_step="leave one of them out",
            )


def _chosen(options: dict[str, Any]) -> InsertOptions:
    """What the command line asks for, in the planner's words."""
    from bntool.cli.site_list import read_site_list
    from bntool.inserting import InsertOptions

    if (options["data"] is not None) != (options["init"] == "calibrate"):
        raise UsageError("--data and --init calibrate go together", next_step="give both, or neither of them")
    if options["sites"] and options["include"]:
        raise UsageError("--sites and --include both say where", next_step="give one of them")
    listed = read_site_list(options["sites"]) if options["sites"] else ()
    return InsertOptions(
        activations=options["activation"] or ("relu",),
        include=listed or options["include"] or ("*",),
        affine=not options["no_affine"],
        **{name: options[name] for name in _PLAIN},
    )


def _insert_plan(path: str) -> Plan:
    from bntool.api import read_plan

    plan = read_plan(path)
    if plan.action != "insert":
        raise PlanError(f"{path} is the plan of a {plan.action}", next_step="name the plan of an insert")
    return plan


def _no_site(session: Session, result: SurgeryResult) -> NothingToDo:
    """Why nothing was inserted; the layers that were looked at are told one by one before it."""
    from torch import nn

    reasons = {skip.reason for skip in result.skips}
    if reasons:
        looked = "1 layer was" if len(result.skips) == 1 else f"{len(result.skips)} layers were"
        what = f"no place for a BatchNorm: {looked} looked at, none fits"
    else:
        what = "no place for a BatchNorm: the model has no convolution that runs"
    if Reason.OTHER_ACTIVATION in reasons:
        next_step = "--activation any takes every activation"
    elif not reasons and any(isinstance(m, nn.Linear) for m in session.model.modules()):
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
    return NothingToDo(what, where=session.loaded.reference, next_step=next_step)
