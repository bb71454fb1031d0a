"""A few graphs in the style of each exporter, at old and new opsets; `make styles` makes hundreds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.sweeps.onnx_styles import STYLES
from tools.sweeps.styled_files import trial

OPSETS = (13, 21, 7, 9, 11, 18)


@pytest.mark.parametrize(("style", "opset"), list(zip(STYLES, OPSETS, strict=True)))
def test_a_graph_of_another_exporter_folds_and_comes_out_right(
    tmp_path: Path, style: str, opset: int
) -> None:
    row = trial(tmp_path, 5, style, opset)
    assert row["wrong"] == []
    assert row["norms"] > len(row["kept"])
    assert row["left"] == 0
