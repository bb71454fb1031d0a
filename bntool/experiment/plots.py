"""The pictures of a comparison, drawn by matplotlib as PNG and SVG. The same figures give the same bytes."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bntool.core.errors import LoadError
from bntool.experiment.outcome import ARMS, TITLES, TrainingComparison
from bntool.files.atomic import write_atomically
from bntool.results.tables import shorten_middle

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Told apart by people who do not see red or green as others do, and in grey (Okabe & Ito 2008).
_COLOURS = {"plain": "#D55E00", "batchnorm": "#0072B2"}
_STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e5e5",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "svg.hashsalt": "bntool",
    "svg.fonttype": "none",
    "figure.dpi": 110,
}
_MOST_LAYERS = 8


def require_matplotlib() -> None:
    """Raise `LoadError` where matplotlib is not installed: better now than after the training."""
    try:
        import matplotlib.figure  # noqa: F401 - whether it is there
    except ImportError as error:
        raise LoadError(
            "plots need matplotlib, which is not installed", next_step="pip install 'bntool[compare]'"
        ) from error


def write_plots(found: TrainingComparison, folder: Path) -> list[Path]:
    """Draw every picture that there are figures for into `folder`; returns the files."""
    import matplotlib as mpl

    pictures: dict[str, Callable[[TrainingComparison], Figure | None]] = {
        "curves": curves,
        "distributions": distributions,
        "gradients": gradients,
        "rates": rates,
    }
    written = []
    with mpl.rc_context(_STYLE):
        for name, draw in pictures.items():
            figure = draw(found)
            for ending in ("png", "svg") if figure is not None else ():
                path = folder / f"{name}.{ending}"
                _write(figure, path, ending)
                written.append(path)
    return written


def curves(found: TrainingComparison) -> Figure | None:
    """Loss and accuracy by epoch, each arm at its best rate: test lines full, training lines dashed."""
    from matplotlib.ticker import MaxNLocator

    figure = _figure(7.4, 3.0)
    axes: Sequence[Axes] = figure.subplots(1, 2)
    panels = ((axes[0], "loss", 1.0, "loss"), (axes[1], "accuracy", 100.0, "accuracy, %"))
    for axis, key, scale, title in panels:
        for arm in found.finished:
            lr = found.best_rate(arm)
            for part, style in (("test", "-"), ("train", "--")):
                lists = [found.values(arm, lr, f"{part}_{key}", i) for i in range(found.settings.epochs)]
                known = [(i + 1, [scale * v for v in values]) for i, values in enumerate(lists) if values]
                at = [i for i, _ in known]
                mean = [statistics.fmean(values) for _, values in known]
                rate = f" (rate {lr:g})" if len(found.settings.lrs) > 1 else ""
                label = f"{TITLES[arm]}{rate}, {'test' if part == 'test' else 'training'}"
                axis.plot(at, mean, style, color=_COLOURS[arm], label=label, marker=".", markersize=4)
                low, high = ([ends(values) for _, values in known] for ends in (min, max))
                if low != high:
                    axis.fill_between(at, low, high, color=_COLOURS[arm], alpha=0.15, linewidth=0)
        _say_if_empty(axis, found.finished, "no run came to its end")
        axis.set_title(title, loc="left")
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set_yscale("log")
    repeats = found.settings.repeats
    _legend(
        figure,
        axes[0],
        2,
        f"mean of {repeats} runs, band from the lowest to the highest" if repeats > 1 else "",
    )
    return figure


def distributions(found: TrainingComparison) -> Figure | None:
    """What each activation reads, by step: median, quartiles, 1 and 99 %; and below, the dead channels."""
    layers = _layers(found, "values")
    if not layers:
        return None
    dead = any(_points(found, arm, layer, "dead")[1] for arm in ARMS for layer in layers)
    rows = 3 if dead else 2
    figure = _figure(1.5 + 1.15 * max(len(layers), 3), 0.7 + 1.35 * rows)
    grid = figure.subplots(rows, len(layers), sharex=True, squeeze=False)
    for column, layer in enumerate(layers):
        for row, arm in enumerate(ARMS):
            axis = grid[row][column]
            steps, bands = _points(found, arm, layer, "quantiles")
            lines = list(zip(*bands, strict=True)) if bands else [()] * 5
            colour = _COLOURS[arm]
            axis.fill_between(steps, lines[0], lines[4], color=colour, alpha=0.18, linewidth=0)
            axis.fill_between(steps, lines[1], lines[3], color=colour, alpha=0.38, linewidth=0)
            axis.plot(steps, lines[2], _style(steps), color=colour, linewidth=1.0)
            _say_if_empty(axis, steps, "nothing seen")
            axis.axhline(0, color="#666666", linewidth=0.5)
            axis.locator_params(axis="y", nbins=4)
        grid[0][column].set_title(shorten_middle(layer or "(root)", 13), loc="left")
        if dead:
            for arm in ARMS:
                steps, shares = _points(found, arm, layer, "dead")
                grid[2][column].plot(steps, [100 * s for s in shares], _style(steps), color=_COLOURS[arm])
            grid[2][column].set_ylim(-3, 103)
            if column:
                grid[2][column].set_yticklabels([])
    for row, arm in enumerate(ARMS):
        grid[row][0].set_ylabel(TITLES[arm])
    if dead:
        grid[2][0].set_ylabel("dead channels, %")
    _steps_axis(found, grid[-1])
    _keyed(figure, "what each layer's activation reads: 1 to 99 %, quartiles, median")
    return figure


def gradients(found: TrainingComparison) -> Figure | None:
    """The norm of each weight's gradient by step, both arms: the median of a window, and its quartiles."""
    layers = _layers(found, "gradients")
    if not layers:
        return None
    figure = _figure(1.5 + 1.15 * max(len(layers), 3), 2.3)
    grid = figure.subplots(1, len(layers), sharey=True, squeeze=False)[0]
    for axis, layer in zip(grid, layers, strict=True):
        for arm in ARMS:
            records = found.watched(arm).progress.records
            known = [(r["step"], norm) for r in records if (norm := r["gradients"].get(layer))]
            steps = [step for step, _ in known]
            low, middle, high = _rolling([norm for _, norm in known])
            axis.fill_between(steps, low, high, color=_COLOURS[arm], alpha=0.25, linewidth=0)
            axis.plot(steps, middle, _style(steps), color=_COLOURS[arm], linewidth=1.0)
        _say_if_empty(axis, [x for line in axis.lines for x in line.get_xdata()], "no gradient seen")
        axis.set_title(shorten_middle(layer or "(root)", 13), loc="left")
    if any(norm > 0 for axis in grid for line in axis.lines for norm in line.get_ydata()):
        grid[0].set_yscale("log")  # of all, for they share it; it cannot be of none
    grid[0].set_ylabel("norm of the gradient")
    _steps_axis(found, grid)
    _keyed(figure, "gradient of each layer's weight: median and quartiles of nine records")
    return figure


def rates(found: TrainingComparison) -> Figure | None:
    """The final test accuracy by learning rate; a cross where runs did not train. None for one rate."""
    if len(found.settings.lrs) < 2:
        return None
    figure = _figure(4.6, 3.0)
    axis: Axes = figure.subplots()
    ordered = sorted(found.settings.lrs)
    floor = 100 * min((run.history[-1]["majority"] for run in found.runs if run.history), default=0.0)
    for arm in ARMS:
        known = [(lr, figure_) for lr in ordered if (figure_ := found.figure(arm, lr, "test_accuracy"))]
        axis.errorbar(
            [lr for lr, _ in known],
            [100 * one.mean for _, one in known],
            yerr=[100 * (one.spread or 0.0) for _, one in known],
            color=_COLOURS[arm],
            marker="o",
            markersize=4,
            capsize=2,
            label=TITLES[arm],
        )
        lost = [lr for lr in ordered if not all(run.trains for run in found.of(arm, lr))]
        offset = 1.0 if arm == "plain" else 1.08
        axis.plot([lr * offset for lr in lost], [floor] * len(lost), "x", color=_COLOURS[arm])
    axis.set_xscale("log")
    axis.set_xticks(ordered, [f"{lr:g}" for lr in ordered])
    axis.minorticks_off()
    axis.set_xlabel("learning rate")
    axis.set_title("test accuracy after training, %   (x: a run did not train)", loc="left")
    axis.legend(loc="best")
    return figure


# -- pieces --------------------------------------------------------------------------------------------------


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _layers(found: TrainingComparison, kind: str) -> list[str]:
    """The layers of which both arms have records; of many, some from the first to the last."""
    seen = [
        {layer for record in found.watched(arm).progress.records for layer in record[kind]} for arm in ARMS
    ]
    order = [layer for record in found.watched("plain").progress.records[:1] for layer in record[kind]]
    layers = [layer for layer in order if layer in seen[0] & seen[1]]
    if len(layers) <= _MOST_LAYERS:
        return layers
    last = len(layers) - 1
    return [layers[round(i * last / (_MOST_LAYERS - 1))] for i in range(_MOST_LAYERS)]


def _points(found: TrainingComparison, arm: str, layer: str, key: str) -> tuple[list[int], list[Any]]:
    """Steps and values of one figure, without those that were no number."""
    pairs = [
        (record["step"], record["values"][layer][key])
        for record in found.watched(arm).progress.records
        if layer in record["values"]
    ]
    known = [(step, v) for step, v in pairs if v is not None and not (isinstance(v, list) and None in v)]
    return [step for step, _ in known], [value for _, value in known]


def _rolling(values: list[float], window: int = 9) -> tuple[list[float], list[float], list[float]]:
    """Lower quartile, median and upper quartile of the values around each."""
    low: list[float] = []
    middle: list[float] = []
    high: list[float] = []
    for i in range(len(values)):
        near = sorted(values[max(0, i - window // 2) : i + window // 2 + 1])
        for series, share in ((low, 0.25), (middle, 0.5), (high, 0.75)):
            series.append(near[math.floor(share * (len(near) - 1))])
    return low, middle, high


def _style(points: Sequence[Any]) -> str:
    """A line; a single point is drawn as one, of which a line would show nothing."""
    return "." if len(points) == 1 else "-"


def _say_if_empty(axis: Axes, points: Sequence[Any], text: str) -> None:
    """A panel without data says so: an empty one looks like a fault of the picture."""
    if not len(points):
        axis.text(0.5, 0.5, text, ha="center", transform=axis.transAxes, color="#666666")


def _steps_axis(found: TrainingComparison, axes: Sequence[Axes]) -> None:
    for axis in axes:
        axis.set_xlim(0, found.settings.epochs * found.steps_per_epoch)
        axis.locator_params(axis="x", nbins=3)
    axes[len(axes) // 2].set_xlabel("step")


def _keyed(figure: Figure, text: str) -> None:
    """The key of both arms, above everything."""
    from matplotlib.patches import Patch

    patches = [Patch(color=_COLOURS[arm], label=TITLES[arm]) for arm in ARMS]
    figure.legend(
        handles=patches, loc="outside upper left", ncols=2, title=text, title_fontsize=8, alignment="left"
    )


def _legend(figure: Figure, axis: Axes, columns: int, title: str) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside upper left",
        ncols=columns,
        title=title or None,
        title_fontsize=8,
        alignment="left",
    )


def _write(figure: Any, path: Path, ending: str) -> None:
    # Through memory, so that a file is whole or not there; without the date and the program that drew it.
    content = io.BytesIO()
    metadata: dict[str, Any] = {"Date": None} if ending == "svg" else {"Software": None}
    figure.savefig(content, format=ending, metadata=metadata, dpi=150)
    write_atomically(path, lambda temporary: _put(temporary, content.getvalue()), force=True)


def _put(path: Path, content: bytes) -> None:
    path.write_bytes(content)
