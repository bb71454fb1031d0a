"""`make prices`: what it measures of one model, and its page."""

from __future__ import annotations

from torch import nn

from tools.measures.prices import measured, page


def _net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


def test_prices_are_in_forwards_and_copies_of_the_model_itself() -> None:
    row = measured(_net, ((1, 3, 16, 16),))
    assert row["parameters"] == 3 * 4 * 9 + 4 + 8
    assert row["modules"] == 4
    assert row["proved"] > row["unchecked"] > 1  # an observed forward and new weights are part of either


def test_the_page_tells_large_models_from_small_ones_and_leaves_failures_out() -> None:
    large = {"status": "ok", "parameters": 20_000_000, "modules": 9, "forward_ms": 50.0}
    rows = {
        "a:large": {"model": "a:large", **large, "unchecked": 1.5, "proved": 4.0},
        "a:small": {"model": "a:small", **large, "parameters": 10, "unchecked": 3.0, "proved": 9.0},
        "a:gone": {"model": "a:gone", "status": "failed"},
    }
    text = page(rows)
    assert "| proved | 2 | 6.5 | 9.0 | 9.0 |" in text
    assert "| proved, above 10 M parameters | 1 | 4.0 | 4.0 | 4.0 |" in text
    assert text.index("| a:small |") < text.index("| a:large |")
    assert "a:gone" not in text
    assert "| proved | 0 | – | – | – |" in page({})
