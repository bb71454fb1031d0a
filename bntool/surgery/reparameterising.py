"""Blocks that bring their own re-parameterisation (RepVGG, MobileOne, FastViT, RepViT, GhostNet v3).

Parallel branches inside a user's `forward` cannot be merged by editing a module tree, but such blocks know
how to become one convolution. Their own method is used on a float64 copy, and the result is checked like
any other fold.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from bntool.core.plan import Plan
from bntool.core.schema import Damaged
from bntool.core.sites import Edit
from bntool.observe.copying import structural_copy
from bntool.observe.modules import is_batch_norm_class, once_per_class
from bntool.observe.standing_in import own_copy, set_modes
from bntool.surgery.replacing import replace_everywhere

_METHODS = ("reparameterize", "switch_to_deploy")
"""Methods that change a block in place. timm's `fuse` returns a new block; see `_methods_of`."""


@dataclasses.dataclass(frozen=True)
class Block:
    """A block, the method that merges its branches, the BatchNorms that go with it, and what it becomes.

    `exact` are the parameters of that before they were rounded, by name.
    """

    name: str
    method: str
    norms: tuple[str, ...]
    merged: nn.Module
    exact: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def numbers(self) -> Iterator[tuple[int, Callable[[], Tensor]]]:
        """What gives the numbers of each parameter in float64, by the identity of the parameter."""
        for name, parameter in self.merged.named_parameters():
            yield id(parameter), functools.partial(self.exact.__getitem__, name)


def find_blocks(model: nn.Module) -> list[Block]:
    """Every outermost block that can merge its branches and so loses BatchNorms; the model is untouched.

    Each is tried on a copy, which tells what goes.
    """
    blocks: list[Block] = []
    for name, module in model.named_modules():
        # what a block holds comes right behind it
        if not name or (blocks and name.startswith(f"{blocks[-1].name}.")):
            continue
        found = _tried(name, module) if _methods_of(module) else None
        if found is not None:
            blocks.append(found)
    return blocks


def _tried(name: str, module: nn.Module) -> Block | None:
    """The block by the first of its methods that takes BatchNorms out of it."""
    before = _norm_names(module)
    for method in _methods_of(module) if before else ():
        try:
            exact: dict[str, Tensor] = {}
            merged = reparameterised(module, method, exact=exact)
        except Exception:  # noqa: BLE001, S112 - a method that fails is one this block does not offer
            continue
        gone = before - _norm_names(merged)
        if gone:
            norms = tuple(f"{name}.{norm}" if norm else name for norm in sorted(gone))
            return Block(name, method, norms, merged, exact)
    return None


def with_blocks_merged(model: nn.Module, blocks: list[Block]) -> nn.Module:
    """A structural copy of the model in which these blocks of it are what they become."""
    copied = structural_copy(model)
    for block in blocks:
        replace_everywhere(copied, copied.get_submodule(block.name), block.merged)
    return copied


def merge_blocks_of(copied: nn.Module, plan: Plan, *, wide: bool = False) -> bool:
    """Put what they become in the place of the blocks that a plan merges, in the plan's order.

    With `wide` what they become is left in float64. Returns whether there was any.

    Only the method that the planner itself would call is called, and only where a BatchNorm goes by it;
    `Damaged`, with the place, for any other.
    """
    merged = False
    for number, site in enumerate(plan.fold_sites):
        for place, edit in enumerate(site.edits):
            if edit.kind == "reparameterize":
                try:
                    _merge_block(copied, edit, wide)
                except Damaged as error:
                    raise error.within(f"sites[{number}].edits[{place}]") from error
                merged = True
    return merged


def _merge_block(copied: nn.Module, edit: Edit, wide: bool) -> None:
    block = dict(copied.named_modules(remove_duplicate=False)).get(edit.layer) if edit.layer else None
    if block is None:
        raise Damaged(f"the model has no block {edit.layer!r}", "layer")
    if edit.method not in _methods_of(block):
        raise Damaged(f"{edit.layer!r} merges no branches by a method {edit.method!r}", "method")
    try:
        merged = reparameterised(block, edit.method, wide=wide)
    except Exception as error:  # the method is the model's own, and may fail in any way
        raise Damaged(f"{edit.method}() of {edit.layer!r} fails: {error}", "method") from error
    if not _norm_names(block) - _norm_names(merged):
        raise Damaged(f"no BatchNorm goes by {edit.method}() of {edit.layer!r}", "method")
    replace_everywhere(copied, block, merged)


def reparameterised(
    module: nn.Module, method: str, *, wide: bool = False, exact: dict[str, Tensor] | None = None
) -> nn.Module:
    """The block with its branches merged, computed in float64 and cast back unless `wide`; the argument is
    untouched. `exact` is given the parameters as they were before.
    """
    tensors = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    dtype = torch.float64 if wide else tensors[0].dtype if tensors else torch.get_default_dtype()
    trains = any(p.requires_grad for p in module.parameters())
    merged = _call(own_copy(module).double(), method)
    if exact is not None:
        exact.update((name, parameter.detach()) for name, parameter in merged.named_parameters())
    merged = merged.to(dtype)
    merged.requires_grad_(trains)
    return set_modes(merged, training=module.training)


def _call(block: nn.Module, method: str) -> nn.Module:
    """The merged block. Layers that the method makes are float64 too, and lie where the block lies."""
    default = torch.get_default_dtype()
    device = next((t.device for t in block.parameters()), torch.device("cpu"))
    # as a context the device costs every op a call in Python
    there = contextlib.nullcontext() if device == torch.get_default_device() else device
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad(), there:
            returned = getattr(block, method)()
    finally:
        torch.set_default_dtype(default)
    return returned if isinstance(returned, nn.Module) else block


def _methods_of(module: nn.Module) -> tuple[str, ...]:
    """The methods by which this block may merge its branches; not all of that name do."""
    methods = _methods_offered(type(module))
    if "fuse" in methods:
        # a common word: only where it merges several convolutions into one
        convolutions = sum(isinstance(m, nn.Conv2d) for m in module.modules())
        return methods if 2 <= convolutions <= 8 else tuple(m for m in methods if m != "fuse")
    return methods


@once_per_class
def _methods_offered(cls: type) -> tuple[str, ...]:
    methods = (*_METHODS, "fuse") if cls.__module__.startswith("timm.models.") else _METHODS
    return tuple(method for method in methods if callable(getattr(cls, method, None)))


def _norm_names(module: nn.Module) -> set[str]:
    return set(_norms(module))


def _norms(module: nn.Module) -> Iterator[str]:
    for name, child in module.named_modules():
        if is_batch_norm_class(type(child)):
            yield name
