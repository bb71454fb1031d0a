"""Forty correct models, folded, exported and verified: none may fail, and none may be blamed.

Each line of docs/verification.jsonl is one model; a model that has its line is not run again. The table in
docs/verification.md is made from the lines. Weights are random, and so are the running statistics.
"""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bntool import api
from bntool.files.references import build
from bntool.graph.inputs import Inputs
from bntool.verifying.blaming import blame_export, blame_modules
from bntool.verifying.checking import check_surgery, seeded_batches
from bntool.verifying.conditions import Conditions
from bntool.verifying.export_checking import check_onnx
from bntool.verifying.onnx_verifying import check_itself
from bntool.verifying.reference import Reference
from tools.measures.gpu_nets import enliven
from tools.sweeps.sweeping import Results, arguments

DOCS = Path(__file__).resolve().parents[2] / "docs"
LINES, PAGE = DOCS / "verification.jsonl", DOCS / "verification.md"
MARK = "<!-- the table below is written by tools/sweeps/forty.py -->"
SIDE = 64

TORCHVISION = """alexnet resnet18 resnet34 resnet50 squeezenet1_0 squeezenet1_1
densenet121 googlenet mobilenet_v2 mobilenet_v3_small mobilenet_v3_large shufflenet_v2_x0_5 shufflenet_v2_x1_0
mnasnet0_5 mnasnet0_75 mnasnet1_0 shufflenet_v2_x1_5 efficientnet_b0 regnet_x_400mf regnet_y_400mf"""
TIMM = """resnet10t resnet14t resnet26d mobilenetv2_050 mobilenetv3_small_050 mobilenetv4_conv_small
efficientnet_lite0 tinynet_e lcnet_050 ghostnet_100 hardcorenas_a fbnetc_100 mixnet_s semnasnet_075
spnasnet_100 repvgg_a0 regnetx_002 rexnet_100 dla34 hrnet_w18_small"""
NAMES = [f"torchvision:{n}" for n in TORCHVISION.split()] + [f"timm:{n}" for n in TIMM.split()]


def make(name: str) -> nn.Module:
    """A model with seeded weights, and BatchNorms that do something."""
    model = build(name).model.eval()
    torch.manual_seed(0)
    enliven(model)
    return model


def verify(name: str) -> dict[str, Any]:
    """Every stage of one model: rows, and who was blamed although nothing failed."""
    started = time.perf_counter()
    model = make(name)
    example = Inputs((torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)),))
    inputs = seeded_batches(example, (1, 2))
    reference = Reference(model, inputs)
    result = (
        api.fold(model, example) if any("BatchNorm" in type(m).__name__ for m in model.modules()) else None
    )
    folded = result.model if result else model
    rows = check_surgery(reference, folded, stage="fold")
    blamed = {"fold": blame_modules(model, folded, inputs[:1], stage="fold")}
    with tempfile.TemporaryDirectory() as folder:
        path = api.export_onnx(folded, example, Path(folder) / "model.onnx")
        rows += check_onnx(reference, path)
        rows += check_itself(path, inputs, how=Conditions("cpu"))
        blamed["export"] = blame_export(folded, path, inputs[:1])
    return {
        "model": name,
        "passed": all(row.passed for row in rows),
        "undecided": all(row.passed or row.undecided for row in rows),
        "rows": {
            row.stage: {"ratio": round(row.ratio, 2), "passed": row.passed, "top1": row.top1} for row in rows
        },
        "blamed": {stage: str(found.blame) for stage, found in blamed.items() if found},
        "seconds": round(time.perf_counter() - started, 1),
    }


def write_page(lines: list[dict[str, Any]], page: Path = PAGE) -> None:
    stages = ("fold", "export", "runtime", "basic", "extended", "all")
    head = f"| model | {' | '.join(stages)} | verdict |\n|---|{'--:|' * len(stages)}---|"
    rows = [
        f"| {line['model']} | "
        + " | ".join(f"{line['rows'][stage]['ratio']:.2f}" for stage in stages)
        + f" | {verdict(line)} |"
        for line in lines
    ]
    good = sum(map(is_right, lines))
    text = PAGE.read_text(encoding="utf-8").partition(MARK)[0] if page == PAGE else ""
    made = f"{MARK}\n\n{good} of {len(lines)} passed, with torch {torch.__version__} on the CPU.\n\n{head}\n"
    page.write_text(text + made + "\n".join(rows) + "\n", encoding="utf-8")


def main() -> int:
    chosen = arguments(__doc__, LINES).parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    results = Results(chosen.results)
    if chosen.again:
        results.forget(lambda row: not is_right(row))
    for name in results.missing(chosen.names or NAMES, chosen.minutes):
        row = verify(name)
        results.add(row)
        print(name, verdict(row), row["blamed"] or "", f"{row['seconds']} s", flush=True)
    rows = list(results.rows.values())
    write_page(rows, results.path.with_suffix(".md"))
    return int(not all(map(is_right, rows)))


def verdict(row: dict[str, Any]) -> str:
    """What proves nothing is neither right nor wrong."""
    if is_right(row):
        return "passed"
    return "undecided" if row.get("undecided") and not row["blamed"] else "FAILED"


def is_right(row: dict[str, Any]) -> bool:
    """A correct model has passed, and nothing in it was blamed."""
    return bool(row["passed"] and not row["blamed"])


if __name__ == "__main__":
    sys.exit(main())
