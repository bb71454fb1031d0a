"""What a command of the command line can be asked besides: what it loads, where it writes, how it speaks."""

from __future__ import annotations

import dataclasses
import re

from bntool.core.errors import UsageError
from bntool.core.limits import DEFAULT_MAX_SIZE, parse_size
from bntool.core.option import Options, option


def _positive_numbers(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise UsageError(f"{text!r} is not like 1,8,32")
    return tuple(dict.fromkeys(int(n) for n in text.split(",")))


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


@dataclasses.dataclass(frozen=True)
class ModelOptions(Options):
    """What is worked on: a file or a reference; without one, what the last command in this folder wrote."""

    model: str | None = option(None, "", argument=True, names="file")


@dataclasses.dataclass(frozen=True)
class LoadOptions(Options):
    """How a model is loaded, and what it is run on."""

    arch: str | None = option(
        None, "Class of a bare state_dict: torchvision:resnet50, …; auto finds one.", metavar="REF"
    )
    weights: str | None = option(
        None, "Weights for a model named by reference.", metavar="FILE", names="file"
    )
    key: str | None = option(None, "Entry of a checkpoint that holds the weights.", metavar="KEY")
    allow: tuple[str, ...] = option(
        (), "A layer or enum of a pickled model that you trust, or all of a package: pkg.*.", metavar="CLASS"
    )
    trust_pickle: bool = option(False, "Run the code in the file. Only for files you trust.")
    max_size: int = option(
        DEFAULT_MAX_SIZE,
        "The most memory a file may ask for, such as 40G (default: 16G).",
        metavar="SIZE",
        parse=parse_size,
        show_default=False,
    )
    pretrained: bool = option(False, "Download the weights of torchvision: or timm:.")
    inputs: tuple[str, ...] = option(
        (), "Shape of an example input; repeat for several.", "--input", metavar="[NAME:]1x3x224x224[:TYPE]"
    )
    seed: int = option(0, "Seed of whatever is random.", metavar="N", least=0, most=2**63 - 1)


@dataclasses.dataclass(frozen=True)
class RealOptions(Options):
    """Inputs of the user's own, instead of drawn ones."""

    inputs_file: str | None = option(
        None,
        "Real inputs instead of drawn ones: an .npy, .npz or .pt file, an array for each input.",
        "--inputs",
        metavar="FILE",
        names="file",
    )


@dataclasses.dataclass(frozen=True)
class FileOptions(Options):
    """How an ONNX file is read."""

    freeze_inputs: bool = option(False, "Weights that an ONNX file lists among its inputs become constants.")
    run: bool = option(True, "With --check none: an ONNX file is read by inference alone, and never run.")


@dataclasses.dataclass(frozen=True)
class WriteOptions(Options):
    """Where the result goes."""

    output: str | None = option(
        None, "Output file.", "-o", "--output", metavar="FILE", names="file", written=True
    )
    force: bool = option(False, "Replace outputs that exist.")
    dry_run: bool = option(False, "Show what would be done; write nothing.")


@dataclasses.dataclass(frozen=True)
class DataOptions(Options):
    """Where data comes from, and how it is cut and scaled."""

    data: str | None = option(
        None,
        "An .npy, .npz, .pt, .parquet or .tar file, a folder of images, or pkg.mod:loader.",
        metavar="DATA",
        names="file",
    )
    batch_size: int = option(32, "Samples in a batch.", least=1)
    limit: int | None = option(None, "At most N batches (default: all).", "--batches", metavar="N", least=1)
    samples: int | None = option(
        None, "At most N samples, drawn by the seed (default: all).", "--limit", metavar="N", least=1
    )
    shuffle: bool = option(True, "Take the samples in the order in which they lie.")
    split: str | None = option(
        None, "Part of the data: train (default, where there are parts), val, …, all.", metavar="NAME"
    )
    files: tuple[str, ...] = option(
        (), "Only images whose path below the folder, or name, fits.", "--include", metavar="GLOB"
    )
    columns: tuple[str, ...] = option(
        (),
        "Of parquet, tar or a Hugging Face data set: the column of the input, and of the labels.",
        metavar="INPUT[,LABEL]",
        parse=_names,
    )
    mean: str | None = option(
        None, "Mean of each channel, taken off images in 0..1; or imagenet, …", metavar="R,G,B"
    )
    std: str | None = option(None, "Standard deviation of each channel of images in 0..1.", metavar="R,G,B")
    resize: int | None = option(
        None,
        "Shorter side of an image before its middle is cut out (default: as the input).",
        metavar="N",
        least=1,
    )


@dataclasses.dataclass(frozen=True)
class BenchOptions(Options):
    """How long to time, and on what."""

    batch_sizes: tuple[int, ...] = option(
        (1, 8), "Batch sizes to time.", metavar="1,8,32", parse=_positive_numbers
    )
    rounds: int = option(
        30, "Samples of each model; fewer where a batch size takes over 20 s.", metavar="N", least=11
    )


@dataclasses.dataclass(frozen=True)
class JobOptions(Options):
    """What the processes of torchrun share."""

    timeout: float = option(
        600.0,
        "How long the processes of torchrun wait for each other.",
        metavar="SECONDS",
        least=1e-3,
        most=1e6,
    )


@dataclasses.dataclass(frozen=True)
class ReportOptions(Options):
    """What is drawn besides."""

    report: str | None = option(
        None,
        "Draw what was found as an HTML file too.",
        metavar="FILE.html",
        names="file",
        written=True,
    )


COLUMNS = tuple(
    "type name input output kernel params percent trainable frozen buffers mult-adds bytes".split()
)
"""What a summary can show of a layer."""


def _columns(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in COLUMNS:
            raise UsageError(
                f"there is no column {name!r}; there are {','.join(COLUMNS)}",
                next_step=f"name some of {','.join(COLUMNS)}",
            )
    return names


def _column(text: str) -> str:
    (name, *more) = _columns(text)
    if more:
        raise UsageError("a table is sorted by one column", next_step=f"name one: {name}")
    return name


@dataclasses.dataclass(frozen=True)
class ViewOptions(Options):
    """What of a summary is shown, and in which order."""

    depth: int | None = option(
        None, "Down to so many levels of modules; the last stand for what they hold.", metavar="N", least=0
    )
    columns: tuple[str, ...] = option(
        ("type", "name", "input", "output", "trainable", "frozen", "buffers"),
        f"Of {', '.join(COLUMNS)}.",
        metavar="NAME,NAME,...",
        parse=_columns,
    )
    sort: str | None = option(None, "By this column, the largest first.", metavar="NAME", parse=_column)
    tree: bool = option(False, "As the tree of its modules.")

    def validate(self) -> None:
        super().validate()
        _columns(",".join(self.columns))
        if self.sort is not None:
            _column(self.sort)
        if self.tree and self.sort is not None:
            raise UsageError("a tree has an order of its own", next_step="leave out --sort, or --tree")


@dataclasses.dataclass(frozen=True)
class SpeechOptions(Options):
    """How a command speaks."""

    as_json: bool = option(False, "One JSON document on stdout.", "--json")
    quiet: bool = option(False, "Only the totals.", "-q", "--quiet")
    verbose: bool = option(False, "Every layer.", "-v", "--verbose")
    width: int | None = option(
        None,
        "Columns that text is fitted to; names stay whole.",
        "-w",
        "--width",
        metavar="N",
        least=1,
        most=100_000,
    )
    debug: bool = option(False, "Show the traceback of an error.")
