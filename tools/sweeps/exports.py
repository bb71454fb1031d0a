"""Fold and export torchvision and timm models, and verify the ONNX files: `make exports`.

Each model runs in its own process with a time limit. Results are appended to `docs/exports.jsonl` as they
come, so that the sweep can be stopped and gone on with; `docs/exports.md` is written from them.
"""

from __future__ import annotations

import collections
import functools
import tempfile
import time
from pathlib import Path
from typing import Any

from tools.sweeps.sweeping import arguments, sweep
from tools.sweeps.zoo import observed, randomise

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "exports.jsonl"
TIMM = """
resnet10t resnet14t resnet26d resnetv2_50 resnext26ts seresnext26t_32x4d mobilenetv2_050 mobilenetv2_100
mobilenetv3_small_050 mobilenetv3_large_100 mobilenetv4_conv_small efficientnet_lite0 efficientnet_b0
tf_efficientnet_b0 tinynet_e tinynet_a lcnet_050 lcnet_100 ghostnet_050 ghostnet_100 ghostnetv2_100
hardcorenas_a fbnetc_100 fbnetv3_b mixnet_s mixnet_m semnasnet_075 mnasnet_small spnasnet_100 repvgg_a0
repvgg_b0 regnetx_002 regnety_002 regnetz_b16 rexnet_100 rexnetr_200 dla34 dla46_c hrnet_w18_small
hardcorenas_f densenet121 vgg11_bn darknet53 cspresnet50 cspdarknet53 inception_v3 inception_v4
xception41 selecsls42b skresnet18 res2net50_26w_4s resnest14d dpn48b vovnet39a ese_vovnet19b_dw gernet_s
eca_botnext26ts_256 lambda_resnet26t mobileone_s0 mobilevit_xxs mobilevitv2_050 fastvit_t8 repvit_m0_9
repghostnet_050 levit_128s convit_tiny coat_tiny efficientformer_l1 efficientvit_b0 starnet_s1
tiny_vit_5m_224 visformer_tiny pvt_v2_b0 edgenext_xx_small nf_resnet26 tresnet_m
""".split()


def every_model() -> list[str]:
    """Classification, segmentation and video of torchvision, and the models of timm above."""
    from torchvision import models

    parts = (models, models.segmentation, models.video)
    vision = [f"torchvision:{name}" for part in parts for name in models.list_models(module=part)]
    return list(dict.fromkeys(vision)) + [f"timm:{name}" for name in TIMM]


def examine(name: str) -> dict[str, Any]:
    """Fold one model, export it, and check the file in all three stages."""
    import onnx
    import torch

    from bntool.api import exported
    from bntool.core.options import FoldOptions
    from bntool.files.references import build
    from bntool.pipeline.onnx_folding import fold_exported
    from bntool.subjects.base import Checking
    from bntool.subjects.module import ModuleSubject
    from bntool.verifying.export_checking import check_onnx

    torch.set_num_threads(1)
    model = build(name).model.eval()
    row: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    randomise(model)
    observation = observed(name, model)
    subject = ModuleSubject(model, observed=lambda: observation)
    plan = subject.plan_fold(FoldOptions(), thorough=True)
    folded = subject.folded(plan)
    proof = subject.proof(Checking(full=True))
    reference = proof.reference
    kept = {skip.name: str(skip.reason) for skip in plan.skips}
    checks = proof.rows(plan, folded) if plan else []
    with tempfile.TemporaryDirectory(prefix="bntool.exports.") as folder:
        start = time.perf_counter()
        export = exported(folded.model, observation.inputs, Path(folder) / "model.onnx")
        # Merged branches are a matter of the fold, proved elsewhere; here is what folds in the graph alone.
        export = fold_exported(export, merge=False)
        row["seconds_export"] = round(time.perf_counter() - start, 1)
        onnx.checker.check_model(str(export.path), full_check=True)
        checks += check_onnx(reference, export.path)
    left = export.nodes.get("BatchNormalization", 0)
    row |= {
        "opset": export.opset,
        "nodes": sum(export.nodes.values()),
        "folded": sum(1 for _ in plan.fold_sites),
        "left": left,
        "kept": dict(collections.Counter(kept[name] for name in kept)) if left else {},
        "stages": {f"{c.stage} {c.precision}".strip(): round(c.ratio, 2) for c in checks},
        "notes": list(export.notes),
    }
    failed = [f"{c.stage} {c.precision}".strip() for c in checks if c.verdict == "failed"]
    if failed:
        return {"status": "differs", "error": f"in {', '.join(failed)}", **row}
    if unsure := [c for c in checks if c.undecided]:
        return {"status": "undecided", "error": unsure[0].undecided, **row}
    if left > len(kept):
        return {"status": "without a reason", "error": f"{left} nodes, {len(kept)} reasons", **row}
    return {"status": "ok", **row}


def page(results: dict[str, dict[str, Any]], wanted: int) -> str:
    rows = sorted(results.values(), key=lambda row: row["model"])
    good = [row for row in rows if row["status"] == "ok"]
    rest = [row for row in rows if row["status"] != "ok"]
    lines = [
        "# Exports",
        "",
        "Folded and exported with random weights, randomised BatchNorm statistics and the smallest inputs",
        "that the model takes, on the CPU. Written by `make exports` from `exports.jsonl`. Every file passed",
        "`onnx.checker` with its full check. Figures are errors over the model's own rounding noise.",
        "",
        f"- tried: {len(rows)} of {wanted}",
        f"- agree with torch in the fold, export and runtime stages: {len(good)}",
        f"- without any BatchNormalization node: {sum(not row['left'] for row in good)}",
        f"- nodes that the others keep, each with a reason: {sum(row['left'] for row in good)}",
        "",
        "| model | opset | nodes | BatchNormalization left, and why | fold | export | runtime |",
        "|---|--:|--:|---|--:|--:|--:|",
    ]
    for row in good:
        why = ", ".join(f"{n} {reason}" for reason, n in row["kept"].items())
        left = f"{row['left']}: {why}" if row["left"] else "0"
        stages = " | ".join(str(row["stages"].get(stage, "")) for stage in ("fold", "export", "runtime"))
        lines.append(f"| {row['model']} | {row['opset']} | {row['nodes']} | {left} | {stages} |")
    if rest:
        lines += ["", "Not exported, or not equal, with the reason of whoever refused:", ""]
        for row in rest:
            lines.append(f"- {row['model']}: {row['status']} {_one_line(row.get('error', ''))}".rstrip())
    return "\n".join(lines) + "\n"


def _one_line(text: str) -> str:
    return " ".join(text.replace("|", "/").split())[:300]


def main() -> None:
    chosen = arguments(__doc__, RESULTS, limit=240).parse_args()
    import bntool.export.exporting  # noqa: F401 - imported once, before the forks

    wanted = every_model()
    made = functools.partial(page, wanted=len(wanted))
    sweep(chosen, wanted, examine, made, lambda row: _one_line(row.get("error", "")))


if __name__ == "__main__":
    main()
