"""What all charts of a report are made of: Vega-Lite specifications as plain data, in colours of one theme.

They are drawn by the browser or by vl-convert. Names of layers stand only in data, never in an expression.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

Spec = dict[str, Any]

SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
VEGALITE = "6.4"


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


def chart(values: Sequence[Any] | None, width: Any = "container", **rest: Any) -> Spec:
    data: Any = {"name": "rows"} if values is None else {"name": "rows", "values": list(values)}
    return {
        "$schema": SCHEMA,
        "width": width,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "data": data,
        **rest,
        "params": [{"name": "name_length", "value": 28}, *rest.get("params", ())],
    }


def names(**rest: Any) -> Spec:
    """An axis of names: of a long one the end is shown, which tells it from others. `name_length` is a
    parameter of every chart.
    """
    label = "length(datum.label) > name_length ? '…' + slice(datum.label, 1 - name_length) : datum.label"
    return {"type": "nominal", "sort": None, "title": None, "axis": {"labelExpr": label}, **rest}


def some(values: list[Any], most: int) -> list[Any]:
    """At most so many of them, evenly spread, the first and the last among them."""
    if len(values) <= most:
        return values
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def coloured(field: str, domain: list[str]) -> Spec:
    return {"field": field, "type": "nominal", "scale": {"domain": domain}, "title": None}


def told(**formats: str) -> list[Spec]:
    return [
        {"field": name, **({"format": form, "type": "quantitative"} if form else {"type": "nominal"})}
        for name, form in formats.items()
    ]


def si() -> Spec:
    """An axis of counts: no tick lies between two whole ones."""
    zero = "datum.value === 0 ? '0' : datum.label"  # which else is 0k or 0M
    return {"format": "~s", "tickCount": 6, "tickMinStep": 1, "labelOverlap": True, "labelExpr": zero}


def whole() -> Spec:
    """An axis of things in a row, which are numbered."""
    return {"format": "d", "tickMinStep": 1, "labelOverlap": True, "grid": False}


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high
