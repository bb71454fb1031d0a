"""`bntool bench`: parse, call, print."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bntool.cli.opening import is_onnx, of_session, open_model, require_one
from bntool.cli.options import takes
from bntool.cli.session import Session, Voice, open_session
from bntool.core.command_options import BenchOptions, LoadOptions, RealOptions, SpeechOptions
from bntool.core.option import Options, option
from bntool.core.options import PlaceOptions

if TYPE_CHECKING:
    from torch import nn

    from bntool.graph.inputs import Inputs


@dataclasses.dataclass(frozen=True)
class PairOptions(Options):
    """What is timed beside each other."""

    first: str = option("", "", metavar="A", argument=True, required=True, names="file")
    second: str = option("", "", metavar="B", argument=True, required=True, names="file")


@click.command("bench", short_help="Time two models beside each other.")
@takes(PairOptions, LoadOptions, RealOptions, BenchOptions, PlaceOptions, SpeechOptions)
def command(
    voice: Voice,
    pair: PairOptions,
    load: LoadOptions,
    real: RealOptions,
    bench: BenchOptions,
    place: PlaceOptions,
) -> int:
    """Time A and B on the same inputs and device: models, exported programs, ONNX files.

    They run in turn, so that a machine that slows down slows both. A difference is claimed only where the
    ratio of the two, round by round, lies beyond 2 % with a chance of 99.9 %.
    """
    from bntool.cli import devices, timing
    from bntool.results.latency import latency_text
    from bntool.runtime.benchmarking import Candidate

    require_one(real, load)
    names = (pair.first, pair.second)
    files = [name for name in names if is_onnx(name)]
    modules = [name for name in names if name not in files]
    places = devices.require_places(place, torch_too=bool(modules), onnx_too=bool(files))
    session = open_session(voice, modules[0], load) if modules else None
    inputs_of = _inputs_of(voice, session, files, load, real)
    candidates = []
    for name, label in zip(names, _labels(*names), strict=True):
        what: nn.Module | Path = Path(name)
        if name not in files and session is not None:
            what = _module(session.loaded.model if name == modules[0] else session.load_other(name, load))
        candidates.append(Candidate(label, what))
    found = timing.timed(voice, candidates, inputs_of, bench, places)
    voice.say(latency_text(found))
    voice.emit({"status": "ok", "latency": found.to_dict()})
    return 0


def _labels(first: str, second: str) -> tuple[str, str]:
    """Short names that tell the two apart."""
    a, b = Path(first).name, Path(second).name
    if a != b:
        return a, b
    return (f"{a} (A)", f"{b} (B)") if first == second else (first, second)


def _module(model: Any) -> nn.Module:
    from torch.export import ExportedProgram

    return model.module() if isinstance(model, ExportedProgram) else model


def _inputs_of(
    voice: Voice, session: Session | None, files: list[str], load: LoadOptions, real: RealOptions
) -> Callable[[int], Inputs | None]:
    from bntool.cli.real_inputs import file_inputs, session_inputs

    if real.inputs_file is not None:
        if session is None:
            return file_inputs(files[0], real.inputs_file, full=False)[0].of
        return session_inputs(session, real.inputs_file, full=False)[0].of
    opened = open_model(voice, files[0], load) if session is None else of_session(session)
    found: Callable[[int], Inputs | None] = opened.subject.batched(load.seed)
    return found
