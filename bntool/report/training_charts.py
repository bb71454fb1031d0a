"""The charts of a training with and without BatchNorm: its curves, and what the activations read."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bntool.report import drawing
from bntool.report.drawing import Spec

ARMS = {"plain": "as it is", "batchnorm": "with BatchNorm"}
_MOST_LAYERS = 16
_MOST_STEPS = 120


def curves(data: Mapping[str, Any], quantity: str) -> Spec | None:
    """Loss or accuracy by epoch, each arm at its best rate; a band from the lowest to the highest repeat."""
    rows = _epochs(data, quantity)
    if not rows:
        return None
    x = {"field": "epoch", "type": "quantitative", "title": "epoch", "axis": drawing.whole()}
    is_log = quantity == "loss" and min(r["least"] for r in rows) > 0
    axis: Spec = {"type": "log"} if is_log else {"zero": False}
    title = "accuracy, %" if quantity == "accuracy" else "loss"
    y: Spec = {"type": "quantitative", "scale": axis, "title": title, "axis": {"grid": not is_log}}
    colour = drawing.coloured("network", list(ARMS.values()))
    dash = {
        "field": "images",
        "scale": {"domain": ["test", "training"], "range": [[1, 0], [5, 4]]},
        "legend": {"symbolType": "stroke"},
        "title": None,
    }
    told = drawing.told(network="", images="", epoch="", mean=".4g", least=".4g", most=".4g")
    band: Spec = {
        "mark": {"type": "area", "opacity": 0.2},
        "encoding": {
            "x": x,
            "y": {**y, "field": "least"},
            "y2": {"field": "most"},
            "color": colour,
            "detail": {"field": "images"},
        },
    }
    at: Spec = {"x": x, "y": {**y, "field": "mean"}, "color": colour}
    line: Spec = {"mark": {"type": "line", "strokeWidth": 2}, "encoding": {**at, "strokeDash": dash}}
    points: Spec = {
        "mark": {"type": "point", "filled": True, "size": 30, "opacity": 1},
        "encoding": {**at, "detail": {"field": "images"}, "tooltip": told},
    }
    spread = any(row["most"] > row["least"] for row in rows)
    return drawing.chart(rows, height=220, layer=[*([band] if spread else []), line, points])


def _epochs(data: Mapping[str, Any], quantity: str) -> list[dict[str, Any]]:
    scale = 100 if quantity == "accuracy" else 1
    rows: list[dict[str, Any]] = []
    for arm, network in ARMS.items():
        rate = (data["arms"].get(arm) or {}).get("best_rate")
        runs = [r for r in data["runs"] if r["arm"] == arm and r["lr"] == rate and not r["diverged"]]
        for part, images in (("test", "test"), ("train", "training")):
            for epoch, found in _by_epoch(runs, f"{part}_{quantity}").items():
                rows.append(
                    {
                        "epoch": epoch,
                        "network": network,
                        "images": images,
                        "mean": scale * statistics.fmean(found),
                        "least": scale * min(found),
                        "most": scale * max(found),
                    }
                )
    return rows


def watched_rows(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """By arm, layer and step, the quantiles of what each activation reads; of many layers or steps some."""
    watched = data.get("watched") or {}
    found = []
    order: dict[str, None] = {}
    for arm, title in ARMS.items():
        for record in watched.get(arm) or ():
            for layer, value in record["values"].items():
                bands = value["quantiles"]
                if len(bands) == 5 and None not in bands:
                    order.setdefault(str(layer))
                    names = ("least", "low", "median", "high", "most")
                    one = {"step": int(record["step"]), "layer": str(layer) or "(root)", "network": title}
                    found.append({**one, **dict(zip(names, map(float, bands), strict=True))})
    layers = {layer or "(root)" for layer in drawing.some(list(order), _MOST_LAYERS)}
    steps = set(drawing.some(sorted({row["step"] for row in found}), _MOST_STEPS))
    return [row for row in found if row["layer"] in layers and row["step"] in steps]


def distributions(rows: Sequence[Mapping[str, Any]], step: int) -> Spec:
    """What every activation reads at one step: 1 to 99 %, quartiles, median. `step` is a parameter."""
    titles = list(ARMS.values())
    edges = [float(r[k]) for r in rows for k in ("least", "most")]
    scale = {"domain": [min(edges), max(edges)], "type": "symlog", "constant": 1}

    def x(field: str) -> Spec:
        title = "what the activation reads"
        axis = {"tickCount": 7, "labelOverlap": True}
        return {"field": field, "type": "quantitative", "scale": scale, "title": title, "axis": axis}

    return drawing.chart(
        rows,
        height=34 * len({row["layer"] for row in rows}),
        params=[{"name": "at_step", "value": step}],
        transform=[{"filter": "datum.step === at_step"}],
        encoding={
            "y": drawing.names(field="layer"),
            "yOffset": {"field": "network", "sort": None, "scale": {"domain": titles}},
            "color": drawing.coloured("network", titles),
            "tooltip": drawing.told(
                layer="", network="", step="", least=".3g", low=".3g", median=".3g", high=".3g", most=".3g"
            ),
        },
        layer=[
            {
                "mark": {"type": "rule", "strokeWidth": 1.5},
                "encoding": {"x": x("least"), "x2": {"field": "most"}},
            },
            {"mark": {"type": "bar", "height": 9}, "encoding": {"x": x("low"), "x2": {"field": "high"}}},
            {
                "mark": {"type": "tick", "thickness": 2},
                "encoding": {"x": x("median"), "color": {"value": "black"}},
            },
        ],
    )


def over_training(rows: Sequence[Mapping[str, Any]], layer: str) -> Spec:
    """What one activation reads over the training, in both networks. `layer` is a parameter."""
    titles = list(ARMS.values())
    x = {"field": "step", "type": "quantitative", "title": "step", "axis": drawing.whole()}

    def y(field: str) -> Spec:
        return {"field": field, "type": "quantitative", "title": "1 to 99 %, quartiles, median"}

    return drawing.chart(
        rows,
        height=220,
        params=[{"name": "of_layer", "value": layer}],
        transform=[{"filter": "datum.layer === of_layer"}],
        encoding={"x": x, "color": drawing.coloured("network", titles)},
        layer=[
            {
                "mark": {"type": "area", "opacity": 0.2},
                "encoding": {"y": y("least"), "y2": {"field": "most"}},
            },
            {"mark": {"type": "area", "opacity": 0.4}, "encoding": {"y": y("low"), "y2": {"field": "high"}}},
            {
                "mark": {"type": "line", "strokeWidth": 2},
                "encoding": {"y": y("median"), "tooltip": drawing.told(network="", step="", median=".3g")},
            },
        ],
    )


def _by_epoch(runs: Sequence[Mapping[str, Any]], key: str) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {}
    for run in runs:
        for epoch in run["history"]:
            if epoch.get(key) is not None:
                found.setdefault(int(epoch["epoch"]), []).append(float(epoch[key]))
    return found
