"""The module classes bntool itself puts into a model, where no stock arrangement fits.

A convolution that holds its BatchNorm (form `subclass`) keeps its weight, bias and attributes under their
old names, so that old checkpoints load with `strict=True`. A layer that runs several times in a forward
gets a BatchNorm for each of its calls.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_COUNTER = "num_batches_tracked"
"""torch itself adds it where it is missing."""


def load_old_checkpoints(model: nn.Module, names: Iterable[str]) -> None:
    """Let `load_state_dict(strict=True)` take a checkpoint that knows nothing of the new BatchNorms.

    They become ones that change nothing: all of them or none, since a checkpoint that has some of them is a
    new one with a part missing. This holds in the process at hand: what is pickled is the plain module, which
    needs no bntool to be loaded.
    """
    norms = {name: model.get_submodule(name) for name in names}
    for norm in norms.values():
        norm.register_load_state_dict_pre_hook(_fill_in_if_old)
        _keep_out_of_pickles(norm, "_load_state_dict_pre_hooks")
    group = _Together(norms)
    model.register_load_state_dict_pre_hook(group.before)
    model.register_load_state_dict_post_hook(group.after)
    _keep_out_of_pickles(model, "_load_state_dict_pre_hooks")
    _keep_out_of_pickles(model, "_load_state_dict_post_hooks")


def _keep_out_of_pickles(module: nn.Module, registry: str) -> None:
    vars(module)[registry] = _InThisProcess(vars(module)[registry])


class _InThisProcess(collections.OrderedDict[int, Any]):
    """Hooks of which bntool's own go with a copy and not into a pickle."""

    def __reduce__(self) -> Any:
        theirs = [(key, hook) for key, hook in self.items() if not _is_own(hook)]
        return collections.OrderedDict, ((theirs,) if theirs else ())

    def __deepcopy__(self, memo: dict[int, Any]) -> _InThisProcess:
        return _InThisProcess({key: copy.deepcopy(hook, memo) for key, hook in self.items()})


def _is_own(hook: Any) -> bool:
    function = getattr(hook, "hook", hook)  # torch wraps those that it hands the module
    return function is _fill_in_if_old or isinstance(getattr(function, "__self__", None), _Together)


def _fill_in_if_old(
    norm: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    _metadata: Any,
    _strict: bool,
    missing: list[str],
    *_: Any,
) -> None:
    # a checkpoint that lacks what comes before is no old one, but a part of one
    if not missing:
        _fill_in(norm, state_dict, prefix)


@dataclasses.dataclass
class _Together:
    """The BatchNorms of one insertion, which a checkpoint has all of or none.

    The model is not among the fields: it would hold itself, and its memory until a garbage collection.
    """

    norms: dict[str, nn.Module]

    def before(
        self,
        model: nn.Module,
        state_dict: dict[str, Any],
        prefix: str,
        _metadata: Any,
        _strict: bool,
        missing: list[str],
        *_: Any,
    ) -> None:
        """Where there are some, say already now what is missing: then nothing is filled in."""
        modules = dict(model.named_modules(remove_duplicate=False))
        there = set(map(id, modules.values()))
        # one that was replaced, by a SyncBatchNorm say, stands where it stood
        own = {id(norm) if id(norm) in there else id(modules.get(name)) for name, norm in self.norms.items()}
        keys = [
            {f"{prefix}{name}.{key}" for key in norm.state_dict() if not key.endswith(_COUNTER)}
            for name, norm in modules.items()
            if id(norm) in own
        ]
        if any(not group.isdisjoint(state_dict) for group in keys):
            missing += sorted(key for group in keys for key in group.difference(state_dict))

    def after(self, _model: nn.Module, found: Any) -> None:
        """What was said to be missing was said again when its turn came."""
        found.missing_keys[:] = dict.fromkeys(found.missing_keys)


def _fill_in(norm: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    """Where there is nothing under `prefix`: γ = 1, β = 0, μ = 0, σ² = 1 − ε, which is x to the last bit."""
    if any(key.startswith(prefix) and not key.endswith(_COUNTER) for key in state_dict):
        return
    for key, tensor in norm.state_dict(prefix=prefix).items():
        owner, _, slot = key.removeprefix(prefix).rpartition(".")
        neutral = {"weight": 1.0, "running_var": 1.0 - getattr(norm.get_submodule(owner), "eps", 0.0)}
        device = "cpu" if tensor.is_meta else tensor.device  # with assign=True it becomes the norm's own
        state_dict[key] = torch.full_like(tensor, neutral.get(slot, 0), device=device)


class _NormedForward(nn.Module):
    """Mixin: the layer's own forward, then `self.bn`. Old checkpoints without `bn.*` keys load."""

    bn: nn.Module

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = self.bn(super().forward(*args, **kwargs))
        return out

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: list[str],
        *args: Any,
    ) -> None:
        if f"{prefix}weight" in state_dict and not missing:
            _fill_in(self.bn, state_dict, f"{prefix}bn.")
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *args)


class ConvBN1d(_NormedForward, nn.Conv1d):
    """A Conv1d whose output goes through its child `bn`. weight (out, in/groups, k)."""


class ConvBN2d(_NormedForward, nn.Conv2d):
    """A Conv2d whose output goes through its child `bn`. weight (out, in/groups, kh, kw)."""


class ConvBN3d(_NormedForward, nn.Conv3d):
    """A Conv3d whose output goes through its child `bn`. weight (out, in/groups, kd, kh, kw)."""


class ConvTransposeBN1d(_NormedForward, nn.ConvTranspose1d):
    """A ConvTranspose1d whose output goes through its child `bn`. weight (in, out/groups, k)."""


class ConvTransposeBN2d(_NormedForward, nn.ConvTranspose2d):
    """A ConvTranspose2d whose output goes through its child `bn`. weight (in, out/groups, kh, kw)."""


class ConvTransposeBN3d(_NormedForward, nn.ConvTranspose3d):
    """A ConvTranspose3d whose output goes through its child `bn`. weight (in, out/groups, kd, kh, kw)."""


class LinearBN(_NormedForward, nn.Linear):
    """A Linear whose (N, C) output goes through its child `bn`. weight (out, in)."""


NORMED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: ConvBN1d,
    nn.Conv2d: ConvBN2d,
    nn.Conv3d: ConvBN3d,
    nn.ConvTranspose1d: ConvTransposeBN1d,
    nn.ConvTranspose2d: ConvTransposeBN2d,
    nn.ConvTranspose3d: ConvTransposeBN3d,
    nn.Linear: LinearBN,
}
"""The stock class -> the class that holds a BatchNorm."""


class Passing(nn.Identity):
    """What a BatchNorm leaves behind that was handed more than its data: hands the data on."""

    def forward(self, input: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:  # noqa: A002  as layers call it
        return input


class Absorbed(nn.Module):
    """A branch of a sum that another convolution has taken in: gives zeros, which add nothing.

    They have the shape that the branch gave, the type and the device of its input, and one number of memory.

    Args:
        channels: of the output; 0 where it is of the input's own shape.
        stride: of the branch, axis by axis.
        shrinks: by how much it made each axis shorter, d·(k − 1) − p − q.
    """

    def __init__(self, channels: int = 0, stride: Sequence[int] = (), shrinks: Sequence[int] = ()) -> None:
        super().__init__()
        self.channels, self.stride, self.shrinks = channels, tuple(stride), tuple(shrinks)

    def forward(self, input: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:  # noqa: A002  as layers call it
        shape = list(input.shape)
        if self.channels:
            dims = len(self.stride)
            lengths = zip(shape[-dims:], self.stride, self.shrinks, strict=True)
            sides = [(length - less - 1) // step + 1 for length, step, less in lengths]
            shape = [*shape[: -dims - 1], self.channels, *sides]
        return input.new_zeros(()).expand(shape)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, stride={self.stride}" if self.channels else ""


class BatchNormPerCall(nn.ModuleList):
    """As many BatchNorms as the layer before it has calls in one forward; the i-th call goes to the i-th.

    Every forward of the whole model must make all of these calls: `count_calls_anew` lets each begin with the
    first, so that one that was cut short by an error does not shift those after it.
    """

    def __init__(self, norms: Iterable[nn.Module]) -> None:
        super().__init__(norms)
        self.call = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.call >= len(self):
            raise RuntimeError(
                f"a layer ran more than {len(self)} times in one forward; it has no BatchNorm for more calls"
            )
        norm = self[self.call]
        self.call += 1
        out: Tensor = norm(x)
        return out


class StartOfForward:
    """A forward pre-hook of the whole model: the next call of every layer is its first."""

    __slots__ = ()

    def __call__(self, model: nn.Module, _args: Any) -> None:
        for module in model.modules():
            if isinstance(module, BatchNormPerCall):
                module.call = 0


def count_calls_anew(model: nn.Module) -> None:
    """Let the calls of repeated layers be counted from the start of each forward of `model`."""
    if not any(isinstance(hook, StartOfForward) for hook in model._forward_pre_hooks.values()):
        model.register_forward_pre_hook(StartOfForward())


def computes_weight(hook: Any) -> bool:
    """Whether a hook is one by which older ways of PyTorch make a weight, or prune it."""
    kinds = {cls.__name__ for cls in type(hook).__mro__}
    return type(hook).__module__.startswith("torch.nn.utils") and not kinds.isdisjoint(_MAKERS)


_MAKERS = frozenset(
    """WeightNorm SpectralNorm SpectralNormStateDictHook SpectralNormLoadStateDictPreHook
    BasePruningMethod""".split()
)


def has_foreign_hook(hooks: Any) -> bool:
    """Whether one of a module's registries of hooks (or None) holds a hook that is not bntool's own."""
    if not hooks:
        return False
    return not isinstance(hooks, dict) or any(type(hook) is not StartOfForward for hook in dict.values(hooks))
