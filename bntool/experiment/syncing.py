"""SyncBatchNorm on CPUs: torch's own takes tensors on a GPU only."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn


class _SumOverAll(torch.autograd.Function):
    """The sum over all processes, whose gradient is the sum of the gradients in all processes."""

    @staticmethod
    def forward(_ctx: Any, own: Tensor) -> Tensor:
        whole = own.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(whole)
        return whole

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> Tensor:
        return _SumOverAll.forward(_ctx, gradient)


def _sum_over_all(own: Tensor) -> Tensor:
    return cast(Tensor, _SumOverAll.apply(own))


class _OnCpu(nn.modules.batchnorm._BatchNorm):
    """In train mode, normalises by the mean and population variance of the values of all processes.

    No SyncBatchNorm by inheritance: DistributedDataParallel refuses those on a CPU.
    """

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002 - torch's own name
        """Any number of axes, as in SyncBatchNorm."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        if not self.training:
            return super().forward(input)
        axes = (0, *range(2, input.dim()))
        rows = (1, -1, *(1,) * (input.dim() - 2))
        wide = input.to(torch.promote_types(input.dtype, torch.float32))
        sums = _sum_over_all(torch.cat([wide.sum(axes), wide.new_tensor([wide.numel() // wide.shape[1]])]))
        count = sums[-1].detach()
        mean = sums[:-1] / count
        distance = wide - mean.reshape(rows)
        variance = _sum_over_all(distance.square().sum(axes)) / count
        self._track(mean.detach(), variance.detach() * (count / (count - 1)))
        scale = torch.rsqrt(variance + self.eps)
        if self.weight is not None:
            scale = scale * self.weight
        output: Tensor = distance * scale.reshape(rows)
        if self.bias is not None:
            output = output + self.bias.reshape(rows)
        return output.to(input.dtype)

    def _track(self, mean: Tensor, unbiased: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        with torch.no_grad():
            self.num_batches_tracked += 1
            rate = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean, rate)
            self.running_var.lerp_(unbiased, rate)


@contextlib.contextmanager
def sync_on_cpu(model: nn.Module) -> Iterator[None]:
    """Let the SyncBatchNorm layers of a model on the CPU train with the other processes.

    Only the stock class: a subclass may compute something else. Afterwards they are of their class again.
    """
    layers = [
        module
        for module in model.modules()
        if type(module) is nn.SyncBatchNorm and all(p.device.type == "cpu" for p in module.parameters())
    ]
    for layer in layers:
        layer.__class__ = _OnCpu  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = nn.SyncBatchNorm
