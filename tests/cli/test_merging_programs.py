"""`bntool fold model.pt2`: parallel branches become one convolution, unless they are to be left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.cli.conftest import Shell
from tests.folding.test_merging import calls, program_of, repvgg, repvgg_parts


@pytest.mark.parametrize(("words", "left"), [((), 1), (("--no-merge",), 2)])
def test_no_merge_reaches_a_program(bntool: Shell, folder: Path, words: tuple[str, ...], left: int) -> None:
    torch.export.save(program_of(repvgg, repvgg_parts, torch.float32), "net.pt2")
    document = bntool("fold", "net.pt2", "--json", *words).document
    assert calls(torch.export.load("net_folded.pt2"), "conv") == left
    assert len(document["merges"]) == 2 - left
    assert document["bn_folded"] == 4 - left
    assert json.dumps(document["skips"]).count("itself") == left - 1
