"""A verdict for every layer: a site in the least intrusive form that fits, or a skip with its reason."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

from bntool.core.errors import UsageError
from bntool.core.options import InsertOptions
from bntool.core.patterns import chosen, require_matches
from bntool.core.plan import Plan
from bntool.core.reasons import Reason
from bntool.core.sites import DroppedBias, InsertSite, Skip
from bntool.graph.dataflow import READS_NUMBERS, Graph, Module, Op, Value
from bntool.inserting.activations import Activation, activation_of
from bntool.inserting.biases import batched_rank, own_bias, redundant_biases, untouched
from bntool.inserting.forms import Refuse, form_of
from bntool.inserting.names import Rename, name_newcomers
from bntool.inserting.places import Draft, Form, passes, passes_node

_NORMS = frozenset(
    {"batch_norm", "instance_norm", "group_norm", "layer_norm", "native_layer_norm", "rms_norm"}
)


def plan_insert(graph: Graph, options: InsertOptions) -> Plan:
    """Give every convolution (and linear layer, on request) of a module tree a verdict: a site or a skip."""
    options.validate()
    return _Planner(graph, options).plan()


def plan_insert_nodes(graph: Graph, options: InsertOptions) -> Plan:
    """The same for a graph without a module tree, such as an ONNX model: every newcomer is a node.

    Raises `UsageError` for options that only a module tree can carry out.
    """
    options.validate()
    plain = InsertOptions()
    for name in ("position", "affine", "init", "keep_keys", "portable", "sync", "drop_bias"):
        if getattr(options, name) != getattr(plain, name):
            raise UsageError(
                f"{name.replace('_', '-')} is for modules; a graph has none",
                next_step="a graph takes identity-initialised BatchNorms before the activation",
            )
    return _Planner(graph, options, tree=False).plan()


class _Planner:
    def __init__(self, graph: Graph, options: InsertOptions, *, tree: bool = True) -> None:
        self.graph = graph
        self.options = options
        self.tree = tree
        self.by_layer: dict[str, list[Op]] = {}
        for op in graph.of_kind("conv", "linear", "matmul"):
            if not graph.input(op).constant:
                self.by_layer.setdefault(self._owner(op), []).append(op)

    def _owner(self, op: Op) -> str:
        """The module whose layer this op is: the layer that runs it, else the owner of the weight."""
        module = self.graph.modules.get(op.scope)
        if module is not None and module.role in ("conv", "linear"):
            return op.scope
        handle = self.graph.input(op, "weight").handle
        return handle.rpartition(".")[0] if handle else op.scope

    def plan(self) -> Plan:
        layers = {name for name, m in self.graph.modules.items() if m.role in ("conv", "linear")}
        for globs in (self.options.include, self.options.exclude):
            require_matches(globs, layers | set(self.by_layer), "layer")
        drafts, skips = self._verdicts()
        drafts, left_out = self._wanted(drafts, skips)
        names, rename = name_newcomers(self.graph, drafts, self.options)
        sites = [
            InsertSite(d.conv, d.activation, first, d.channels, d.form, d.dims, d.kind, d.slot, d.calls)
            for d, (first, *_) in zip(drafts, names, strict=True)
        ]
        dropped = tuple(self._dropped(drafts, sites, rename)) if self.options.drop_bias else ()
        aliases = {
            first: tuple(others)
            for site, known in zip(sites, names, strict=True)
            for first, *others in zip(*map(site.norms_at, known), strict=True)
            if others
        }
        handles = [n for first in self.graph.tensors for n in (first, *self.graph.aliases.get(first, ()))]
        return Plan(
            action="insert",
            sites=tuple(sites),
            skips=(*skips, *left_out),
            model_class=self.graph.model_class,
            signature=self.graph.signature(),
            options=self.options.to_dict(),
            key_map={old: rename(old) for old in handles if rename(old) != old},
            notes=tuple(self._warnings(drafts)),
            dropped=dropped,
            aliases={**aliases, **dict(self._known_elsewhere(dropped, rename))},
        )

    def _known_elsewhere(
        self, dropped: Sequence[DroppedBias], rename: Rename
    ) -> Iterator[tuple[str, tuple[str, ...]]]:
        """The other names of biases that go, and of old BatchNorms that take them in."""
        first = {rename(old): old for old in self.graph.aliases}
        for name in (name for d in dropped for name in (rename(d.bias), *d.norms)):
            if name in first:
                yield name, tuple(map(rename, self.graph.aliases[first[name]]))

    def _warnings(self, drafts: Sequence[Draft]) -> Iterator[str]:
        if self.graph.reads_numbers:
            yield READS_NUMBERS
        lone = [draft.conv for draft in drafts if draft.lone]
        if lone:
            named = ", ".join(lone[:3]) + (f" and {len(lone) - 3} more" if len(lone) > 3 else "")
            yield (
                f"one value per channel of each sample behind {named} (1x1 maps, or a linear layer): "
                "a training batch needs two samples or more"
            )

    def _verdicts(self) -> tuple[list[Draft], list[Skip]]:
        drafts, skips = [], []
        wanted = {"conv", "linear", "matmul"} if self.options.linear else {"conv"}
        for name, ops in self.by_layer.items():
            if ops[0].kind not in wanted:
                continue
            try:
                drafts.append(self._draft(name, ops))
            except Refuse as refusal:
                skips.append(Skip(name or "(root)", refusal.reason, refusal.detail))
        for name, module in self.graph.modules.items():
            if module.role in wanted and name not in self.by_layer:
                skips.append(Skip(name, Reason.NOT_OBSERVED, "it did not run on the example input"))
        return drafts, skips

    def _wanted(self, drafts: list[Draft], skips: list[Skip]) -> tuple[list[Draft], list[Skip]]:
        """The sites that are left by --skip-last and --every, and a skip for each of the others.

        Layers that are normalised already count, so that a second insertion chooses the same places.
        """
        normed = {skip.name for skip in skips if skip.reason is Reason.ALREADY_NORMALISED}
        names = {draft.conv for draft in drafts} | normed
        places = {name: i for i, name in enumerate(name for name in self.by_layer if name in names)}
        last = len(places) - 1 if self.options.skip_last else len(places)
        kept = [d for d in drafts if places[d.conv] < last and places[d.conv] % self.options.every == 0]
        left_out = [
            Skip(
                d.conv,
                Reason.EXCLUDED,
                "the last site, left out" if places[d.conv] == last else "left out by every",
            )
            for d in drafts
            if d not in kept
        ]
        return kept, left_out

    def _dropped(
        self, drafts: Sequence[Draft], sites: Sequence[InsertSite], rename: Rename
    ) -> list[DroppedBias]:
        found = [
            dataclasses.replace(old, norms=tuple(rename(norm) for norm in old.norms))
            for old in redundant_biases(self.graph)
            if chosen(old.conv, self.options.include, self.options.exclude)
        ]
        for draft, site in zip(drafts, sites, strict=True):
            if draft.direct and (bias := own_bias(self.graph, self.by_layer[draft.conv])):
                found.append(DroppedBias(draft.conv, bias, site.norms, draft.channels))
        return found

    # -- one layer --------------------------------------------------------------------------------------

    def _draft(self, name: str, ops: Sequence[Op]) -> Draft:
        module = self.graph.modules.get(name)
        if not chosen(name, self.options.include, self.options.exclude):
            raise Refuse(Reason.EXCLUDED, "left out by --include/--exclude")
        if module is None or module.role not in ("conv", "linear") or ops[0].scope != name:
            raise Refuse(Reason.NOT_A_MODULE, "a function call inside forward, not a layer of its own")
        if module.from_outside:
            raise Refuse(Reason.NOT_A_MODULE, "it is called through a lambda or an object that no copy has")
        if not self.tree and not self.graph.input(ops[0], "weight").handle:
            raise Refuse(Reason.WEIGHT_COMPUTED, "its weight is no stored tensor of the graph")
        if max(len(ops), module.calls) > 1:
            self._require_per_call(ops, module)
        found = [self._activation(op) for op in ops]
        activations = [activation for activation, _ in found]
        last = [activation.last for activation in activations]
        values = ops if self.options.position == "before" else last
        shapes = {self.graph.output(op).shape for op in values}
        for op in last if self.options.position == "after" else ():
            self._require_not_normed(self.graph.output(op))
            self._require_unseen(self.graph.output(op))
        rank = batched_rank(ops[0])
        for shape in shapes:
            if len(shape) != rank:
                raise Refuse(
                    Reason.AXIS_MISMATCH, f"its output has {len(shape)} axes; BatchNorm needs {rank}"
                )
        value = self.graph.output(values[0])
        node: tuple[Form, str, str] = ("node", name, "")
        form, slot, child = (
            form_of(self.graph, self.options, module, activations, value) if self.tree else node
        )
        behind_layer = form in ("sequential", "subclass", "pair") and self.options.position == "before"
        straight = all(
            not between and untouched(self.graph, self.graph.output(op))
            for op, (_, between) in zip(ops, found, strict=True)
        )
        return Draft(
            name,
            last[0].scope,
            activations[0].kind,
            value.shape[1],
            ops[0].attrs.get("dims", 1),
            form,
            slot,
            child,
            calls=len(ops),
            direct=behind_layer or straight,
            lone=any(math.prod(shape[2:]) == 1 for shape in shapes),
        )

    def _require_per_call(self, ops: Sequence[Op], module: Module) -> None:
        count = max(len(ops), module.calls)
        if not self.options.per_call:
            raise Refuse(
                Reason.CALLED_MORE_THAN_ONCE,
                f"it runs {count} times; one BN would mix them (--per-call gives each call its own)",
            )
        if len(ops) != module.calls:
            raise Refuse(Reason.CALLED_MORE_THAN_ONCE, f"its weight is also read outside its {count} calls")

    def _activation(self, op: Op) -> tuple[Activation, int]:
        """The one activation that reads the layer's output, and how many ops stand between."""
        value = self.graph.output(op)
        between = 0
        while True:
            readers = [self.graph.ops[r] for r, _ in value.readers]
            self._require_not_normed(value)
            self._require_unseen(value)
            if not readers:
                raise Refuse(Reason.NO_ACTIVATION, "nothing reads its output")
            if found := activation_of(self.graph, value):
                break
            if len(readers) > 1:
                others = ", ".join(r.label for r in readers[:3])
                raise Refuse(Reason.OUTPUT_USED_ELSEWHERE, f"its output is read by {others}")
            reader = readers[0]
            behind = not self.tree and passes_node(self.graph, reader)
            if not behind and not passes(reader, pooling=self.options.pooling):
                raise Refuse(Reason.NO_ACTIVATION, f"{reader.label} follows, not an activation")
            value = self.graph.output(reader)
            between += 1
        if "any" not in self.options.activations and found.kind not in self.options.activations:
            raise Refuse(Reason.OTHER_ACTIVATION, f"{found.kind} follows; --activation {found.kind} takes it")
        return found, between

    def _require_not_normed(self, value: Value) -> None:
        readers = [self.graph.ops[r] for r, _ in value.readers]
        if len(readers) == 1 and readers[0].kind in _NORMS:
            raise Refuse(Reason.ALREADY_NORMALISED, f"{readers[0].label} follows")

    def _require_unseen(self, value: Value) -> None:
        if value.is_output:
            raise Refuse(Reason.NO_ACTIVATION, "its output is returned by the model")
        if value.escapes:
            raise Refuse(Reason.OUTPUT_ESCAPES, "its output is kept beyond the forward")
        if value.watched:
            raise Refuse(Reason.HOOKED, f"a hook on {value.watched[0]} sees its output")
