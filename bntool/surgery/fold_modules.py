"""Apply a fold plan to an `nn.Module`: a structural copy in which only the layers that change are new."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import torch
from torch import Tensor, nn

from bntool.affine import Pair, batch_norm_affine, evaluate, is_finite
from bntool.errors import InvariantError, StateError
from bntool.layers import NORMED
from bntool.observe.copying import is_plain, structural_copy, take_apart
from bntool.plan import Edit, Plan
from bntool.surgery.reparameterising import merge_blocks_of
from bntool.surgery.tensors import edited, edited_norm

_TENSOR_SLOTS = frozenset({"_parameters", "_buffers", "_modules"})
_STOCK_OF = {normed: stock for stock, normed in NORMED.items()}


def apply_fold(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of `model` with every site of a fold plan carried out.

    Untouched layers share their tensors with `model`; `with_own_tensors` gives the copy its own. The
    argument is not changed. Parameters keep `requires_grad`, type, device and memory format.
    """
    copied = structural_copy(model)
    merge_blocks_of(copied, plan)
    return carry_out(copied, plan)


def carry_out(copied: nn.Module, plan: Plan) -> nn.Module:
    """The edits of a plan on a structural copy whose blocks have merged their branches; changes the copy."""
    work = _FoldWork(copied)
    with torch.no_grad():
        for site in plan.fold_sites:
            for edit in site.edits:
                work.carry_out(edit)
        work.write()
    return work.model


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


class _FoldWork:
    """The numbers of every tensor as the edits so far have left them, on the way to the copy's modules.

    Tensors are told by identity: a name can pass from a shared tensor to a clone of it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.numbers: dict[int, tuple[Tensor, Tensor]] = {}
        self.given: dict[str, Tensor] = {}
        self.removed: list[str] = []
        self.pairs: dict[str, Pair] = {}

    def carry_out(self, edit: Edit) -> None:
        if edit.kind == "reparameterize":
            return
        if edit.kind == "remove":
            self.removed.append(edit.layer)
            return
        if edit.kind == "unshare":
            self._unshare(edit)
            return
        assert edit.map is not None
        pair = evaluate(edit.map, self._leaf)
        weight = self._tensor(edit.weight)
        bias = self._tensor(edit.bias) if edit.bias else None
        if edit.layout == "norm":
            new_weight, new_bias = edited_norm(edit, weight, bias, *self._statistics(edit.layer), pair)
            self._set(edit.weight, new_weight)
            self._set(edit.bias, new_bias)
            norm: Any = self.modules[edit.layer]
            norm.affine = True
            self.pairs.clear()
            return
        if weight is None:
            raise InvariantError(f"the plan edits {edit.weight}, which the model does not have")
        changed, made = edited(edit, weight, bias, pair)
        self._set(edit.weight, changed)
        if made is not None and edit.bias:
            self._set(edit.bias, made)

    def _unshare(self, edit: Edit) -> None:
        """Part a layer from its other names, and give it clones of the tensors that it shares."""
        if take_apart(self.model, self.modules[edit.layer]):
            self.modules = dict(self.model.named_modules(remove_duplicate=False))
        for handle in filter(None, (edit.weight, edit.bias)):
            shared = self._slot(handle)
            if shared is None:
                raise InvariantError(f"the plan clones {handle}, which the model does not have")
            self.given.setdefault(handle, shared)
            clone = _clone(shared)
            if id(shared) in self.numbers:
                self.numbers[id(clone)] = clone, self.numbers[id(shared)][1]
            self._put(handle, clone)

    def _leaf(self, kind: str, name: str) -> Any:
        if kind == "tensor":
            # a factor that a law read is no weight that a fold changes; a clone may have taken its name
            return self.given.get(name, self._tensor(name))
        if name not in self.pairs:
            self.pairs[name] = self._norm_pair(name)
        return self.pairs[name]

    def _norm_pair(self, name: str) -> Pair:
        pair: Pair = batch_norm_affine(
            self._tensor(f"{name}.weight" if name else "weight"),
            self._tensor(f"{name}.bias" if name else "bias"),
            *self._statistics(name),
        )
        if not is_finite(pair):
            raise StateError(
                f"the statistics of BatchNorm {name} are not finite, or its variance is negative",
                next_step="make a new plan for these weights: it says which channel",
            )
        return pair

    def _statistics(self, name: str) -> tuple[Tensor, Tensor, float]:
        module: Any = self.modules[name]
        return module.running_mean, module.running_var, float(module.eps)

    # -- tensors ----------------------------------------------------------------------------------------

    def _tensor(self, handle: str) -> Tensor | None:
        held = self._slot(handle)
        return held if held is None else self.numbers.get(id(held), (held, held))[1]

    def _slot(self, handle: str) -> Tensor | None:
        owner, _, slot = handle.rpartition(".")
        module = self.modules[owner]
        found: Tensor | None = module._parameters.get(slot)
        return found if found is not None else module._buffers.get(slot)

    def _put(self, handle: str, tensor: Tensor) -> None:
        owner, _, slot = handle.rpartition(".")
        module = self.modules[owner]
        slots: dict[str, Any] = module._buffers if slot in module._buffers else module._parameters
        slots[slot] = tensor

    def _set(self, handle: str, numbers: Tensor) -> None:
        """New numbers for the tensor of this name; a bias that was not there trains where the weight does."""
        held = self._slot(handle)
        if held is None:
            weight = self.modules[handle.rpartition(".")[0]]._parameters.get("weight")
            held = nn.Parameter(numbers, requires_grad=weight.requires_grad if weight is not None else True)
            self._put(handle, held)
        self.numbers[id(held)] = held, numbers

    # -- writing ----------------------------------------------------------------------------------------

    def write(self) -> None:
        """Put the new tensors into every slot that held the old one, and take the BatchNorms out."""
        replaced = {key: _as_kind(held, new) for key, (held, new) in self.numbers.items()}
        for module in self.modules.values():
            for slots in (module._parameters, module._buffers):
                for name, tensor in slots.items():
                    if id(tensor) in replaced:
                        slots[name] = replaced[id(tensor)]
        for norm in {id(self.modules[name]): self.modules[name] for name in self.removed}.values():
            _become(norm, _what_remains(norm))
        for parent in self.modules.values():
            _unwrap(parent)


def _as_kind(held: Tensor, new: Tensor) -> Tensor:
    """The new tensor as what the old one was: a parameter with its flag, or a buffer."""
    return nn.Parameter(new, requires_grad=held.requires_grad) if isinstance(held, nn.Parameter) else new


def _become(module: nn.Module, other: nn.Module) -> None:
    """Turn a module into another where it stands, for whoever holds it: parents, plain lists, attributes."""
    module.__class__ = type(other)
    module.__dict__ = dict(other.__dict__)


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
    remains = rest[0] if len(rest) == 1 else nn.Sequential(*rest) if rest else nn.Identity()
    remains.training = norm.training
    return remains
