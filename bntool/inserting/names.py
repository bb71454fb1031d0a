"""The newcomers' qualified names, and how old names move."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bntool.core.options import InsertOptions
from bntool.graph.dataflow import Graph
from bntool.inserting.places import Draft

Rename = Callable[[str], str]
"""The qualified name of today -> the one after the insertion."""
_INSIDE = ""
"""Marks a layer that becomes a child of what stands in its place: all below it moves one level down."""


def name_newcomers(
    graph: Graph, drafts: Sequence[Draft], options: InsertOptions
) -> tuple[list[list[str]], Rename]:
    """Every draft's qualified names, the first one first, and how all other names move.

    A newcomer has as many names as the module that it stands in.
    """
    renamed: dict[str, dict[str, str]] = {}
    new_names: dict[tuple[str, str], str] = {}
    by_parent: dict[str, set[str]] = {}
    for draft in drafts:
        if draft.form == "sequential":
            by_parent.setdefault(draft.slot, set()).add(draft.after_child)
        elif draft.form == "pair":
            for name in (draft.conv, *graph.aliases.get(draft.conv, ())):
                renamed[name] = {_INSIDE: "0"}
    for parent, wanted in by_parent.items():
        children, newcomers = sequential_names(graph.modules[parent].children, wanted, options.keep_keys)
        for name in (parent, *graph.aliases.get(parent, ())):
            renamed[name] = children
        new_names.update({(parent, child): new for child, new in newcomers.items()})

    def rename(old: str) -> str:
        result, path = [], ""
        for part in old.split(".") if old else []:
            below = renamed.get(path, {})
            result += [below[_INSIDE]] if _INSIDE in below else []
            result.append(below.get(part, part))
            path = f"{path}.{part}" if path else part
        return ".".join(result)

    def newcomer(draft: Draft, slot: str) -> str:
        if draft.form == "sequential":
            return _join(rename(slot), new_names[draft.slot, draft.after_child])
        if draft.form == "wrap":
            return _join(rename(slot), "1" if options.position == "after" else "0")
        if draft.form == "identity":
            return rename(slot)
        if draft.form == "node":
            return f"{slot}_bn"
        return _join(rename(slot), "1" if draft.form == "pair" else "bn")

    slots = [(draft.slot, *graph.aliases.get(draft.slot, ())) for draft in drafts]
    names = [[newcomer(draft, s) for s in every] for draft, every in zip(drafts, slots, strict=True)]
    return names, rename


def sequential_names(
    children: Sequence[str], after: set[str], keep_keys: bool
) -> tuple[dict[str, str], dict[str, str]]:
    """New names of a Sequential's children, and the newcomers' names by the child they come after.

    Numbered children are numbered anew; named ones, and numbered ones under `keep_keys`, keep their
    names and the newcomer is called `<child>_bn`.
    """
    numbered = list(children) == [str(i) for i in range(len(children))]
    renamed: dict[str, str] = {}
    newcomers: dict[str, str] = {}
    if keep_keys or not numbered:
        for child in after:
            name = f"{child}_bn"
            while name in children or name in newcomers.values():
                name += "_"
            newcomers[child] = name
        return renamed, newcomers
    index = 0
    for child in children:
        renamed[child] = str(index)
        index += 1
        if child in after:
            newcomers[child] = str(index)
            index += 1
    return renamed, newcomers


def _join(parent: str, child: str) -> str:
    return f"{parent}.{child}" if parent else child
