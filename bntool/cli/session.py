"""What a command works on: the model, where it came from, its example inputs, and how it speaks."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from bntool.cli.documents import emit, failure
from bntool.cli.example_inputs import parse_inputs, texts_of
from bntool.cli.loading import load_granted
from bntool.cli.reading import read_by
from bntool.cli.streams import say
from bntool.core.command_options import LoadOptions, ReportOptions, SpeechOptions
from bntool.core.errors import BntoolError, InvariantError
from bntool.core.showing import WARNING, noted
from bntool.core.text import asked_width
from bntool.files.sidecar import sidecar_path
from bntool.files.targets import Target

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram

    from bntool.core.option import Options
    from bntool.core.plan import Plan
    from bntool.files.loaded import Loaded
    from bntool.files.memory import Record
    from bntool.graph.inputs import Inputs
    from bntool.observe.eager import Observation


@dataclasses.dataclass
class Voice:
    """Results go to stdout, progress to stderr; with `--json` stdout is one document and nothing else.

    `silent` is one of several processes, of which another speaks.
    """

    as_json: bool = False
    quiet: bool = False
    verbose: bool = False
    notes: list[str] = dataclasses.field(default_factory=list)
    silent: bool = False
    report: Path | None = None
    model: dict[str, Any] | None = None
    target: Target = dataclasses.field(default_factory=Target)
    _report_place: Path = Path()

    @classmethod
    def of(cls, *asked: Options) -> Voice:
        """The voice that the options ask for; a report that cannot be written is told at once.

        Whatever they name is read, but for what they say is written.
        """
        speech = next((one for one in asked if isinstance(one, SpeechOptions)), SpeechOptions())
        force = any(getattr(one, "force", False) for one in asked)
        voice = cls(speech.as_json, speech.quiet, speech.verbose)
        asked_width.set(speech.width)
        voice.target = Target(force=force, reads=read_by(*asked))
        report = next((one.report for one in asked if isinstance(one, ReportOptions)), None)
        if report:
            from bntool.report.writing import claim_report

            voice.report = Path(report)
            voice._report_place = claim_report(voice.report, voice.target)
        return voice

    @property
    def writes_document(self) -> bool:
        return not self.silent and (self.as_json or self.report is not None)

    def say(self, *parts: str) -> None:
        """Lines, or nothing with `--json`; a line end within a part that is no `Lines` is made visible."""
        if not self.as_json and not self.silent:
            say(*parts)

    def tell(self, text: str) -> None:
        """What a command settled by itself: a line that `--quiet` keeps, or an entry of `notes`."""
        self.notes.append(text)
        self.say(text)

    def note(self, text: str) -> None:
        """A remark: a line of text, or an entry of the document's `notes`. `--quiet` keeps a warning."""
        self.notes.append(text)
        if not self.as_json and not self.silent and (text.startswith(WARNING) or not self.quiet):
            say(noted(text))

    def emit(self, document: dict[str, Any]) -> None:
        if not self.writes_document:
            return
        context = click.get_current_context(silent=True)
        command = str(context.info_name) if context is not None else ""
        document = {**document, "notes": self.notes, "model": self.model}
        if self.report is not None:
            self._draw(self.report, command, document)
        if self.as_json:
            emit(command, document)

    def _draw(self, path: Path, command: str, document: dict[str, Any]) -> None:
        from bntool.core.documents import whole
        from bntool.report.reading import as_document
        from bntool.report.writing import write_page

        with self.target.drafts() as drafts:
            write_page([as_document(whole(command, document), path.name)], drafts.of(self._report_place))
        self.say(f"wrote       {path}")

    def fail(self, error: BntoolError, document: dict[str, Any]) -> NoReturn:
        """Raise `error`; the document, or the report, still holds what was found out before."""
        self.emit({**document, **failure(error)})
        if self.as_json:
            raise click.exceptions.Exit(error.exit_code)
        raise error

    @contextlib.contextmanager
    def progress(self, title: str) -> Iterator[Any]:
        """A progress line on stderr for work that takes over a second, where stderr is a terminal.

        Yields a function that takes the text of the current step.
        """
        if self.quiet or self.as_json or self.silent or not sys.stderr.isatty():
            yield lambda text: None
            return
        from rich.progress import BarColumn, SpinnerColumn, TimeElapsedColumn

        from bntool.cli.progress import Description, bar_of

        bar = bar_of(SpinnerColumn(), Description(), BarColumn(), TimeElapsedColumn())
        task = bar.add_task(title, total=None)
        timer = threading.Timer(1.0, bar.start)
        timer.start()
        try:
            yield lambda text: bar.update(task, description=text)
        finally:
            timer.cancel()
            timer.join()
            bar.stop()


@dataclasses.dataclass
class Session:
    """A loaded model and what is known about it."""

    voice: Voice
    loaded: Loaded
    inputs: Inputs | None
    seed: int
    record: Record | None = None
    earlier_plans: list[Plan] = dataclasses.field(default_factory=list)
    baseline: str = ""
    baseline_load: LoadOptions = dataclasses.field(default_factory=LoadOptions)
    _observation: Observation | None = None

    @property
    def model(self) -> nn.Module:
        return self.loaded.module

    @property
    def program(self) -> ExportedProgram | None:
        """The exported program that a .pt2 file holds; None for every other model."""
        from torch.export import ExportedProgram

        return self.loaded.model if isinstance(self.loaded.model, ExportedProgram) else None

    @property
    def example(self) -> Inputs:
        """The example inputs, which are known once the model was observed."""
        if self.inputs is None:
            raise InvariantError("the model was not observed yet")
        return self.inputs

    @property
    def source(self) -> str:
        """The model's file as an absolute path, or its reference."""
        return str(self.loaded.path.resolve()) if self.loaded.path else self.loaded.reference

    def cast(self, dtype: str) -> None:
        """Go on in another floating type; the model was loaded for this command alone."""
        import torch

        from bntool.observe.stand_in import cast

        wanted = getattr(torch, dtype)
        self.loaded = dataclasses.replace(self.loaded, model=cast(self.model, wanted))
        if self.inputs is not None:
            self.inputs = self.inputs.map(lambda t: t.to(wanted) if t.is_floating_point() else t)

    def load_other(self, name: str, options: LoadOptions) -> nn.Module | ExportedProgram:
        """A second model that the user names; what was allowed for the first holds for it too."""
        from bntool.files.references import is_reference

        named = is_reference(name) and not Path(name).exists()
        return self.load_recorded(
            name,
            LoadOptions(
                arch=None if named else options.arch or self.loaded.arch,
                allow=self.loaded.allow,
                trust_pickle=options.trust_pickle,
                max_size=options.max_size,
            ),
        )

    def load_recorded(self, name: str, options: LoadOptions) -> nn.Module | ExportedProgram:
        """A second model, with no more trust than `options` and what was granted for that very file."""
        loaded, _ = load_granted(name, self.record, options, self.voice)
        for text in loaded.notes:
            self.voice.note(f"{name}: {text}")
        return loaded.model

    def observe(self) -> Observation:
        """Observe the model, once, on the given inputs, else on inferred ones, which are said."""
        from bntool.observe.eager import observe
        from bntool.observe.inference import observe_inferred

        if self._observation is None and self.inputs is not None:
            self._observation = observe(self.model, self.inputs)
        elif self._observation is None:
            self._observation = observe_inferred(self.model)
            self.inputs = self._observation.inputs
            self.voice.note(f"example input: {self.inputs.origin} (--input sets another)")
        return self._observation

    def on(self, inputs: Inputs) -> None:
        """Go on on these inputs."""
        self.inputs, self._observation = inputs, None

    def known_inputs(self) -> Inputs:
        """The example inputs, which are found by observing the model where they are not known."""
        if self.inputs is None:
            self.observe()
        return self.example

    def shapes(self) -> tuple[str, ...]:
        """The example inputs as `--input` takes them, where it can."""
        return texts_of(self.inputs) if self.inputs is not None else ()


def open_session(
    voice: Voice, model: str | None, options: LoadOptions, *, stand_ins: bool = False
) -> Session:
    """Load MODEL, or what the last command in this folder wrote.

    With `stand_ins`, also one whose classes are not here, to be looked at and not run.
    """
    from bntool.files.memory import last_output, recall

    record: Record | None
    if model is None:
        record = last = last_output(Path.cwd())
        name = os.path.relpath(last.output)
        voice.tell(f"using {name}, written by the last bntool {last.command} here")
    else:
        record, name = recall(Path.cwd()), model
    ours = record if record is not None and same_file(name, record.output) else None
    asked = options
    if ours is not None:
        asked = dataclasses.replace(options, arch=options.arch or ours.arch, key=options.key or ours.key)
    loaded, plans = load_granted(name, record, asked, voice, stand_ins=stand_ins)
    voice.target.read(*loaded.files, *map(sidecar_path, loaded.files))
    for text in loaded.notes:
        voice.note(text)
    shapes = options.inputs or (ours.input_shapes if ours else ())
    inputs = parse_inputs(shapes, loaded.module, options.seed) if shapes else loaded.example_inputs
    session = Session(voice, loaded, inputs, options.seed, record, plans)
    if ours is not None and ours.source:
        session.baseline = ours.source
        session.baseline_load = LoadOptions(
            arch=ours.arch, weights=ours.weights, key=ours.key, pretrained=ours.pretrained
        )
    return session


def same_file(a: str, b: str) -> bool:
    """Whether two names are of one file that is there."""
    try:
        return Path(a).samefile(b)
    except OSError:
        return False
