"""The charts of a report as Vega-Lite specifications: plain data, drawn by the browser or by vl-convert.

Names of layers stand only in data, never in an expression. Colours come from the theme alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Spec = dict[str, Any]

SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
VEGALITE = "6.4"
LEAST_VARIANCE = 1e-12
ARMS = {"plain": "as it is", "batchnorm": "with BatchNorm"}
_MOST_BARS = 30
_MOST_LAYERS = 16
_MOST_STEPS = 120
_ROOM = 0.45
_SMALLEST = 1e-18
"""Stands for an error of exactly 0 on a logarithmic axis."""


def theme(dark: bool) -> dict[str, Any]:
    """Colours that keep apart for people who do not see red or green as others do (Okabe & Ito 2008)."""
    ink, faint, line = ("#e8eaed", "#a9b1bd", "#3b4350") if dark else ("#1b1f24", "#57606a", "#d0d7de")
    colours = (
        ["#ff9e58", "#58b2f0", "#2fc79a", "#e29bc6"] if dark else ["#c84f00", "#0068a8", "#00795a", "#a8447f"]
    )
    text = {"labelColor": faint, "titleColor": faint, "labelFontSize": 12, "titleFontSize": 12}
    return {
        "background": "transparent" if dark else "white",
        "font": "system-ui, 'Liberation Sans', 'DejaVu Sans', sans-serif",
        "view": {"stroke": None},
        "mark": {"color": colours[1]},
        "bar": {"color": colours[1]},
        "rule": {"color": ink},
        "tick": {"color": ink},
        "text": {"color": ink, "fontSize": 12},
        "title": {"color": ink, "fontSize": 13, "anchor": "start", "fontWeight": 600},
        "axis": {**text, "gridColor": line, "domainColor": line, "tickColor": line, "titleFontWeight": 400},
        "legend": {
            **text,
            "orient": "top",
            "labelLimit": 240,
            "symbolOpacity": 1,
            "symbolBaseFillColor": ink,
            "symbolBaseStrokeColor": ink,
            "symbolStrokeColor": ink,
        },
        "header": {**text},
        "range": {"category": colours},
    }


def _chart(values: Sequence[Any] | None, width: Any = "container", **rest: Any) -> Spec:
    data: Any = {"name": "rows"} if values is None else {"name": "rows", "values": list(values)}
    return {
        "$schema": SCHEMA,
        "width": width,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "data": data,
        **rest,
        "params": [{"name": "name_length", "value": 28}, *rest.get("params", ())],
    }


def _names(**rest: Any) -> Spec:
    """An axis of names: of a long one the end is shown, which tells it from others. `name_length` is a
    parameter of every chart.
    """
    label = "length(datum.label) > name_length ? '…' + slice(datum.label, 1 - name_length) : datum.label"
    return {"type": "nominal", "sort": None, "title": None, "axis": {"labelExpr": label}, **rest}


def parameters(counts: Mapping[str, Any]) -> Spec | None:
    """Trainable, frozen and buffers, before and after."""
    rows = [
        {"what": what, "side": side, "numbers": int(counts[side][what])}
        for what in ("trainable", "frozen", "buffers")
        for side in ("before", "after")
        if counts["before"].get(what) or counts["after"].get(what)
    ]
    if not rows:
        return None
    return _chart(
        rows,
        height=18 * len(rows),
        mark={"type": "bar", "height": {"band": 0.8}},
        encoding={
            "y": _names(field="what"),
            "yOffset": {"field": "side", "sort": None},
            "x": {"field": "numbers", "type": "quantitative", "title": "numbers", "axis": _si()},
            "color": _coloured("side", ["before", "after"]),
            "tooltip": _told(what="", side="", numbers=","),
        },
    )


def delta(counts: Mapping[str, Any]) -> Spec | None:
    """What was added and taken away."""
    names = {
        "trainable": "trainable",
        "frozen": "frozen",
        "conv_bias": "of these biases",
        "buffers": "buffers",
    }
    changed = counts["delta"]
    rows = [{"what": text, "change": int(changed[key])} for key, text in names.items() if changed.get(key)]
    return _signed_bars(rows, "change in numbers") if rows else None


def delta_by_layer(
    before: Mapping[str, Any], after: Mapping[str, Any], key_map: Mapping[str, str]
) -> Spec | None:
    """The layers whose own parameters changed most, by their names now. `key_map`: old tensor name -> new."""
    moved = {old.rpartition(".")[0]: new.rpartition(".")[0] for old, new in key_map.items()}
    sides = [
        {str(r["name"]): int(r["parameters"]) for r in s["layers"] if r["parameters"]}
        for s in (before, after)
    ]
    sides[0] = {moved.get(name, name): number for name, number in sides[0].items()}
    longer, shorter = (sides[0], sides[1]) if len(sides[0]) > len(sides[1]) else (sides[1], sides[0])
    names = dict.fromkeys([*longer, *shorter])
    changes = {name: sides[1].get(name, 0) - sides[0].get(name, 0) for name in names}
    most = sorted((n for n in names if changes[n]), key=lambda n: -abs(changes[n]))[:_MOST_BARS]
    rows = [{"what": name, "change": changes[name]} for name in names if name in set(most)]
    return _signed_bars(rows, "change in parameters") if rows else None


def _signed_bars(rows: list[dict[str, Any]], title: str) -> Spec:
    ends = [0, *(row["change"] for row in rows)]
    room = _ROOM * (max(ends) - min(ends))  # for the figure at the end of each bar, on a phone too
    domain = [min(ends) - room * (min(ends) < 0), max(ends) + room * (max(ends) > 0)]
    change: Spec = {"field": "change", "type": "quantitative", "title": title, "axis": _si()}
    change["scale"] = {"domain": domain, "nice": False}
    y = _names(field="what")
    bars: Spec = {"mark": "bar", "encoding": {"y": y, "x": change, "tooltip": _told(what="", change="+,d")}}
    figures: list[Spec] = [
        {
            "transform": [{"filter": test}],
            "mark": {"type": "text", "baseline": "middle", "align": align, "dx": dx},
            "encoding": {"y": y, "x": change, "text": {"field": "change", "format": "+,d"}},
        }
        for test, align, dx in (("datum.change > 0", "left", 4), ("datum.change < 0", "right", -4))
    ]
    return _chart(rows, height=22 * len(rows), layer=[bars, *figures])


def norms(figures: Sequence[Mapping[str, Any]]) -> Spec | None:
    """The scales of every BatchNorm, in the order they ran: range, middle half and median."""
    rows = []
    for number, norm in enumerate(figures, start=1):
        values = [v for v in norm.get("scale") or () if v is not None]
        if "scale" in norm and len({len(norm[key]) for key in ("scale", "shift", "variance")}) > 1:
            raise ValueError(f"the lists of {norm['name']} differ in length")
        if values:
            low, middle, high = _quartiles(values)
            rows.append(
                {
                    "number": number,
                    "name": str(norm["name"]),
                    "least": min(values),
                    "low": low,
                    "median": middle,
                    "high": high,
                    "most": max(values),
                    "dead": int(norm["dead"] or 0),
                    "channels": int(norm["channels"] or 0),
                }
            )
    if not rows:
        return None
    x: Spec = {"field": "number", "type": "quantitative", "title": "BatchNorm, in order"}
    x |= {"axis": {"tickMinStep": 1, "grid": False}, "scale": {"nice": False, "padding": 8}}
    told = _told(
        name="", least=".3g", low=".3g", median=".3g", high=".3g", most=".3g", channels=",", dead=","
    )
    size = max(2, min(10, 500 // len(rows)))

    def y(field: str) -> Spec:
        return {"field": field, "type": "quantitative", "title": "scale s"}

    return _chart(
        rows,
        height=200,
        encoding={"x": x, "tooltip": told},
        layer=[
            {"mark": "rule", "encoding": {"y": y("least"), "y2": {"field": "most"}}},
            {"mark": {"type": "bar", "size": size}, "encoding": {"y": y("low"), "y2": {"field": "high"}}},
            {
                "mark": {
                    "type": "tick",
                    "orient": "horizontal",
                    "thickness": 2,
                    "size": size,
                },
                "encoding": {"y": y("median")},
            },
        ],
    )


def channels(quantity: str) -> Spec:
    """Scale, shift or σ² of one BatchNorm, channel by channel; the page fills in the rows."""
    title = {
        "scale": "scale s = γ/√(σ²+ε)",
        "shift": "shift t = β − s·μ",
        "variance": "σ²",
    }[quantity]
    scale = {"type": "log"} if quantity == "variance" else {"zero": True}
    return _chart(
        None,
        height=120,
        mark={"type": "point", "filled": True, "size": 16, "opacity": 0.9},
        encoding={
            "x": {
                "field": "channel",
                "type": "quantitative",
                "title": "channel",
                "axis": {"grid": False, "tickMinStep": 1},
            },
            "y": {
                "field": "value",
                "type": "quantitative",
                "title": title,
                "scale": scale,
                "axis": {"tickCount": 5, "grid": quantity != "variance"},
            },
            "tooltip": _told(channel=",", value=".4g"),
        },
    )


def checks(rows: Sequence[Mapping[str, Any]]) -> Spec | None:
    """Error, noise floor and limit of every check on one logarithmic axis."""
    kinds = ["error", "noise floor", "limit"]
    values = []
    for number, check in enumerate(rows, start=1):
        name = f"{number} {check['stage']} {check.get('precision') or ''}".strip()
        figures = (check["relative"], check["noise_floor"], check["limit"])
        values += [
            {"check": name, "what": kind, "value": max(float(v), _SMALLEST), "exact": f"{float(v):.3g}"}
            for kind, v in zip(kinds, figures, strict=True)
            if v is not None
        ]
    if not values:
        return None
    scale = {"domain": kinds, "range": ["circle", "diamond", "triangle-down"]}
    return _chart(
        values,
        height=26 * len(rows),
        mark={"type": "point", "filled": True, "size": 90, "opacity": 1, "strokeWidth": 2},
        encoding={
            "y": _names(field="check"),
            "x": {
                "field": "value",
                "type": "quantitative",
                "scale": {"type": "log"},
                "title": "relative to the peak; 1e-18 is 0",
                "axis": {"format": ".0e", "tickCount": 5, "labelOverlap": True},
            },
            "color": _coloured("what", kinds),
            "shape": {"field": "what", "scale": scale, "title": None},
            "tooltip": _told(check="", what="", exact=""),
        },
    )


def latency(found: Mapping[str, Any]) -> Spec | None:
    """The median time of every model at every batch size, and the middle half of the samples."""
    rows = [
        {
            "model": f"{row['name']}, batch {int(row['batch'])}",
            "median": 1e3 * row["median_seconds"],
            "low": 1e3 * row["quartiles_seconds"][0],
            "high": 1e3 * row["quartiles_seconds"][1],
        }
        for row in found["rows"]
    ]
    if not rows:
        return None
    y = _names(field="model")
    told = _told(model="", median=".3g", low=".3g", high=".3g")
    return _chart(
        rows,
        height=24 * len(rows),
        encoding={"y": y, "tooltip": told},
        layer=[
            {
                "mark": {"type": "bar", "height": {"band": 0.6}},
                "encoding": {
                    "x": {
                        "field": "median",
                        "type": "quantitative",
                        "title": "ms a run: median, middle half",
                        "axis": {"tickCount": 8, "labelOverlap": True},
                    }
                },
            },
            {
                "mark": {"type": "rule", "strokeWidth": 3},
                "encoding": {"x": {"field": "low", "type": "quantitative"}, "x2": {"field": "high"}},
            },
        ],
    )


def curves(data: Mapping[str, Any], quantity: str) -> Spec | None:
    """Loss or accuracy by epoch, each arm at its best rate; a band from the lowest to the highest repeat."""
    rows: list[dict[str, Any]] = []
    for arm, network in ARMS.items():
        rate = (data["arms"].get(arm) or {}).get("best_rate")
        runs = [r for r in data["runs"] if r["arm"] == arm and r["lr"] == rate and not r["diverged"]]
        for part, images in (("test", "test"), ("train", "training")):
            for epoch, found in _by_epoch(runs, f"{part}_{quantity}").items():
                scale = 100 if quantity == "accuracy" else 1
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
    if not rows:
        return None
    x = {
        "field": "epoch",
        "type": "quantitative",
        "title": "epoch",
        "axis": {"tickMinStep": 1, "grid": False},
    }
    is_log = quantity == "loss" and min(r["least"] for r in rows) > 0
    axis: Spec = {"type": "log"} if is_log else {"zero": False}
    title = "accuracy, %" if quantity == "accuracy" else "loss"
    y: Spec = {"type": "quantitative", "scale": axis, "title": title, "axis": {"grid": not is_log}}
    colour = _coloured("network", list(ARMS.values()))
    dash = {
        "field": "images",
        "scale": {"domain": ["test", "training"], "range": [[1, 0], [5, 4]]},
        "legend": {"symbolType": "stroke"},
        "title": None,
    }
    told = _told(network="", images="", epoch="", mean=".4g", least=".4g", most=".4g")
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
    return _chart(rows, height=220, layer=[*([band] if spread else []), line, points])


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
    layers = {layer or "(root)" for layer in _some(list(order), _MOST_LAYERS)}
    steps = set(_some(sorted({row["step"] for row in found}), _MOST_STEPS))
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

    return _chart(
        rows,
        height=34 * len({row["layer"] for row in rows}),
        params=[{"name": "at_step", "value": step}],
        transform=[{"filter": "datum.step === at_step"}],
        encoding={
            "y": _names(field="layer"),
            "yOffset": {"field": "network", "sort": None, "scale": {"domain": titles}},
            "color": _coloured("network", titles),
            "tooltip": _told(
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
    x = {"field": "step", "type": "quantitative", "title": "step", "axis": {"grid": False}}

    def y(field: str) -> Spec:
        return {"field": field, "type": "quantitative", "title": "1 to 99 %, quartiles, median"}

    return _chart(
        rows,
        height=220,
        params=[{"name": "of_layer", "value": layer}],
        transform=[{"filter": "datum.layer === of_layer"}],
        encoding={"x": x, "color": _coloured("network", titles)},
        layer=[
            {
                "mark": {"type": "area", "opacity": 0.2},
                "encoding": {"y": y("least"), "y2": {"field": "most"}},
            },
            {"mark": {"type": "area", "opacity": 0.4}, "encoding": {"y": y("low"), "y2": {"field": "high"}}},
            {
                "mark": {"type": "line", "strokeWidth": 2},
                "encoding": {"y": y("median"), "tooltip": _told(network="", step="", median=".3g")},
            },
        ],
    )


# -- pieces --------------------------------------------------------------------------------------------------


def _some(values: list[Any], most: int) -> list[Any]:
    """At most so many of them, evenly spread, the first and the last among them."""
    if len(values) <= most:
        return values
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def _coloured(field: str, domain: list[str]) -> Spec:
    return {"field": field, "type": "nominal", "scale": {"domain": domain}, "title": None}


def _told(**formats: str) -> list[Spec]:
    return [
        {"field": name, **({"format": form, "type": "quantitative"} if form else {"type": "nominal"})}
        for name, form in formats.items()
    ]


def _si() -> Spec:
    return {"format": "~s", "tickCount": 6, "labelOverlap": True}


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def _by_epoch(runs: Sequence[Mapping[str, Any]], key: str) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {}
    for run in runs:
        for epoch in run["history"]:
            if epoch.get(key) is not None:
                found.setdefault(int(epoch["epoch"]), []).append(float(epoch[key]))
    return found
