"""What a person would call the new layer, and how its class is spelled in this file."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

_CONV = re.compile(r"(?:^|(?<=_))conv(?=\d|_|$)")
_NORM = re.compile(r"(?:^|_)norm(?=\d|_|$)")
_BN = re.compile(r"(?:^|_)bn(?=\d|_|$)")


def norm_name(layer: str, taken: Collection[str]) -> str:
    """`conv1` -> `bn1`, `features_conv` -> `features_bn`, `squeeze` -> `squeeze_bn`; never a taken name.

    Where the neighbours say `norm`, and none says `bn`, the new one says `norm` too.
    """
    says_norm = any(map(_NORM.search, taken)) and not any(map(_BN.search, taken))
    word = "norm" if says_norm else "bn"
    places = list(_CONV.finditer(layer))
    wanted = [f"{layer}_{word}"]
    if places:
        last = places[-1]
        wanted.insert(0, layer[: last.start()] + word + layer[last.end() :])
    for name in wanted:
        if name not in taken:
            return name
    number = 2
    while f"{wanted[-1]}{number}" in taken:
        number += 1
    return f"{wanted[-1]}{number}"


def moved(old: str, renamed: Mapping[str, Mapping[str, str]]) -> str:
    """A qualified name after children were renamed; `renamed` maps the old name of a parent to theirs."""
    result, path = [], ""
    for part in old.split(".") if old else []:
        result.append(renamed.get(path, {}).get(part, part))
        path = f"{path}.{part}" if path else part
    return ".".join(result)


def joined(parent: str, child: str) -> str:
    """The qualified name of a child."""
    return f"{parent}.{child}" if parent else child
