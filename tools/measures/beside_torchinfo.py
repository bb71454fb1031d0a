"""Every figure of a summary beside torchinfo's, for twenty models.

    python -m tools.measures.beside_torchinfo

Prints a Markdown table; a figure that differs has its reason in docs/summary.md.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torchinfo
from torch import nn

import bntool

NAMES = """torchvision:alexnet torchvision:vgg11_bn torchvision:resnet18 torchvision:densenet121
torchvision:squeezenet1_1 torchvision:mobilenet_v2 torchvision:mobilenet_v3_small
torchvision:mnasnet0_5 torchvision:shufflenet_v2_x0_5 torchvision:regnet_y_400mf torchvision:efficientnet_b0
torchvision:convnext_tiny torchvision:vit_b_16 torchvision:swin_t torchvision:fcn_resnet50
timm:resnet18 timm:repvgg_a0
timm:mobilenetv3_small_050 timm:efficientnet_lite0 timm:mixer_s32_224""".split()


def figures(model: nn.Module, size: tuple[int, ...]) -> list[tuple[str, Any, Any]]:
    """Ours and theirs; activations doubled, since torchinfo counts those of a backward pass too."""
    theirs = torchinfo.summary(model, size, verbose=0, mode="eval")
    ours = bntool.summary(model, size)
    return [
        ("parameters", ours.totals.parameters, theirs.total_params),
        ("trainable", ours.totals.trainable, theirs.trainable_params),
        ("mult-adds", ours.mult_adds, theirs.total_mult_adds),
        ("activations", 2 * (ours.memory["activations"] or 0), theirs.total_output_bytes),
        ("parameter bytes", ours.memory["parameters"], theirs.total_param_bytes),
    ]


def main() -> int:
    print("| model | equal | differs: bntool / torchinfo |\n|---|---|---|")
    for name in NAMES:
        model = bntool.load(name).module.eval()
        found = figures(model, (1, 3, 224, 224))
        equal = [what for what, mine, others in found if mine == others]
        differs = [f"{what} {mine:,} / {others:,}" for what, mine, others in found if mine != others]
        print(f"| {name} | {len(equal)} of {len(found)} | {'; '.join(differs)} |", flush=True)
        del model
    return 0


if __name__ == "__main__":
    torch.manual_seed(0)
    sys.exit(main())
