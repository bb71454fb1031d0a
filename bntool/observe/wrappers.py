"""Modules that hold the model and run it: for several devices, averaged, compiled, or with checkpoints."""

from __future__ import annotations

from torch import nn

from bntool.observe.modules import class_name, modules_of

_CHECKPOINTS = "torch.distributed.algorithms._checkpoint.checkpoint_wrapper"
_INSIDE = {
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.optim.swa_utils.AveragedModel": "module",
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    f"{_CHECKPOINTS}.CheckpointWrapper": "_checkpoint_wrapped_module",
}
"""The class of a wrapper, and the name of what it holds."""


REWRAP = (
    "its DistributedDataParallel still gathers the gradients of the old parameters: to train the result, "
    "wrap result.model.module in one again"
)
"""What is said of a result that such a wrapper holds."""


def gathers_gradients(model: nn.Module) -> bool:
    """Whether a wrapper holds the model that was made for the parameters which it then had."""
    return any(isinstance(module, nn.parallel.DistributedDataParallel) for module in modules_of(model))


def model_inside(model: nn.Module) -> tuple[nn.Module, str]:
    """The model in all its wrappers, itself where it has none; and what they put before its names."""
    prefix = ""
    while (slot := _INSIDE.get(class_name(type(model)))) is not None and slot in model._modules:
        model, prefix = model.get_submodule(slot), f"{prefix}{slot}."
    return model, prefix
