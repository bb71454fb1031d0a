"""`bntool bench`: parse, call, print."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bntool.cli import options as opt
from bntool.cli.completing import files
from bntool.cli.onnx_file import is_onnx
from bntool.cli.session import Session, Voice, open_session

if TYPE_CHECKING:
    from torch import nn

    from bntool.inputs import Inputs


@click.command("bench", short_help="Time two models beside each other.")
@click.argument("first", metavar="A", callback=opt.not_empty, shell_complete=files)
@click.argument("second", metavar="B", callback=opt.not_empty, shell_complete=files)
@opt.loading_options()
@opt.bench_options()
@opt.device_option()
@opt.providers_option()
@opt.common_options()
def command(first: str, second: str, **options: Any) -> int:
    """Time A and B on the same inputs and device: models, exported programs, ONNX files.

    They run in turn, so that a machine that slows down slows both. A difference is claimed only where the
    middle halves of the samples do not overlap.
    """
    voice = Voice.of(options)
    from bntool.benchmarking import Candidate
    from bntool.cli import devices, timing
    from bntool.report.latency import latency_text

    files = [name for name in (first, second) if is_onnx(name)]
    modules = [name for name in (first, second) if name not in files]
    devices.require_places(options, torch_too=bool(modules), onnx_too=bool(files))
    session = open_session(voice, {**options, "model": modules[0]}) if modules else None
    inputs_of = _inputs_of(session, files, options["seed"])
    candidates = []
    for name, label in zip((first, second), _labels(first, second), strict=True):
        what: nn.Module | Path = Path(name)
        if name not in files and session is not None:
            what = _module(session.loaded.model if name == modules[0] else session.load_other(name, options))
        candidates.append(Candidate(label, what))
    found = timing.timed(voice, candidates, inputs_of, options)
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


def _inputs_of(session: Session | None, files: list[str], seed: int) -> Callable[[int], Inputs | None]:
    from bntool.benchmarking import rebatching
    from bntool.onnx_checking import example_inputs_of
    from bntool.program_folding import example_inputs_of as inputs_of_program

    if session is None:
        return lambda batch: example_inputs_of(files[0], batch, seed)
    if session.program is not None:
        return rebatching(inputs_of_program(session.program, seed), seed)
    session.observe()
    return rebatching(session.example, seed)
