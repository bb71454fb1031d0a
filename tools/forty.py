"""Forty correct models, folded, exported and verified: none may fail, and none may be blamed.

Each line of docs/verification.jsonl is one model; a model that has its line is not run again. The table in
docs/verification.md is made from the lines. Weights are random, and so are the running statistics.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bntool import api
from bntool.blaming import blame_export, blame_modules
from bntool.checking import check_onnx, check_surgery, seeded_batches
from bntool.exporting import export_onnx
from bntool.inputs import Inputs
from bntool.onnx_verifying import check_itself
from bntool.reference import Reference

DOCS = Path(__file__).resolve().parents[1] / "docs"
LINES, PAGE = DOCS / "verification.jsonl", DOCS / "verification.md"
MARK = "<!-- the table below is written by tools/forty.py -->"
SIDE = 64

TORCHVISION = """alexnet resnet18 resnet34 resnet50 squeezenet1_0 squeezenet1_1
densenet121 googlenet mobilenet_v2 mobilenet_v3_small mobilenet_v3_large shufflenet_v2_x0_5 shufflenet_v2_x1_0
mnasnet0_5 mnasnet0_75 mnasnet1_0 shufflenet_v2_x1_5 efficientnet_b0 regnet_x_400mf regnet_y_400mf"""
TIMM = """resnet10t resnet14t resnet26d mobilenetv2_050 mobilenetv3_small_050 mobilenetv4_conv_small
efficientnet_lite0 tinynet_e lcnet_050 ghostnet_100 hardcorenas_a fbnetc_100 mixnet_s semnasnet_075
spnasnet_100 repvgg_a0 regnetx_002 rexnet_100 dla34 hrnet_w18_small"""
NAMES = [f"torchvision:{n}" for n in TORCHVISION.split()] + [f"timm:{n}" for n in TIMM.split()]


def build(name: str) -> nn.Module:
    """A model with seeded weights, and BatchNorms that do something."""
    library, _, kind = name.partition(":")
    torch.manual_seed(0)
    if library == "timm":
        import timm

        model = timm.create_model(kind)
    else:
        import torchvision

        extra = {"init_weights": True} if kind == "googlenet" else {}
        model = torchvision.models.get_model(kind, weights=None, **extra)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.8, 1.25)
            nn.init.uniform_(module.weight, 0.8, 1.25)
            nn.init.normal_(module.bias, 0, 0.1)
    return model.eval()


def verify(name: str) -> dict[str, Any]:
    """Every stage of one model: rows, and who was blamed although nothing failed."""
    started = time.perf_counter()
    model = build(name)
    example = Inputs((torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)),))
    inputs = seeded_batches(example, (1, 2))
    reference = Reference(model, inputs)
    result = (
        api.fold(model, example) if any("BatchNorm" in type(m).__name__ for m in model.modules()) else None
    )
    folded = result.model if result else model
    rows = check_surgery(model, folded, inputs, stage="fold", reference=reference)
    blamed = {"fold": blame_modules(model, folded, inputs[:1], stage="fold")}
    with tempfile.TemporaryDirectory() as folder:
        path = export_onnx(folded, example, Path(folder) / "model.onnx").path
        rows += check_onnx(folded, path, inputs, device="cpu", reference=reference)
        rows += check_itself(path, inputs, device="cpu")
        blamed["export"] = blame_export(folded, path, inputs[:1])
    return {
        "name": name,
        "passed": all(row.passed for row in rows),
        "rows": {
            row.stage: {"ratio": round(row.ratio, 2), "passed": row.passed, "top1": row.top1} for row in rows
        },
        "blamed": {stage: str(found.blame) for stage, found in blamed.items() if found},
        "seconds": round(time.perf_counter() - started, 1),
    }


def write_page(lines: list[dict[str, Any]]) -> None:
    stages = ("fold", "export", "runtime", "basic", "extended", "all")
    head = f"| model | {' | '.join(stages)} | verdict |\n|---|{'--:|' * len(stages)}---|"
    rows = [
        f"| {line['name']} | "
        + " | ".join(f"{line['rows'][stage]['ratio']:.2f}" for stage in stages)
        + f" | {'passed' if line['passed'] and not line['blamed'] else 'FAILED'} |"
        for line in lines
    ]
    good = sum(line["passed"] and not line["blamed"] for line in lines)
    text = PAGE.read_text(encoding="utf-8").partition(MARK)[0]
    made = f"{MARK}\n\n{good} of {len(lines)} passed, with torch {torch.__version__} on the CPU.\n\n{head}\n"
    PAGE.write_text(text + made + "\n".join(rows) + "\n", encoding="utf-8")


def main() -> int:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    done = [json.loads(line) for line in LINES.read_text().splitlines()] if LINES.exists() else []
    for name in NAMES:
        if any(line["name"] == name for line in done):
            continue
        line = verify(name)
        done.append(line)
        with LINES.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(
            name,
            "passed" if line["passed"] else "FAILED",
            line["blamed"] or "",
            f"{line['seconds']} s",
            flush=True,
        )
        write_page(done)
    write_page(done)
    return int(not all(line["passed"] and not line["blamed"] for line in done))


if __name__ == "__main__":
    sys.exit(main())
