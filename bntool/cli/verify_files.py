"""`bntool verify` where no torch model takes part: two ONNX files, or one against itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bntool.cli.session import Voice
from bntool.core.command_options import LoadOptions
from bntool.core.options import CheckOptions, PlaceOptions

if TYPE_CHECKING:
    from bntool.core.verdicts import Check
    from bntool.graph.inputs import Inputs
    from bntool.verifying.blaming import Found


def verify_files(
    voice: Voice,
    candidate: Path,
    reference: Path | None,
    load: LoadOptions,
    place: PlaceOptions,
    check: CheckOptions,
    inputs_file: str | None,
) -> tuple[list[Check], dict[str, Any]]:
    """The checks, and the document's part about blame; without `reference` the file is its own.

    Of `load` the shapes and the seed of the inputs are taken, unless `inputs_file` holds real ones.
    """
    from bntool.cli import blaming, devices, picturing
    from bntool.core.verdicts import first_failed
    from bntool.files.onnx_files import open_onnx
    from bntool.verifying.conditions import Conditions
    from bntool.verifying.onnx_verifying import check_files, check_itself

    for path in filter(None, (candidate, reference)):
        open_onnx(path)
    places = devices.require_places(place, onnx_too=True)
    inputs = _inputs(reference or candidate, load, inputs_file, full=check.check == "full")
    how = Conditions(places.onnx, check.tolerance, tf32=check.tf32 == "both")
    with voice.progress("comparing"):
        if reference is None:
            checks = check_itself(candidate, inputs, how)
        else:
            checks = check_files(reference, candidate, inputs, how)
    picturing.picture_onnx(voice, reference or candidate)
    failed = first_failed(checks)
    if failed is None:
        return checks, {}
    return checks, blaming.report(voice, lambda: _found(candidate, reference, inputs, failed), check.repro)


def _found(candidate: Path, reference: Path | None, inputs: list[Inputs], failed: Check) -> Found | None:
    from bntool.verifying.blaming import blame_files, blame_runtime, where_it_ran
    from bntool.verifying.onnx_verifying import LEVELS

    if failed.stage == "verify" and reference is not None:
        return blame_files(reference, candidate, inputs)
    return blame_runtime(
        candidate, inputs, device=where_it_ran(failed), optimize=LEVELS.get(failed.stage, True)
    )


def _inputs(path: Path, load: LoadOptions, inputs_file: str | None, *, full: bool) -> list[Inputs]:
    from bntool.cli.example_inputs import shapes_by_name
    from bntool.cli.real_inputs import read_inputs
    from bntool.files.onnx_files import open_onnx
    from bntool.observe.onnx_shapes import asked_shapes
    from bntool.runtime.onnx_inputs import SIDES, drawn_inputs
    from bntool.runtime.ort_runner import OrtRunner
    from bntool.verifying.onnx_verifying import seeded_file_inputs

    runner, told = OrtRunner(path, "cpu", optimize=False), asked_shapes(open_onnx(path).model)
    if inputs_file:
        return read_inputs(inputs_file, drawn_inputs(runner, 1, SIDES[0], load.seed, told), full=full)
    shapes: dict[str, Any] = {**told, **shapes_by_name(path, load.inputs, runner.input_names)}
    return seeded_file_inputs(path, (1, 2, 3) if full else (1,), load.seed, shapes)
