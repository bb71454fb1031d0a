"""A torch model with TF32 on, and where there is none."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from bntool.core.verdicts import TF32, Check
from bntool.precision import casting
from bntool.runtime.naming import on_nvidia
from bntool.runtime.torch_runner import TorchRunner
from bntool.verifying.comparing import compare
from bntool.verifying.reference import Reference

_TF32_LEAST = (8, 0)  # Ampere


def check_tf32(candidate: nn.Module, reference: Reference, *, device: str) -> Check:
    """A torch model on CUDA with TF32 on, judged by what TF32 itself does to the reference."""
    coarse = reference.in_arithmetic(casting.TF32)
    runner = TorchRunner(candidate, device, tf32=True)
    row = compare(
        coarse.outputs,
        [runner.run(inputs) for inputs in coarse.inputs],
        coarse.limits,
        stage="verify",
        device=runner.device,
        provider=runner.provider,
        detail=coarse.detail,
    )
    return dataclasses.replace(row, precision=TF32)


def no_tf32(provider: str, eps: float) -> str:
    """Why a run on this provider has no TF32, of numbers that are `eps` apart; empty where it has."""
    if eps != torch.finfo(torch.float32).eps:
        return "no TF32 row: TF32 is about float32 numbers, and the model has others"
    if not on_nvidia(provider) and not provider.startswith("cuda"):
        return f"no TF32 row: TF32 needs an NVIDIA GPU, and this ran on {provider}"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < _TF32_LEAST:
        return "no TF32 row: this GPU is older than Ampere, and has no TF32"
    return ""
