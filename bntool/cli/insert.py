"""`bntool insert`: parse, call, print."""

from __future__ import annotations

from typing import Any

import click

from bntool.cli import options as opt
from bntool.cli.session import Voice, open_session
from bntool.errors import CheckFailed, NothingToDo


@click.command("insert", short_help="Put BatchNorm between convolutions and their activations.")
@opt.model_options()
@click.option(
    "--activation", multiple=True, metavar="KIND", help="Activations that count: relu (default), silu, …, any."
)
@click.option("--position", type=click.Choice(["before", "after"]), default="before", show_default=True)
@click.option(
    "--init",
    type=click.Choice(["identity", "default"]),
    default="identity",
    show_default=True,
    help="identity keeps the eval output to the last bit; default is PyTorch's own, to train from scratch.",
)
@click.option("--no-affine", is_flag=True, help="BatchNorm without γ and β.")
@click.option("--eps", type=float, default=1e-5, show_default=True)
@click.option("--momentum", type=float, default=0.1, show_default=True)
@click.option("--linear", is_flag=True, help="After linear layers too.")
@click.option("--sync", is_flag=True, help="SyncBatchNorm, for training on several GPUs.")
@click.option("--keep-keys", is_flag=True, help="Name newcomers 0_bn, so that no old key moves.")
@click.option("--plan", "plan_file", metavar="FILE", help="Replay a plan instead of making one.")
@opt.pattern_options()
@opt.output_options()
@opt.check_option()
@opt.common_options()
def command(**options: Any) -> int:
    """Put BatchNorm between convolutions and their activations; the model's output stays the same.

    MODEL is a file (.pt, .pth, .safetensors), torchvision:NAME, timm:NAME, pkg.mod:factory or
    path/file.py:Class. Writes NAME_bn beside it; the input is never touched.
    """
    voice = Voice(options["as_json"], options["quiet"], options["verbose"])
    session = open_session(voice, options)
    from bntool.cli.writing import chosen_output, write_model

    path = None
    if not options["dry_run"]:
        path = chosen_output(session, "insert", options["output"], options["force"])
    result = _inserted(session, options)
    if not result.modified:
        raise _no_site(session, result)
    voice.say(result.render(verbose=not options["quiet"]))
    if result.checks and not all(check.passed for check in result.checks):
        raise CheckFailed("the output of the new model differs", next_step="please report this model")
    for note in result.plan.notes:
        voice.note(note)
    if result.checks:
        check = result.checks[0]
        voice.say(f"output      unchanged to the last bit ({check.device}, {check.batches} inputs, eval mode)")
    if path is not None:
        write_model(session, "insert", result, path, options["force"])
        voice.say(f"wrote       {path}")
        if result.plan.key_map:
            voice.say(f"            {len(result.plan.key_map)} keys moved; the map is in {path.name}.bntool.json")
    voice.say("note: build the optimizer after the insertion, so that it trains the new layers")
    voice.emit({**result.to_dict(), "output": str(path) if path else None, "dry_run": options["dry_run"]})
    return 0


def _inserted(session: Any, options: dict[str, Any]) -> Any:
    from bntool import api
    from bntool.insertion import check_unchanged
    from bntool.inserting import InsertOptions

    with session.voice.progress("inserting") as step:
        if options["plan_file"]:
            result = api.apply(session.model, options["plan_file"], share=True)
            session.observe()
        else:
            chosen = InsertOptions(
                activations=options["activation"] or ("relu",),
                position=options["position"],
                linear=options["linear"],
                include=options["include"] or ("*",),
                exclude=options["exclude"],
                keep_keys=options["keep_keys"],
                affine=not options["no_affine"],
                eps=options["eps"],
                momentum=options["momentum"],
                init=options["init"],
                sync=options["sync"],
            )
            chosen.validate()
            result = api.insert_with(session.model, session.observe(), chosen)
        keeps = result.plan.options.get("init") == "identity"
        if result.modified and keeps and options["check"] != "none":
            step("running both models")
            check = check_unchanged(session.model, result.model, session.inputs, full=options["check"] == "full")
            result = api.with_checks(result, [check])
    return result


def _no_site(session: Any, result: Any) -> NothingToDo:
    """Why nothing was inserted, layer by layer."""
    for skip in result.skips:
        session.voice.say(f"not cut: {skip.name} [{skip.reason}] {skip.detail}")
    count = len(result.skips)
    return NothingToDo(
        f"no place for a BatchNorm: {count} layers were looked at, none fits",
        where=session.loaded.reference,
        next_step="--activation any takes other activations; bntool explain CODE says more about a reason",
    )
