"""From the plan of an insertion to edits of the file that defines the model's classes.

Each site is found again in the text: the statement `self.conv1 = nn.Conv2d(...)` and the one call of
`self.conv1`, or a child written out in an `nn.Sequential(...)`. What cannot be found so, or could be
reached in another way than the model was seen to take, is refused with its line; then no edit is made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import libcst as cst
import torch
from torch import nn

from bntool.core.plan import Plan
from bntool.core.sites import InsertSite
from bntool.inserting import sequential_names
from bntool.source.homes import Homes
from bntool.source.mentions import Assignment, Family
from bntool.source.naming import joined, moved, norm_name
from bntool.source.reading import Insertion, SourceFile, Unsafe
from bntool.source.sequentials import Entry, entries_of, inserted_after, is_sequential
from bntool.source.spelling import require_maker, spelled


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A site whose edit is not safe: the line it concerns, and why."""

    conv: str
    line: int
    why: str


@dataclasses.dataclass(frozen=True)
class SourcePlan:
    """The edited text, the plan under the names it gives, and the line of every site; or the refusals.

    `text` is the old text where anything is refused.
    """

    text: str
    plan: Plan
    lines: dict[str, int]
    refusals: tuple[Refusal, ...]


def plan_source(file: SourceFile, attribute: str, model: nn.Module, plan: Plan) -> SourcePlan:
    """Edits of `file` that put a BatchNorm at every site of an insertion plan for `model`.

    `attribute` is the name in the file that made the model.
    """
    return _Planner(file, attribute, model, plan).planned()


@dataclasses.dataclass(frozen=True)
class _Group:
    """Sites that the same lines make: one layer of a class, in every instance of that class."""

    home: type | None
    path: tuple[str, ...]
    owners: tuple[str, ...]
    sites: tuple[InsertSite, ...]


class _Planner(Homes):
    def __init__(self, file: SourceFile, attribute: str, model: nn.Module, plan: Plan) -> None:
        super().__init__(file, attribute, model)
        self.plan = plan
        self.insertions: dict[Insertion, None] = {}
        self.names: dict[str, str] = {}
        self.after: dict[str, set[str]] = {}
        self.lines: dict[str, int] = {}
        self.given: dict[type, set[str]] = {}

    def planned(self) -> SourcePlan:
        refusals: list[Refusal] = []
        groups: dict[tuple[type | None, tuple[str, ...]], list[tuple[str, InsertSite]]] = {}
        for site in self.plan.insert_sites:
            try:
                home, owner, path = self.home(site)
            except Unsafe as unsafe:
                refusals.append(Refusal(site.conv, unsafe.line, unsafe.why))
            else:
                groups.setdefault((home, path), []).append((owner, site))
        for (home, path), found in groups.items():
            owners, sites = zip(*found, strict=True)
            try:
                self._edit(_Group(home, path, owners, sites))
            except Unsafe as unsafe:
                refusals += [Refusal(site.conv, unsafe.line, unsafe.why) for site in sites]
        if refusals:
            return SourcePlan(self.file.text, self.plan, {}, tuple(refusals))
        return SourcePlan(self.file.edited(list(self.insertions)), self._named(), self.lines, ())

    # -- one layer of one class -------------------------------------------------------------------------

    def _edit(self, group: _Group) -> None:
        if group.home is None:
            self._edit_literals(group, [self.root_literal()])
            return
        self._require_agreement(group, group.home)
        if issubclass(group.home, nn.Sequential) and not self.assigned(group.home, group.path[0]):
            self._edit_literals(group, [self.own_children(group.home)])
            return
        family = self.family(group.home)
        assigned = family.assignments(group.path[0])
        if len(group.path) == 1:
            self._edit_attribute(group, group.home, family, assigned)
            return
        family.require_plain_container(group.path[0])
        self.require_not_numbered(group.path[0])
        for one in assigned:
            if not is_sequential(self.file, one.value):
                what = self.file.code(one.value).splitlines()[0]
                raise Unsafe(self.file.line(one.value), f"here stands {what}, not an nn.Sequential(...)")
        self._edit_literals(group, [one.value for one in assigned if isinstance(one.value, cst.Call)])

    def _require_agreement(self, group: _Group, home: type) -> None:
        """Every instance of the class must get the BatchNorm, since the same lines make them all."""
        wanted = {site.conv for site in group.sites}
        kind = type(self.modules[group.sites[0].conv])
        for name, module in self.modules.items():
            if not isinstance(module, home):
                continue
            layer = ".".join(([name] if name else []) + list(group.path))
            if layer in self.modules and type(self.modules[layer]) is kind and layer not in wanted:
                reason = next((s.reason.value for s in self.plan.skips if s.name == layer), "not a site")
                line = self.line_of(home, group.path)
                raise Unsafe(line, f"the same line makes {layer}, which gets none ({reason})")

    def _edit_attribute(
        self, group: _Group, home: type, family: Family, assigned: Sequence[Assignment]
    ) -> None:
        """`self.conv1 = ...` gets `self.bn1 = ...` below it, and its call is wrapped."""
        (layer,) = group.path
        site = group.sites[0]
        call, owner = family.call_of(layer)
        self._require_not_reached_from_outside(layer)
        bn = self._new_attribute(home, family, layer)
        made: list[Insertion] = []
        for one in assigned:
            maker = require_maker(self.file, one.value, type(self.modules[site.conv]))
            norm = spelled(self.file, maker, site, self.plan.options, f"{one.owner}.{layer}", moved=False)
            start, end = self.file.span(one.statement)
            line_end, newline = self.file.end_of_line(end)
            indent = self.file.indent(start) or ""
            if self.file.text[start - len(indent) : start] != indent or self.file.indent(start) is None:
                raise Unsafe(self.file.line(one.statement), "the statement does not start its line")
            made += norm.imports
            made.append(Insertion(line_end, f"{newline}{indent}{one.owner}.{bn} = {norm.text}"))
        start, end = self.file.span(call)
        made += [Insertion(start, f"{owner}.{bn}("), Insertion(end, ")")]
        self.insertions.update(dict.fromkeys(made))
        self.given.setdefault(home, set()).add(bn)
        for prefix, site in zip(group.owners, group.sites, strict=True):
            self.names[site.conv] = f"{prefix}.{bn}" if prefix else bn
            self.lines[site.conv] = self.file.line(assigned[0].statement)

    def _require_not_reached_from_outside(self, layer: str) -> None:
        """`Unsafe` where other code of the file calls, exchanges or hands on an attribute of that name."""
        for node in self.file.find(cst.Attribute, self.file.tree):
            base = node.value
            if node.attr.value != layer or isinstance(self.file.parent(node), cst.Attribute):
                continue
            if isinstance(base, cst.Name) and base.value in self._first_parameters(node):
                continue  # a layer of its own, which the class answers for
            if hasattr(torch.Tensor, layer) and not isinstance(base, cst.Attribute):
                continue  # `x.squeeze(1)`, of a tensor
            raise Unsafe(self.file.line(node), f"{self.file.code(node)} reaches the layer from outside")

    def _first_parameters(self, node: cst.CSTNode) -> set[str]:
        around = [f for f in self.file.above(node) if isinstance(f, cst.FunctionDef) and f.params.params]
        in_class = [f for f in around if self.file.enclosing(cst.ClassDef, f) is not None]
        return {f.params.params[0].name.value for f in in_class}

    def _new_attribute(self, home: type, family: Family, layer: str) -> str:
        """A name that nothing in the class, nor any instance of it, has."""
        taken = set(family.names) | set(dir(home)) | self.given.get(home, set())
        for module in self.modules.values():
            if isinstance(module, home):
                taken |= set(vars(module)) | set(dir(module))
        for cls, names in self.given.items():
            if set(self.family(cls).classes) & set(family.classes):
                taken |= names
        return norm_name(layer, taken)

    # -- in a Sequential --------------------------------------------------------------------------------

    def _edit_literals(self, group: _Group, literals: Sequence[cst.Call]) -> None:
        """Put the BatchNorm behind its child in every place that makes this Sequential."""
        steps = list(group.path if group.home is None or self._by_init(group) else group.path[1:])
        outlines = []
        made: list[Insertion] = []
        newcomer, line = "", 0
        for literal in literals:
            call = literal
            for step in steps[:-1]:
                entries, at = self._entry(call, step)
                value = entries[at].value
                if not is_sequential(self.file, value):
                    raise Unsafe(self.file.line(value), "the layer stands in another thing than a Sequential")
                assert isinstance(value, cst.Call)
                call = value
            entries, at = self._entry(call, steps[-1])
            outlines.append(self._outline(entries))
            newcomer = newcomer or self._newcomer(group, entries, at)
            line = line or self.file.line(entries[at].value)
            made += self._beside(group.sites[0], entries, at, newcomer)
        if any(outline != outlines[0] for outline in outlines):
            why = "a condition chooses between Sequentials that do not have the same places"
            raise Unsafe(self.file.line(literals[1]), why)
        self.insertions.update(dict.fromkeys(made))
        for site in group.sites:
            parent, _, child = site.conv.rpartition(".")
            self.after.setdefault(parent, set()).add(child)
            self.names[site.conv] = f"{parent}.{newcomer}" if parent else newcomer
            self.lines[site.conv] = line

    def _by_init(self, group: _Group) -> bool:
        home = group.home
        return home is not None and issubclass(home, nn.Sequential) and not self.assigned(home, group.path[0])

    def _entry(self, call: cst.Call, name: str) -> tuple[list[Entry], int]:
        entries = entries_of(self.file, call)
        names = [entry.name for entry in entries]
        if name not in names:
            raise Unsafe(self.file.line(call), f"there is no layer {name} written out here")
        return entries, names.index(name)

    def _outline(self, entries: Sequence[Entry]) -> list[tuple[str, str, str]]:
        """Each convolution that is written out, by name, with what makes it and what comes next."""
        made = [self._made(entry.value) for entry in entries]
        return [
            (entry.name, one, following)
            for entry, one, following in zip(entries, made, [*made[1:], ""], strict=True)
            if "conv" in one.lower() or "linear" in one.lower()
        ]

    def _made(self, value: cst.BaseExpression) -> str:
        return self.file.code(value.func) if isinstance(value, cst.Call) else self.file.code(value)

    def _newcomer(self, group: _Group, entries: Sequence[Entry], at: int) -> str:
        """Its name; in a numbered Sequential the numbers are settled when all newcomers are known."""
        if entries[at].style == "position":
            return ""
        parent = group.sites[0].conv.rpartition(".")[0]
        taken = {entry.name for entry in entries}
        taken |= {n.rpartition(".")[2] for n in self.names.values() if n.rpartition(".")[0] == parent}
        return norm_name(entries[at].name, taken)

    def _beside(self, site: InsertSite, entries: Sequence[Entry], at: int, newcomer: str) -> list[Insertion]:
        value, cls = entries[at].value, type(self.modules[site.conv])
        layer = ""
        if isinstance(value, cst.Name):
            layer = value.value
            value = self.local(value)
        maker = require_maker(self.file, value, cls)
        norm = spelled(self.file, maker, site, self.plan.options, layer, moved=bool(layer))
        return [*norm.imports, inserted_after(self.file, entries, at, newcomer, norm.text)]

    # -- names ------------------------------------------------------------------------------------------

    def _named(self) -> Plan:
        """The plan under the names that the edited file gives, with the way old keys move."""
        renamed: dict[str, dict[str, str]] = {}
        newcomers: dict[tuple[str, str], str] = {}
        of_module: dict[int, dict[str, str]] = {}
        for parent, after in self.after.items():
            module = self.modules[parent]
            numbered = all(not self.names[joined(parent, c)].rpartition(".")[2] for c in after)
            if numbered:
                children = tuple(module._modules)
                of_module[id(module)], named = sequential_names(children, after, keep_keys=False)
                newcomers.update({(parent, child): new for child, new in named.items()})
        for name, module in self.model.named_modules(remove_duplicate=False):
            if id(module) in of_module:
                renamed[name] = of_module[id(module)]
        sites = []
        for site in self.plan.insert_sites:
            parent, _, child = site.conv.rpartition(".")
            if (parent, child) in newcomers:
                bn = joined(moved(parent, renamed), newcomers[parent, child])
            else:
                owner, _, own = self.names[site.conv].rpartition(".")
                bn = joined(moved(owner, renamed), own)
            sites.append(dataclasses.replace(site, bn=bn))
        keys = {old: moved(old, renamed) for old in self.model.state_dict()}
        key_map = {old: new for old, new in keys.items() if new != old}
        return dataclasses.replace(self.plan, sites=tuple(sites), key_map=key_map)
