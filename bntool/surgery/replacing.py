"""Put a module in the place of another."""

from __future__ import annotations

from torch import nn


def replace_everywhere(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` into every slot that holds `old`: a module may be registered under several names."""
    for parent in list(root.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                parent._modules[name] = new
