"""Blocks that bring their own re-parameterisation (RepVGG, MobileOne, FastViT, RepViT, GhostNet v3).

Such blocks know how to become one convolution. Their own method is used on a float64 copy, and the block is
run before and after: what is not the same is not used, and what the law of merging can do is left to it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from bntool.core.plan import Plan
from bntool.core.schema import Damaged
from bntool.core.sites import Edit
from bntool.core.tolerances import ALGEBRA_LIMIT
from bntool.graph.drawing import Draw
from bntool.graph.inputs import Inputs, named_tensors
from bntool.observe.copying import structural_copy
from bntool.observe.isolation import Isolation, fresh
from bntool.observe.modules import is_batch_norm_class, once_per_class
from bntool.observe.stand_in import cast, own_copy, set_modes
from bntool.surgery.replacing import Slots

_METHODS = ("reparameterize", "switch_to_deploy", "reparameterize_layer", "merge_kernel", "fuse")
"""Methods that change a block in place or return a new one."""
_MOST_CONVOLUTIONS = 8
"""`fuse` is a common word: only a block of a few convolutions that become fewer is meant by it."""
_SIDES = (4, 16)
"""A block is tried on an image whose side is one more than its widest kernel spans, within these."""


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


def find_blocks(model: nn.Module, shapes: Mapping[str, Sequence[int]] | None = None) -> list[Block]:
    """Every outermost block that can merge its branches and so loses BatchNorms; the model is untouched.

    Each is tried on a copy, which tells what goes, and run on numbers of the shape that it is known to read.
    """
    blocks: list[Block] = []
    for name, module in model.named_modules():
        # what a block holds comes right behind it
        if not name or (blocks and name.startswith(f"{blocks[-1].name}.")):
            continue
        found = _tried(name, module, (shapes or {}).get(name)) if _methods_of(module) else None
        if found is not None:
            blocks.append(found)
    return blocks


def _tried(name: str, module: nn.Module, shape: Sequence[int] | None) -> Block | None:
    """The block by the first of its methods that takes BatchNorms out of it and keeps what it computes."""
    before = _norm_names(module)
    for method in _methods_of(module) if before else ():
        try:
            block = cast(own_copy(module), torch.float64)
            ran = _first_run(block, shape)
            wide = _merged(block, method)
        except Exception:  # noqa: BLE001, S112 - a method that fails is one this block does not offer
            continue
        gone = before - _norm_names(wide)
        fewer = method != "fuse" or _convolutions(wide) < _convolutions(module)
        if gone and fewer and _agrees(wide, ran):
            norms = tuple(f"{name}.{norm}" if norm else name for norm in sorted(gone))
            exact = {own: parameter.detach() for own, parameter in wide.named_parameters()}
            return Block(name, method, norms, _as_it_was(wide, module), exact)
    return None


_Run = tuple[Inputs, dict[str, torch.Tensor]]
"""Inputs of a block, and what it gives on them."""


def _first_run(block: nn.Module, shape: Sequence[int] | None) -> list[_Run]:
    """What the block gives on a small input, and on one of its own shape where it takes no small one.

    Empty where it does not run by itself: then the fold's proof tells.
    """
    rank = len(shape or ())
    side = min(max(_reach(block) + 1, _SIDES[0]), _SIDES[1])
    small = [
        2 if i == 0 and rank > 3 else size if i < 2 else min(size, side) for i, size in enumerate(shape or ())
    ]
    for sizes in (small, list(shape)) if shape is not None else ():
        x = Draw().numbers(sizes, torch.float64)
        inputs = Inputs((x.to(next((t.device for t in block.parameters()), x.device)),))
        # it may take other sizes, or more than one input
        with contextlib.suppress(Exception):
            return [(inputs, _output_of(block, inputs))]
    return []


def _reach(block: nn.Module) -> int:
    """How many places the widest kernel of a block spans."""
    layers = (m for m in block.modules() if isinstance(m, nn.modules.conv._ConvNd))
    spans = (d * (k - 1) + 1 for m in layers for k, d in zip(m.kernel_size, m.dilation, strict=True))
    return max(spans, default=1)


def _agrees(merged: nn.Module, ran: Sequence[_Run]) -> bool:
    """Whether the merged block gives what the block gave, as far as both run by themselves."""
    for inputs, expected in ran:
        try:
            found = _output_of(merged, inputs)
        except Exception:  # noqa: BLE001, S112 - the fold's proof tells
            continue
        pairs = [(expected[name], found.get(name)) for name in expected]
        if len(expected) != len(found) or any(b is None or not _same(a, b) for a, b in pairs):
            return False
    return True


def _output_of(model: nn.Module, inputs: Inputs) -> dict[str, torch.Tensor]:
    with Isolation(model).run(watched=False) as run, torch.no_grad():
        return dict(named_tensors(run(*fresh(inputs).args)))


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape or not one.is_floating_point():
        return one.shape == other.shape
    return bool((one - other).abs().max() <= ALGEBRA_LIMIT * one.abs().max())


def with_blocks_merged(model: nn.Module, blocks: list[Block]) -> nn.Module:
    """A structural copy of the model in which these blocks of it are what they become."""
    copied = structural_copy(model)
    slots = Slots(copied)
    for block in blocks:
        slots.replace(copied.get_submodule(block.name), block.merged)
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
    Slots(copied).replace(block, merged)


def reparameterised(module: nn.Module, method: str, *, wide: bool = False) -> nn.Module:
    """The block with its branches merged in float64, cast back unless `wide`; the argument is untouched."""
    wide_block = _merged(cast(own_copy(module), torch.float64), method)
    return _as_it_was(wide_block, module, wide=wide)


def _as_it_was(merged: nn.Module, module: nn.Module, *, wide: bool = False) -> nn.Module:
    """The merged block in the mode, and unless `wide` the type, of what it was made from; changes it."""
    tensors = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    if not wide:
        cast(merged, tensors[0].dtype if tensors else torch.get_default_dtype())
    merged.requires_grad_(any(p.requires_grad for p in module.parameters()))
    return set_modes(merged, training=module.training)


def _merged(block: nn.Module, method: str) -> nn.Module:
    """A float64 block with its branches merged, which changes it. Layers that the method makes are float64
    too, and lie where the block lies.
    """
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
    if "fuse" in methods and not 2 <= _convolutions(module) <= _MOST_CONVOLUTIONS:
        return tuple(method for method in methods if method != "fuse")
    return methods


@once_per_class
def _methods_offered(cls: type) -> tuple[str, ...]:
    return tuple(method for method in _METHODS if callable(getattr(cls, method, None)))


def _convolutions(module: nn.Module) -> int:
    return sum(isinstance(m, nn.Conv2d) for m in module.modules())


def _norm_names(module: nn.Module) -> set[str]:
    return set(_norms(module))


def _norms(module: nn.Module) -> Iterator[str]:
    for name, child in module.named_modules():
        if is_batch_norm_class(type(child)):
            yield name
