"""Options that several commands share, by the names of the design."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import click

from bntool.cli.completing import files, folders
from bntool.errors import UsageError

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def _all(*decorators: Any) -> Decorator:
    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


def not_empty(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """An empty name is a shell variable that was never set, not a name left out."""
    if value is not None and not value.strip():
        raise click.BadParameter("it is empty", ctx, param)
    return value


def none_empty(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    for value in values:
        not_empty(ctx, param, value)
    return values


def device(ctx: click.Context, param: click.Parameter, value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        raise click.BadParameter(f"{value!r} is not auto, cpu or cuda", ctx, param)
    return value


def _tolerance(ctx: click.Context, param: click.Parameter, value: float | None) -> float | None:
    if value is not None and not 0 <= value < math.inf:
        raise click.BadParameter(f"{value} is not a number from 0 up", ctx, param)
    return value


def _seed(ctx: click.Context, param: click.Parameter, value: int) -> int:
    if not 0 <= value < 2**63:
        raise click.BadParameter(f"{value} is not a number from 0 to 2^63 - 1", ctx, param)
    return value


def output_option() -> Decorator:
    return click.option(
        "-o", "--output", metavar="FILE", callback=not_empty, shell_complete=files, help="Output file."
    )


def model_options() -> Decorator:
    """What names a model and how it may be loaded."""
    return _all(
        click.argument("model", required=False, metavar="[MODEL]", callback=not_empty, shell_complete=files),
        loading_options(),
    )


def loading_options() -> Decorator:
    """How a model may be loaded, and what it is run on."""
    return _all(
        click.option(
            "--arch",
            metavar="REF",
            help="Class of a bare state_dict: torchvision:resnet50, …; auto finds one.",
        ),
        click.option(
            "--weights", metavar="FILE", shell_complete=files, help="Weights for a model named by reference."
        ),
        click.option("--key", metavar="KEY", help="Entry of a checkpoint that holds the weights."),
        click.option(
            "--allow",
            multiple=True,
            metavar="CLASS",
            help="A layer or enum of a pickled model that you trust, or all of a package: pkg.*.",
        ),
        click.option(
            "--trust-pickle", is_flag=True, help="Run the code in the file. Only for files you trust."
        ),
        max_size_option(),
        click.option("--pretrained", is_flag=True, help="Download the weights of torchvision: or timm:."),
        click.option(
            "--input",
            "inputs",
            multiple=True,
            metavar="[NAME:]1x3x224x224",
            help="Shape of an example input; repeat for several.",
        ),
        click.option(
            "--seed",
            type=int,
            default=0,
            show_default=True,
            callback=_seed,
            metavar="N",
            help="Seed of whatever is random.",
        ),
    )


def _size(ctx: click.Context, param: click.Parameter, value: str | None) -> int:
    from bntool.files.limits import DEFAULT_MAX_SIZE, parse_size

    try:
        return DEFAULT_MAX_SIZE if value is None else parse_size(value)
    except UsageError as error:
        raise click.BadParameter(error.what, ctx, param) from error


def max_size_option() -> Decorator:
    return click.option(
        "--max-size",
        metavar="SIZE",
        callback=_size,
        help="The most memory a file may ask for, such as 40G (default: 16G).",
    )


def _batch_sizes(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", value):
        raise click.BadParameter(f"{value!r} is not like 1,8,32", ctx, param)
    return tuple(dict.fromkeys(int(n) for n in value.split(",")))


def bench_options() -> Decorator:
    """How long to time, and on what."""
    return _all(
        click.option(
            "--batch-sizes",
            default="1,8",
            show_default=True,
            callback=_batch_sizes,
            metavar="1,8,32",
            help="Batch sizes to time.",
        ),
        click.option(
            "--rounds",
            type=click.IntRange(min=7),
            default=30,
            show_default=True,
            metavar="N",
            help="Samples of each model; fewer where a batch size takes over 20 s.",
        ),
    )


def output_options() -> Decorator:
    """Where the result goes."""
    return _all(
        output_option(),
        click.option("--force", is_flag=True, help="Replace outputs that exist."),
        click.option("--dry-run", is_flag=True, help="Show what would be done; write nothing."),
    )


def check_option() -> Decorator:
    return click.option(
        "--check",
        type=click.Choice(["full", "fast", "none"]),
        default="full",
        show_default=True,
        help="How much to verify: batches 1, 2, 3; one; or nothing.",
    )


def tolerance_options() -> Decorator:
    meanings = {
        "--atol": "Absolute tolerance instead of the noise floor.",
        "--rtol": "Tolerance relative to the peak, instead of the noise floor.",
    }
    return _all(
        *(click.option(n, type=float, callback=_tolerance, help=meaning) for n, meaning in meanings.items())
    )


def repro_option() -> Decorator:
    return click.option(
        "--repro",
        metavar="DIR",
        callback=not_empty,
        shell_complete=folders,
        help="On a mismatch: write what shows it by itself into a new folder.",
    )


def report_option() -> Decorator:
    return click.option(
        "--report",
        metavar="FILE.html",
        callback=not_empty,
        shell_complete=files,
        help="Draw what was found as an HTML file too.",
    )


def device_option() -> Decorator:
    return click.option(
        "--device",
        default="auto",
        show_default=True,
        callback=device,
        metavar="auto|cpu|cuda",
        help="Where to verify. cuda that cannot run is an error.",
    )


def _providers(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...]:
    names = tuple(name.strip() for name in value.split(",")) if value is not None else ()
    if not all(names):
        raise click.BadParameter(f"{value!r} holds an empty name", ctx, param)
    return tuple(dict.fromkeys(names))


def providers_option() -> Decorator:
    return click.option(
        "--providers",
        callback=_providers,
        metavar="NAME,NAME",
        help="Where ONNX Runtime runs, by its own names: CUDAExecutionProvider, …; the first is proved.",
    )


def tf32_option() -> Decorator:
    return click.option(
        "--tf32",
        type=click.Choice(["off", "both"]),
        default="off",
        show_default=True,
        help="both: one row more with TF32 on, for information. It needs an NVIDIA GPU.",
    )


def _dynamic(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, list[int]]:
    """`NAME:0,2,3` for each; without a name it is the only input's."""
    found: dict[str, list[int]] = {}
    for text in values:
        match = re.fullmatch(r"(?:(?P<name>[^:]+):)?(?P<axes>\d+(?:,\d+)*)", text.strip())
        if match is None:
            raise click.BadParameter(f"{text!r} is not like input:0,2,3", ctx, param)
        found.setdefault(match["name"] or "input", []).extend(int(n) for n in match["axes"].split(","))
    return found


def export_options() -> Decorator:
    """What the ONNX file is to be like."""
    return _all(
        click.option("--opset", type=int, help="ONNX opset (default: the lowest that works)."),
        click.option("--ir-version", type=int, help="IR version (default: the lowest for the opset)."),
        click.option("--static-batch", is_flag=True, help="Fix the batch size in the ONNX file."),
        click.option(
            "--dynamic",
            multiple=True,
            callback=_dynamic,
            metavar="NAME:0,2,3",
            help="Axes of an input to leave open besides the batch; repeat for several inputs.",
        ),
        click.option(
            "--external-data",
            type=click.Choice(["auto", "always", "never"]),
            default="auto",
            show_default=True,
            help="Weights in one file beside the model; auto: above 1.8 GiB.",
        ),
        click.option("--keep-io", is_flag=True, help="With --dtype: inputs and outputs stay float32."),
        click.option(
            "--exporter",
            type=click.Choice(["dynamo", "legacy"]),
            default="dynamo",
            show_default=True,
            help="torch's exporter; legacy traces, for what torch.export cannot take.",
        ),
        click.option(
            "--keep-unverified",
            is_flag=True,
            help="Keep a file that fails its check as NAME.unverified.onnx.",
        ),
    )


def pattern_options() -> Decorator:
    return _all(
        click.option("--include", multiple=True, metavar="GLOB", help="Only layers with these names."),
        click.option("--exclude", multiple=True, metavar="GLOB", help="Leave out layers with these names."),
    )


def common_options() -> Decorator:
    """How the command speaks."""
    return _all(
        click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout."),
        click.option("-q", "--quiet", is_flag=True, help="Only the totals."),
        click.option("-v", "--verbose", is_flag=True, help="Every layer."),
        click.option("--debug", is_flag=True, help="Show the traceback of an error."),
    )


def job_option() -> Decorator:
    return click.option(
        "--timeout",
        type=click.FloatRange(min=0, min_open=True, max=1e6),
        default=600.0,
        show_default=True,
        metavar="SECONDS",
        help="How long the processes of torchrun wait for each other.",
    )


def data_options(*, required: bool) -> Decorator:
    """Where data comes from, and how it is cut and scaled."""
    return _all(
        click.option(
            "--data",
            required=required,
            metavar="DATA",
            shell_complete=files,
            help="An .npy, .npz or .pt file, a folder of images, or pkg.mod:loader.",
        ),
        click.option("--batch-size", type=int, default=32, show_default=True, help="Samples in a batch."),
        click.option("--batches", "limit", type=int, metavar="N", help="At most N batches (default: all)."),
        click.option("--mean", metavar="R,G,B", help="Mean of each channel, taken off images in 0..1."),
        click.option("--std", metavar="R,G,B", help="Standard deviation of each channel of images in 0..1."),
    )
