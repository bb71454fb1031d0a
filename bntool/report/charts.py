"""The charts of what was done to a model: its parameters, its BatchNorms, the checks, the time of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from bntool.report import drawing
from bntool.report.drawing import Spec

LEAST_VARIANCE = 1e-12
_MOST_BARS = 30
_ROOM = 0.45
_SMALLEST = 1e-18
"""Stands for an error of exactly 0 on a logarithmic axis."""


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
    return drawing.chart(
        rows,
        height=18 * len(rows),
        mark={"type": "bar", "height": {"band": 0.8}},
        encoding={
            "y": drawing.names(field="what"),
            "yOffset": {"field": "side", "sort": None},
            "x": {"field": "numbers", "type": "quantitative", "title": "numbers", "axis": drawing.si()},
            "color": drawing.coloured("side", ["before", "after"]),
            "tooltip": drawing.told(what="", side="", numbers=","),
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
    """The layers whose own parameters changed most, by their names now, and the rest as one row.

    The rows sum to the change of the whole. `key_map`: old tensor name -> new.
    """
    moved = {old.rpartition(".")[0]: new.rpartition(".")[0] for old, new in key_map.items()}
    sides: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
    for side, found, names_now in zip(sides, (before, after), (moved, {}), strict=True):
        for row in found["layers"]:
            if row["parameters"]:
                name = str(row["name"])
                side[names_now.get(name, name)] += int(row["parameters"])
    longer, shorter = (sides[0], sides[1]) if len(sides[0]) > len(sides[1]) else (sides[1], sides[0])
    names = dict.fromkeys([*longer, *shorter])
    changes = {name: sides[1].get(name, 0) - sides[0].get(name, 0) for name in names}
    most = sorted((n for n in names if changes[n]), key=lambda n: -abs(changes[n]))
    shown, rest = set(most[:_MOST_BARS]), most[_MOST_BARS:]
    rows = [{"what": name, "change": changes[name]} for name in names if name in shown]
    if rest:
        rows.append({"what": f"and {len(rest)} more", "change": sum(changes[name] for name in rest)})
    return _signed_bars(rows, "change in parameters") if rows else None


def _signed_bars(rows: list[dict[str, Any]], title: str) -> Spec:
    ends = [0, *(row["change"] for row in rows)]
    room = _ROOM * (max(ends) - min(ends))  # for the figure at the end of each bar, on a phone too
    domain = [min(ends) - room * (min(ends) < 0), max(ends) + room * (max(ends) > 0)]
    change: Spec = {"field": "change", "type": "quantitative", "title": title, "axis": drawing.si()}
    change["scale"] = {"domain": domain, "nice": False}
    y = drawing.names(field="what")
    bars: Spec = {
        "mark": "bar",
        "encoding": {"y": y, "x": change, "tooltip": drawing.told(what="", change="+,d")},
    }
    figures: list[Spec] = [
        {
            "transform": [{"filter": test}],
            "mark": {"type": "text", "baseline": "middle", "align": align, "dx": dx},
            "encoding": {"y": y, "x": change, "text": {"field": "change", "format": "+,d"}},
        }
        for test, align, dx in (("datum.change > 0", "left", 4), ("datum.change < 0", "right", -4))
    ]
    return drawing.chart(rows, height=22 * len(rows), layer=[bars, *figures])


def norms(figures: Sequence[Mapping[str, Any]]) -> Spec | None:
    """The scales of every BatchNorm, in the order they ran: range, middle half and median."""
    rows = _scales(figures)
    if not rows:
        return None
    x: Spec = {"field": "number", "type": "quantitative", "title": "BatchNorm, in order"}
    ticks = drawing.some([row["number"] for row in rows], 12)
    x |= {"axis": {**drawing.whole(), "values": ticks}, "scale": {"nice": False, "zero": False, "padding": 8}}
    told = drawing.told(
        name="", least=".3g", low=".3g", median=".3g", high=".3g", most=".3g", channels=",", dead=","
    )
    size = max(2, min(10, 500 // len(rows)))

    def y(field: str) -> Spec:
        return {"field": field, "type": "quantitative", "title": "scale s"}

    middle: Spec = {"type": "tick", "orient": "horizontal", "thickness": 2, "size": size}
    return drawing.chart(
        rows,
        height=200,
        encoding={"x": x, "tooltip": told},
        layer=[
            {"mark": "rule", "encoding": {"y": y("least"), "y2": {"field": "most"}}},
            {"mark": {"type": "bar", "size": size}, "encoding": {"y": y("low"), "y2": {"field": "high"}}},
            {"mark": middle, "encoding": {"y": y("median")}},
        ],
    )


def _scales(figures: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for number, norm in enumerate(figures, start=1):
        values = [v for v in norm.get("scale") or () if v is not None]
        if "scale" in norm and len({len(norm[key]) for key in ("scale", "shift", "variance")}) > 1:
            raise ValueError(f"the lists of {norm['name']} differ in length")
        if values:
            low, middle, high = drawing.quartiles(values)
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
    return rows


def channels(quantity: str) -> Spec:
    """Scale, shift or σ² of one BatchNorm, channel by channel; the page fills in the rows."""
    title = {
        "scale": "scale s = γ/√(σ²+ε)",
        "shift": "shift t = β − s·μ",
        "variance": "σ²",
    }[quantity]
    scale = {"type": "log"} if quantity == "variance" else {"zero": True}
    return drawing.chart(
        None,
        height=120,
        mark={"type": "point", "filled": True, "size": 16, "opacity": 0.9},
        encoding={
            "x": {
                "field": "channel",
                "type": "quantitative",
                "title": "channel",
                "axis": drawing.whole(),
            },
            "y": {
                "field": "value",
                "type": "quantitative",
                "title": title,
                "scale": scale,
                "axis": {"tickCount": 5, "grid": quantity != "variance"},
            },
            "tooltip": drawing.told(channel=",", value=".4g"),
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
    return drawing.chart(
        values,
        height=26 * len(rows),
        mark={"type": "point", "filled": True, "size": 90, "opacity": 1, "strokeWidth": 2},
        encoding={
            "y": drawing.names(field="check"),
            "x": {
                "field": "value",
                "type": "quantitative",
                "scale": {"type": "log"},
                "title": "relative to the peak; 1e-18 is 0",
                "axis": {"format": ".0e", "tickCount": 5, "labelOverlap": True},
            },
            "color": drawing.coloured("what", kinds),
            "shape": {"field": "what", "scale": scale, "title": None},
            "tooltip": drawing.told(check="", what="", exact=""),
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
    y = drawing.names(field="model")
    told = drawing.told(model="", median=".3g", low=".3g", high=".3g")
    return drawing.chart(
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
