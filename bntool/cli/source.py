"""`bntool insert --source`: what it needs, what it shows, what it writes."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from bntool.core.errors import UsageError

if TYPE_CHECKING:
    from bntool.cli.insert import Asked
    from bntool.cli.session import Session, Voice
    from bntool.results.results import SurgeryResult
    from bntool.source.rewriting import Rewritten

_SCRIPT = re.compile(r"(?P<path>.+\.py):[A-Za-z_][\w.]*")


def require_fitting(asked: Asked) -> None:
    """`UsageError` where `--source` was given with what it cannot serve, before anything is loaded."""
    if asked.ask.in_place and not asked.ask.source:
        raise UsageError(
            "--in-place is for --source", next_step="bntool insert net.py:Net --source --in-place"
        )
    if not asked.ask.source:
        return
    script = _SCRIPT.fullmatch(asked.model.model or "")
    if script is None:
        raise UsageError(
            f"--source edits the class in a Python file; {asked.model.model or 'no MODEL'} names none",
            next_step="bntool insert path/net.py:Net --source",
        )
    against = {
        "--position after": asked.insert.position == "after",
        "--keep-keys": asked.insert.keep_keys,
        "--drop-bias": asked.insert.drop_bias,
        "--per-call": asked.insert.per_call,
        "--data": asked.data.data is not None,
        "--init calibrate": asked.insert.init == "calibrate",
        "--plan": asked.ask.plan_file is not None,
    }
    for option, given in against.items():
        if given:
            raise UsageError(f"--source and {option} do not go together", next_step="leave one of them out")
    output = asked.write.output
    if output is not None and asked.ask.in_place:
        raise UsageError("-o and --in-place exclude each other", next_step="drop one of them")
    if output is not None and not output.endswith(".py"):
        raise UsageError(f"--source writes Python; {output} is no .py file", next_step="-o new.py")
    if output is not None and not asked.write.dry_run:
        from bntool.files.targets import Target

        Target(force=asked.write.force, reads=[script["path"]]).claim(output)


def rewritten(session: Session, result: SurgeryResult, asked: Asked) -> Rewritten:
    """The source with the sites of the result's plan in it, proved; or why that is not safe."""
    from bntool.source.rewriting import rewrite

    with session.voice.progress("proving the new source"):
        return rewrite(
            session.loaded.reference,
            session.model,
            session.observe(),
            result.plan,
            full=asked.check.check == "full",
            output=asked.write.output or "",
        )


def tell_refusals(voice: Voice, source: Rewritten) -> None:
    """Each line that is not safe to edit, and what is done instead."""
    for refusal in source.refusals:
        voice.tell(f"unsafe: {source.path}:{refusal.line}: {refusal.conv}: {refusal.why}")
    voice.tell("the source stays as it is; the model is changed instead (--exclude LAYER leaves a layer out)")


def show_source(voice: Voice, source: Rewritten, result: SurgeryResult) -> None:
    """The diff, then every new layer with the line it goes to."""
    from bntool.results.results import delta_lines
    from bntool.results.tables import Column, Table, count, render

    _show_diff(voice, source.diff)
    if voice.quiet:
        return
    columns = (
        Column("Layer", flexible=True),
        Column("Activation", flexible=True),
        Column("New BatchNorm", flexible=True),
        Column("Channels", number=True),
        Column("Line", number=True),
    )
    sites = list(source.plan.insert_sites)
    rows = [[s.conv, s.activation_kind, s.bn, count(s.channels), str(source.lines[s.conv])] for s in sites]
    voice.say()
    voice.say(render(Table(columns, rows)))
    for skip in result.skips:
        voice.say(f"not cut: {skip.name} [{skip.reason}] {skip.detail}")
    voice.say()
    for line in delta_lines(result.parameters):
        voice.say(line)
    if source.check is not None:
        inputs = f"{source.check.batches} {'inputs' if source.check.batches > 1 else 'input'}"
        voice.say(f"proved      imported, old weights loaded, output the same to the last bit ({inputs})")
    if source.plan.key_map:
        voice.note(f"{len(source.plan.key_map)} keys of old checkpoints moved; --json lists them as key_map")


def write_source(voice: Voice, source: Rewritten, asked: Asked) -> str | None:
    """Write the new source where the user said so; the path, or None."""
    output = asked.write.output
    if asked.write.dry_run or not (output or asked.ask.in_place):
        voice.note("nothing is written; -o FILE or --in-place writes the source")
        return None
    if source.path.read_bytes() != source.before:
        raise UsageError(f"{source.path} has changed meanwhile", next_step="run it again")
    if asked.ask.in_place:
        target = source.path
        path = voice.target.claim(target, force=True, though_read=True)
    else:
        target = Path(str(output))
        path = voice.target.claim(target)
    with voice.target.drafts() as drafts:
        drafts.of(path).write_bytes(source.after)
    voice.say(f"wrote       {target}")
    return str(target)


def _show_diff(voice: Voice, diff: str) -> None:
    if voice.as_json:
        return
    if not sys.stdout.isatty():
        voice.say(*diff.removesuffix("\n").split("\n"))
        return
    from rich.console import Console
    from rich.text import Text

    from bntool.cli.streams import styled
    from bntool.core.text import visible

    styles = {"+": "green", "-": "red", "@": "cyan"}
    console = Console(file=styled(sys.stdout), soft_wrap=True, highlight=False)
    for line in diff.removesuffix("\n").split("\n"):
        console.print(Text(visible(line), style=styles.get(line[:1], "")))
