"""`bntool fold`: parse, call, print."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

import click

from bntool.cli.blaming import require_place
from bntool.cli.concluding import conclude
from bntool.cli.fold_refusals import require_no_node, why_not
from bntool.cli.opening import Opened, open_model, open_weights
from bntool.cli.options import takes_all
from bntool.cli.session import Voice
from bntool.core.command_options import (
    BenchOptions,
    FileOptions,
    LoadOptions,
    ModelOptions,
    RealOptions,
    ReportOptions,
    SpeechOptions,
    WriteOptions,
)
from bntool.core.errors import CheckFailed, UsageError
from bntool.core.option import Options, option
from bntool.core.options import CheckOptions, ExportOptions, FoldOptions, PlaceOptions
from bntool.core.refusals import require_export

if TYPE_CHECKING:
    from bntool.cli.devices import Devices
    from bntool.core.plan import Plan
    from bntool.results.results import SurgeryResult
    from bntool.subjects.base import Subject


@dataclasses.dataclass(frozen=True)
class AskOptions(Options):
    """What a fold ends in."""

    export_to: Literal["onnx"] | None = option(None, "Write it as ONNX too.", "--export")
    require_all: bool = option(False, "Fail (exit 4) if any BatchNorm that runs is kept.")
    plan_file: str | None = option(
        None,
        "Fold a file of weights by the plan of an earlier fold, layer by layer, without the model.",
        "--plan",
        metavar="FILE",
        names="file",
    )
    bench: bool = option(False, "Time the model before and after.")


@dataclasses.dataclass(frozen=True)
class Asked:
    """All that the command takes."""

    model: ModelOptions
    load: LoadOptions
    real: RealOptions
    file: FileOptions
    ask: AskOptions
    export: ExportOptions
    fold: FoldOptions
    bench: BenchOptions
    write: WriteOptions
    place: PlaceOptions
    check: CheckOptions
    report: ReportOptions
    speech: SpeechOptions

    def require_fitting(self, subject: Subject) -> None:
        """Raise `UsageError` for options that do not go together, or not with the kind, before any work."""
        require_place(self.check.repro)
        exports = bool(self.ask.export_to)
        require_export(exports or subject.suffix == ".onnx", self.export, self.check, self.place)
        if self.bench != BenchOptions() and not self.ask.bench:
            raise UsageError("--batch-sizes and --rounds are for --bench", next_step="add --bench")


@click.command("fold", short_help="Fold BatchNorm into the weights; export and verify.")
@takes_all(Asked)
def command(voice: Voice, asked: Asked) -> int:
    """Fold every BatchNorm that algebra allows into the weights beside it, for inference.

    Writes NAME_folded beside the input, with --export onnx also NAME_folded.onnx. Every BatchNorm gets
    a verdict; what is kept is kept for a reason (bntool explain CODE).
    """
    of_torch = (asked.export, asked.fold, asked.place, asked.check, asked.ask, asked.real, asked.file)
    opening = open_weights if asked.ask.plan_file else open_model
    opened = opening(voice, asked.model.model, asked.load, *of_torch)
    asked.require_fitting(opened.subject)
    opened = opened.reading(asked.file, asked.check)
    opened = opened.on(asked.real, asked.load, full=asked.check.check == "full")
    if asked.export.dtype == "float32" and opened.session is not None:
        opened = opened.cast("float32")
    opened = opened.prepared(asked.fold)
    from bntool.cli import writing
    from bntool.cli.devices import require_places
    from bntool.cli.picturing import picture

    on_torch = opened.subject.on_torch
    devices = require_places(
        asked.place, torch_too=on_torch, onnx_too=not on_torch or bool(asked.ask.export_to)
    )
    devices.require_fitting(opened.kind)
    places = writing.chosen_places(voice, opened, asked.write, asked.export if asked.ask.export_to else None)
    with voice.target.drafts() as drafts:
        opened = opened.working_in(drafts, places.model)
        folded = _Fold(voice, opened, asked, devices)
        result, after = folded.result()
        picture(voice, opened, after if result.modified else None)
        folded.tell(result)
        if places.onnx is not None:
            result = folded.served(result, after, places.onnx, drafts)
        record = writing.draft_result(opened, "fold", (result, after), places.model, drafts)
    if places.onnx is not None:
        from bntool.pipeline.serving import placed

        result = placed(result, places.onnx.named, places.onnx.path, drafts)
    writing.keep_in_mind(voice, record)
    folded.tell_written(result, places)
    latency = folded.timed(result, after, places) if asked.ask.bench else None
    document = {
        **result.to_dict(),
        # what the graph alone folded is something done too
        **({"status": "ok"} if result.export and result.export.folded else {}),
        **places.to_dict(),
        "dry_run": asked.write.dry_run,
        "latency": latency,
    }
    new = places.model.named if places.model is not None else None
    return conclude(voice, document, result.checks, model=opened.source, new=new)


class _Fold:
    """The steps of the command: fold and prove, export and verify, time."""

    def __init__(self, voice: Voice, opened: Opened, asked: Asked, devices: Devices) -> None:
        self.voice, self.opened, self.asked, self.devices = voice, opened, asked, devices
        self.proof: Any = None

    def result(self) -> tuple[SurgeryResult, Any]:
        """The fold, proved; unproved where it is not worth an output."""
        from bntool.cli.devices import torch_device
        from bntool.pipeline.surgeries import apply, fold
        from bntool.subjects.base import Checking

        voice, subject = self.voice, self.opened.subject
        with voice.progress(f"folding {self.opened.subject.name}") as step:
            self.checking = Checking.of(
                self.asked.check,
                torch_device=torch_device(self.devices.torch),
                onnx_device=self.devices.onnx,
                seed=self.asked.load.seed,
                axes=self.asked.export.axes(),
                inputs=self.opened.inputs,
                step=step,
            )
            if self.asked.ask.plan_file:
                from bntool.api import read_plan

                return apply(subject, read_plan(self.asked.ask.plan_file), self.checking)
            if self.checking is not None:
                self.proof = subject.proof(self.checking)
            if self.asked.ask.export_to:
                from bntool.export.dynamic_axes import DynamicAxes

                DynamicAxes(asked=self.asked.export.axes()).named_for(subject.example())
            try:
                return fold(subject, self.asked.fold, self.proof, worth=self._is_worth_it)
            except CheckFailed:
                self._blame()
                raise

    def tell(self, result: SurgeryResult) -> None:
        """Say what was folded; end the command where that is not what was asked for."""
        voice, asked = self.voice, self.asked
        voice.say(result.render(verbose=not voice.quiet))
        for note in result.plan.notes:
            voice.note(note)
        refusal = why_not(result.plan, self.opened, asked)
        if refusal is not None:
            voice.fail(refusal, {**result.to_dict(), "dry_run": asked.write.dry_run})
        if asked.ask.require_all and (least := sum(bool(site.untrained) for site in result.plan.fold_sites)):
            voice.note(f"--require-all holds for this model as it is; {least} would stay once it is trained")
        if asked.check.check == "none":
            voice.note("not verified (--check none)")
        if not self.opened.subject.runs:
            voice.note("not verified: that needs the model (bntool verify, or fold with --arch)")

    def tell_written(self, result: SurgeryResult, places: Any) -> None:
        from bntool.cli import serving
        from bntool.results.checks import checks_text

        self.voice.say()
        self.voice.say(checks_text(result.checks))
        if places.model is not None:
            self.voice.say(f"wrote       {places.model.named}")
        if result.export is not None:
            self.voice.say(f"wrote       {serving.export_text(result.export)}")

    def served(self, result: SurgeryResult, after: Any, place: Any, drafts: Any) -> SurgeryResult:
        """The fold as ONNX, in a draft, and verified there."""
        from bntool.cli import serving
        from bntool.pipeline.serving import Serving

        how = Serving(self.asked.export, self.asked.fold, self.opened.source_hash)
        pair = None if self.checking is None else (self.proof.reference, self.checking)
        done = serving.served(
            self.voice, (result, after), place, how, pair, drafts, repro=self.asked.check.repro
        )
        if self.asked.ask.require_all and done.export is not None:
            require_no_node(done.export.nodes.get("BatchNormalization", 0), self.opened)
        return done

    def timed(self, result: SurgeryResult, after: Any, places: Any) -> dict[str, Any]:
        """The model before and after, and their files."""
        from bntool.cli.timing import timed_fold
        from bntool.results.latency import latency_text

        found = timed_fold(
            self.voice,
            self.opened,
            (result, after),
            places,
            self.asked.bench,
            self.devices,
            self.asked.export,
            self.asked.load.seed,
        )
        self.voice.say()
        self.voice.say(latency_text(found))
        return found.to_dict()

    def _is_worth_it(self, plan: Plan) -> bool:
        return why_not(plan, self.opened, self.asked) is None

    def _blame(self) -> None:
        """Say at which layer or node the unproved fold and the original part."""
        from bntool.cli import blaming
        from bntool.pipeline.surgeries import fold

        subject = self.opened.subject

        def find() -> Any:
            _, after = fold(subject, self.asked.fold)
            return subject.apart(after, self.proof)

        blaming.report(self.voice, find, self.asked.check.repro)
