"""`bntool verify` where no torch model takes part: two ONNX files, or one against itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bntool.cli.session import Voice
from bntool.errors import UsageError

if TYPE_CHECKING:
    from bntool.blaming import Found
    from bntool.inputs import Inputs
    from bntool.verdicts import Check


def verify_files(
    voice: Voice, candidate: Path, reference: Path | None, options: dict[str, Any]
) -> tuple[list[Check], dict[str, Any]]:
    """The checks, and the document's part about blame; without `reference` the file is its own."""
    from bntool.cli import blaming, devices, picturing
    from bntool.onnx_files import open_onnx
    from bntool.onnx_verifying import check_files, check_itself
    from bntool.verdicts import first_failed

    for path in filter(None, (candidate, reference)):
        open_onnx(path)
    devices.require_places(options, onnx_too=True)
    inputs = _inputs(reference or candidate, options)
    common: dict[str, Any] = {"device": options["onnx_device"], "tf32": options["tf32"] == "both"}
    common |= {name: options[name] for name in ("atol", "rtol")}
    with voice.progress("comparing"):
        if reference is None:
            checks = check_itself(candidate, inputs, **common)
        else:
            checks = check_files(reference, candidate, inputs, **common)
    picturing.picture_onnx(voice, reference or candidate)
    failed = first_failed(checks)
    if failed is None:
        return checks, {}
    return checks, blaming.report(voice, lambda: _found(candidate, reference, inputs, failed), options)


def _found(candidate: Path, reference: Path | None, inputs: list[Inputs], failed: Check) -> Found | None:
    from bntool.blaming import blame_files, blame_runtime, where_it_ran
    from bntool.onnx_verifying import LEVELS

    if failed.stage == "verify" and reference is not None:
        return blame_files(reference, candidate, inputs)
    return blame_runtime(
        candidate, inputs, device=where_it_ran(failed), optimize=LEVELS.get(failed.stage, True)
    )


def _inputs(path: Path, options: dict[str, Any]) -> list[Inputs]:
    from bntool.cli.real_inputs import read_inputs
    from bntool.onnx_checking import SIDES, drawn_inputs
    from bntool.onnx_verifying import seeded_file_inputs
    from bntool.runtime.ort_runner import OrtRunner

    full = options["check"] == "full"
    if options["inputs_file"]:
        like = drawn_inputs(OrtRunner(path, "cpu", optimize=False), 1, SIDES[0], options["seed"])
        return read_inputs(options["inputs_file"], like, full=full)
    shapes = _shapes(path, options["inputs"])
    return seeded_file_inputs(path, (1, 2, 3) if full else (1,), options["seed"], shapes)


def _shapes(path: Path, texts: tuple[str, ...]) -> dict[str, list[int]]:
    """`--input` by the names of the file's inputs, those without a name in order."""
    from bntool.cli.example_inputs import read_shape
    from bntool.runtime.ort_runner import OrtRunner

    names = list(OrtRunner(path, "cpu", optimize=False).input_names) if texts else []
    found: dict[str, list[int]] = {}
    for text in texts:
        given, shape = read_shape(text)
        name = given or next((n for n in names if n not in found), "")
        if name not in names:
            raise UsageError(
                f"--input {text}: the file takes no such input",
                where=str(path),
                next_step=f"its inputs are {', '.join(names)}",
            )
        found[name] = shape
    return found
