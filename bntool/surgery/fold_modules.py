"""Apply a fold plan to an `nn.Module`: a structural copy in which only the layers that change are new."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bntool.core.errors import InvariantError
from bntool.core.plan import Plan
from bntool.core.sites import Branch, Edit, Merge, Window
from bntool.layers import NORMED, Absorbed, Passing
from bntool.observe.copying import is_plain, structural_copy, take_apart
from bntool.observe.modules import is_batch_norm_class
from bntool.observe.stand_in import set_modes
from bntool.surgery.editing import ROLES, Role, Slot, StoredNorm, apply_edits, removed_norms
from bntool.surgery.reparameterising import merge_blocks_of

_TENSOR_SLOTS = frozenset({"_parameters", "_buffers", "_modules"})
_STOCK_OF = {normed: stock for stock, normed in NORMED.items()}


Numbers = Mapping[int, Callable[[], Tensor]]
"""What gives the numbers of new tensors before they were rounded, in float64, by the tensor's identity."""


def apply_fold(model: nn.Module, plan: Plan, *, wide: bool = False) -> nn.Module:
    """A copy of `model` with every site of a fold plan carried out.

    Untouched layers share their tensors with `model`; `with_own_tensors` gives the copy its own. The
    argument is not changed. Parameters keep `requires_grad`, type, device and memory format; with `wide`
    those that change are left in float64.
    """
    return apply_exactly(model, plan, wide=wide)[0]


def apply_exactly(model: nn.Module, plan: Plan, *, wide: bool = False) -> tuple[nn.Module, Numbers]:
    """`apply_fold`, and the numbers of all that is new before they were rounded: none where blocks merged."""
    copied = structural_copy(model)
    merged = merge_blocks_of(copied, plan, wide=wide)
    copied, numbers = carry_out(copied, plan, wide=wide)
    return copied, {} if merged else numbers


def carry_out(copied: nn.Module, plan: Plan, *, wide: bool = False) -> tuple[nn.Module, Numbers]:
    """The edits of a plan on a structural copy whose blocks have merged their branches; changes the copy.

    Returns the copy, and the numbers of its new tensors before they were rounded.
    """
    tensors = _ModuleTensors(copied, plan.eps, torch.float64 if wide else None)
    edits = apply_edits(tensors, plan)
    tensors.write(removed_norms(plan))
    for merge in plan.merges:
        tensors.merge(merge)
    for module in copied.modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            module._assign_modules_buffers()  # it keeps a list of those that it hands on
    return copied, {id(new): functools.partial(edits.exact, slot) for slot, new in tensors.new.items()}


def with_own_tensors(folded: nn.Module, original: nn.Module) -> nn.Module:
    """Give every parameter and buffer that `folded` still shares with `original` its own memory.

    Tensors tied to each other stay tied.
    """
    theirs = {
        id(t) for m in original.modules() for slots in (m._parameters, m._buffers) for t in slots.values()
    }
    modules = list(folded.modules())
    made: dict[int, Tensor] = {}
    for module in modules:
        for slots in (module._parameters, module._buffers):
            for name, tensor in slots.items():
                if tensor is None or id(tensor) not in theirs:
                    continue
                if id(tensor) not in made:
                    made[id(tensor)] = _clone(tensor)
                slots[name] = made[id(tensor)]  # type: ignore[assignment]
    _own_attributes(modules, made)
    return folded


def _own_attributes(modules: list[nn.Module], made: dict[int, Tensor]) -> None:
    """Tensors in plain attributes, lists and the like: tied ones stay tied to their new selves."""
    memo: dict[int, Any] = {**made, **{id(module): module for module in modules}}
    for module in modules:
        for key, value in module.__dict__.items():
            if not is_plain(value) and key not in _TENSOR_SLOTS and _holds_tensor(value):
                # what Python cannot copy (a tensor that autograd made) stays shared
                with contextlib.suppress(Exception):
                    module.__dict__[key] = copy.deepcopy(value, memo)


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple | set):
        return bool(value) and any(map(_holds_tensor, value))
    return isinstance(value, Tensor)


def _clone(tensor: Tensor) -> Tensor:
    with torch.no_grad():
        copied = tensor.detach().clone(memory_format=torch.preserve_format)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(copied, requires_grad=tensor.requires_grad)
    return copied


class _ModuleTensors:
    """The tensors of a structural copy, told by identity: a name can pass from a shared tensor to a clone."""

    def __init__(self, model: nn.Module, eps: Mapping[str, float], dtype: torch.dtype | None) -> None:
        self.model, self.eps, self.dtype = model, eps, dtype
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.held: dict[Slot, Tensor] = {}
        self.made: set[Slot] = set()
        self.new: dict[Slot, Tensor] = {}

    def slot(self, part: Edit | Branch | Merge, role: Role) -> Slot:
        weight = self.constant(part.weight)
        return self._slot(part.weight if role == "weight" else part.bias, weight)

    def norm(self, name: str) -> StoredNorm:
        module: Any = self.modules[name]
        mean = module.running_mean
        gamma, beta = (self._slot(f"{name}.{role}".lstrip("."), mean) for role in ROLES)
        return StoredNorm(gamma, beta, mean, module.running_var, self._eps_of(name))

    def _eps_of(self, name: str) -> float:
        """Its own ε; a class that has it in its forward alone keeps it in the plan."""
        own = getattr(self.modules[name], "eps", None)
        return float(own) if isinstance(own, int | float) else self.eps.get(name, 0.0)

    def constant(self, handle: str) -> Tensor:
        held = self._tensor(handle)
        if held is None:
            raise InvariantError(f"the plan names {handle}, which the model does not have")
        return held

    def stored(self, slot: Slot) -> Tensor | None:
        return None if slot in self.made else self.held[slot]

    def like(self, slot: Slot) -> Tensor:
        held = self.held[slot]
        return held if self.dtype is None else torch.empty_like(held, dtype=self.dtype)

    def put(self, slot: Slot, tensor: Tensor) -> None:
        self.new[slot] = _as_kind(self.held[slot], tensor)

    def unshare(self, edit: Edit) -> Iterator[tuple[Slot, Slot]]:
        """Part a layer from its other names, and give it clones of the tensors that it shares."""
        if take_apart(self.model, self.modules[edit.layer]):
            self.modules = dict(self.model.named_modules(remove_duplicate=False))
        for handle in filter(None, (edit.weight, edit.bias)):
            shared = self.constant(handle)
            old, clone = self._slot(handle, shared), _clone(shared)
            self._put(handle, clone)
            if old in self.made:
                self.made.add(id(clone))
            yield old, self._slot(handle, shared)

    def write(self, removed: Iterable[str]) -> None:
        """Put the new tensors into every slot that held the old one, and take the BatchNorms out."""
        module: Any
        for module in self.modules.values():
            for slots in (module._parameters, module._buffers):
                for name, tensor in slots.items():
                    slot = id(tensor)
                    if slot in self.held:
                        slots[name] = self.new.get(slot, None if slot in self.made else tensor)
                    if slot in self.made and hasattr(module, "affine"):
                        module.affine = slot in self.new
        for norm in {id(self.modules[name]): self.modules[name] for name in removed}.values():
            _become(norm, _what_remains(norm))
        for parent in self.modules.values():
            _unwrap(parent)

    def merge(self, merge: Merge) -> None:
        """Let one convolution look at its input as the whole sum does, and the other layers give zeros."""
        heir: Any = self.modules[merge.layer]
        window = merge.window
        heir.kernel_size, heir.stride, heir.dilation = window.kernel, window.stride, window.dilation
        heir.padding, heir.groups = window.before, window.groups
        heir._reversed_padding_repeated_twice = [n for n in reversed(window.before) for _ in range(2)]
        for norm in (self.modules[name] for name in merge.norms if name not in merge.values):
            _become(norm, _what_remains(norm))
        for layer in (self.modules[name] for name in merge.values):
            _become(layer, set_modes(_zeros_of(layer, heir.out_channels, window), training=layer.training))

    # -- tensors ----------------------------------------------------------------------------------------

    def _slot(self, handle: str, like: Tensor) -> Slot:
        """The tensor of this name; one that is not there yet is put there empty, for all who share it."""
        held = self._tensor(handle)
        if held is None:
            weight = self.modules[handle.rpartition(".")[0]]._parameters.get("weight")
            trains = weight is None or weight.requires_grad
            held = nn.Parameter(like.new_empty(0), requires_grad=trains)
            self._put(handle, held)
            self.made.add(id(held))
        self.held[id(held)] = held
        return id(held)

    def _tensor(self, handle: str) -> Tensor | None:
        owner, _, slot = handle.rpartition(".")
        module = self.modules[owner]
        found: Tensor | None = module._parameters.get(slot)
        return found if found is not None else module._buffers.get(slot)

    def _put(self, handle: str, tensor: Tensor) -> None:
        owner, _, slot = handle.rpartition(".")
        module = self.modules[owner]
        slots: dict[str, Any] = module._buffers if slot in module._buffers else module._parameters
        slots[slot] = tensor


def _as_kind(held: Tensor, new: Tensor) -> Tensor:
    """The new tensor as what the old one was: a parameter with its flag, or a buffer."""
    return nn.Parameter(new, requires_grad=held.requires_grad) if isinstance(held, nn.Parameter) else new


def _become(module: nn.Module, other: nn.Module) -> None:
    """Turn a module into another where it stands, for whoever holds it: parents, plain lists, attributes."""
    module.__class__ = type(other)
    module.__dict__ = dict(other.__dict__)


def _zeros_of(layer: nn.Module, channels: int, window: Window) -> Absorbed:
    """What stands for a branch of a sum of this window and so many channels."""
    if is_batch_norm_class(type(layer)) or hasattr(layer, "running_mean"):
        return Absorbed()
    reach = zip(window.kernel, window.dilation, window.before, window.after, strict=True)
    return Absorbed(channels, window.stride, [d * (k - 1) - p - q for k, d, p, q in reach])


def _unwrap(parent: nn.Module) -> None:
    """A convolution that held its BatchNorm as a child is a plain convolution again."""
    for name, child in list(parent._modules.items()):
        stock = _STOCK_OF.get(type(child)) if child is not None else None
        if child is None or stock is None or not isinstance(child._modules.get("bn"), nn.Identity):
            continue
        plain = stock.__new__(stock)
        plain.__dict__.update(child.__dict__)
        plain._modules = {k: v for k, v in child._modules.items() if k != "bn"}
        parent._modules[name] = plain


def _what_remains(norm: nn.Module) -> nn.Module:
    """What a folded BatchNorm leaves behind: its own dropout and activation, or nothing."""
    own = (norm._modules.get(name) for name in ("drop", "act"))
    rest = [module for module in own if module is not None and not isinstance(module, nn.Identity)]
    nothing = Passing if _takes_more(norm) else nn.Identity
    remains = rest[0] if len(rest) == 1 else nn.Sequential(*rest) if rest else nothing()
    remains.training = norm.training
    return remains


def _takes_more(norm: nn.Module) -> bool:
    """Whether its forward may be handed more than the data, such as a mask or a domain."""
    try:
        return len(inspect.signature(norm.forward).parameters) > 1
    except (TypeError, ValueError):
        return False
