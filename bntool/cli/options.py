"""Options that several commands share, by the names of the design."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import click

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


def device(ctx: click.Context, param: click.Parameter, value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        raise click.BadParameter(f"{value!r} is not auto, cpu or cuda", ctx, param)
    return value


def _tolerance(ctx: click.Context, param: click.Parameter, value: float | None) -> float | None:
    if value is not None and not 0 <= value < math.inf:
        raise click.BadParameter(f"{value} is not a number from 0 up", ctx, param)
    return value


def output_option() -> Decorator:
    return click.option("-o", "--output", metavar="FILE", callback=not_empty, help="Output file.")


def model_options() -> Decorator:
    """What names a model and how it may be loaded."""
    return _all(
        click.argument("model", required=False, metavar="[MODEL]", callback=not_empty),
        click.option("--arch", metavar="REF", help="Class of a bare state_dict: torchvision:resnet50, …"),
        click.option("--weights", metavar="FILE", help="Weights for a model named by reference."),
        click.option("--key", metavar="KEY", help="Entry of a checkpoint that holds the weights."),
        click.option(
            "--allow", multiple=True, metavar="CLASS", help="A class of a pickled model that you trust."
        ),
        click.option(
            "--trust-pickle", is_flag=True, help="Run the code in the file. Only for files you trust."
        ),
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
            type=click.IntRange(0, 2**63 - 1),
            default=0,
            show_default="0",
            metavar="N",
            help="Seed of whatever is random.",
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


def device_option() -> Decorator:
    return click.option(
        "--device",
        default="auto",
        show_default=True,
        callback=device,
        metavar="auto|cpu|cuda",
        help="Where to verify. cuda that cannot run is an error.",
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


def data_options(*, required: bool) -> Decorator:
    """Where data comes from, and how it is cut and scaled."""
    return _all(
        click.option(
            "--data",
            required=required,
            metavar="DATA",
            help="An .npy, .npz or .pt file, a folder of images, or pkg.mod:loader.",
        ),
        click.option("--batch-size", type=int, default=32, show_default=True, help="Samples in a batch."),
        click.option("--batches", "limit", type=int, metavar="N", help="At most N batches (default: all)."),
        click.option("--mean", metavar="R,G,B", help="Mean of each channel, taken off images in 0..1."),
        click.option("--std", metavar="R,G,B", help="Standard deviation of each channel of images in 0..1."),
    )
