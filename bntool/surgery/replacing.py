"""Put modules in the places of others."""

from __future__ import annotations

from torch import nn

from bntool.observe.modules import modules_of


class Slots:
    """The slots of a module tree: where each module is held, under all of its names.

    Args:
        root: the tree, which `replace` changes.
    """

    def __init__(self, root: nn.Module) -> None:
        self._held: dict[int, list[tuple[nn.Module, str]]] = {}
        self._known: set[int] = set()
        self._look_into(root)

    def replace(self, old: nn.Module, new: nn.Module) -> None:
        """Put `new` into every slot that holds `old`; what it holds itself stays, were it `old`."""
        places = self._held.pop(id(old), [])
        for parent, name in places:
            parent._modules[name] = new
        self._held.setdefault(id(new), []).extend(places)
        self._look_into(new)

    def _look_into(self, root: nn.Module) -> None:
        for parent in modules_of(root):
            if id(parent) in self._known:
                continue
            self._known.add(id(parent))
            for name, child in parent._modules.items():
                if child is not None:
                    self._held.setdefault(id(child), []).append((parent, name))
