"""Plan a fold: for every BatchNorm, move its affine map along the graph until linear layers take it in.

Upstream first (into the producer), then downstream (into every consumer), then split: scale one way and
shift the other. A way counts only where every step of it is exact; otherwise the BN stays, with the
reason. The planner reads numbers and touches nothing; `surgery` carries the plan out.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import heapq
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from bntool.affine import Affine, batch_norm_affine, compose, identity, merge
from bntool.graph import Graph, Op, Value
from bntool.laws import LAWS, Refused
from bntool.laws.taking import TAKERS, bias_from_input_shift, input_map, layout_of, output_demand, rows
from bntool.plan import Edit, FoldSite, Plan, Skip
from bntool.reasons import Reason

_MAX_ATTEMPTS = 16
"""How many ways to hand out shifts among summed branches are tried for one BatchNorm."""
_VIEWS = frozenset(
    """identity reshape permute slice select split expand expand_as unbind movedim moveaxis swapdims mT numpy_T
    adjoint diagonal unfold as_strided overwritten_view""".split()
)
"""Kinds of op whose output may be the memory of their input."""
_MAX_PASSES = 4
"""A fold can open the way for a BatchNorm that was kept before; passes end when nothing changes."""


def plan_fold(graph: Graph, *, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()) -> Plan:
    """Give every BatchNorm of the graph a verdict: a site with its edits, or a skip with its reason."""
    with torch.no_grad():
        return _Planner(graph, include, exclude).plan()


@dataclasses.dataclass
class _Norm:
    """One BatchNorm layer: all its calls, and its affine map as it stands now."""

    name: str
    ops: list[Op]
    affine: Affine | None = None

    def placed(self, graph: Graph, op: Op) -> Affine:
        """The map over the channel axis of this call's data."""
        assert self.affine is not None
        return self.affine.then("place", len(graph.input(op).shape), op.attrs["axis"])


@dataclasses.dataclass(frozen=True)
class _Take:
    """A linear layer takes a vector of channels in at its output or input side."""

    op: Op
    side: str
    vector: Affine


@dataclasses.dataclass
class _Way:
    """What one successful move collected: the layers that take in, and the laws passed on the way."""

    takes: list[_Take] = dataclasses.field(default_factory=list)
    laws: list[str] = dataclasses.field(default_factory=list)


class _Planner:
    """Holds what the plan so far has changed. Laws see it as their context."""

    def __init__(self, graph: Graph, include: Sequence[str], exclude: Sequence[str]) -> None:
        self.graph = graph
        self.include, self.exclude = tuple(include), tuple(exclude)
        self.norms = _find_norms(graph)
        self.norm_of = {op.id: norm for norm in self.norms for op in norm.ops}
        self.gone: set[int] = set()
        self.created_bias: set[str] = set()
        self.halves: dict[str, Tensor] = {}
        self.asked_halves: dict[str, Tensor] = {}
        self.choices: list[int] = []
        self.widths: list[int] = []

    # -- the plan ---------------------------------------------------------------------------------------

    def plan(self) -> Plan:
        sites: list[FoldSite] = []
        skips: dict[str, Skip] = {}
        waiting = []
        for norm in self.norms:
            refusal = self._unfit(norm)
            if refusal is None:
                waiting.append(norm)
            else:
                skips[norm.name] = Skip(norm.name, refusal.reason, refusal.detail)
        for _ in range(_MAX_PASSES):
            kept = []
            for norm in waiting:
                try:
                    sites.append(self._fold(norm))
                    skips.pop(norm.name, None)
                except Refused as refusal:
                    skips[norm.name] = Skip(norm.name, refusal.reason, refusal.detail)
                    kept.append(norm)
            if len(kept) == len(waiting):
                break
            waiting = kept
        order = {norm.name: i for i, norm in enumerate(self.norms)}
        return Plan(
            action="fold",
            sites=tuple(sites),
            skips=tuple(sorted(skips.values(), key=lambda s: order[s.name])),
            model_class=self.graph.model_class,
            signature=self.graph.signature(),
            options={"include": list(self.include), "exclude": list(self.exclude)},
        )

    def _unfit(self, norm: _Norm) -> Refused | None:
        """Why this BatchNorm cannot go, whatever stands around it; else reads its affine map."""
        module = self.graph.modules.get(norm.name)
        if not _matches(norm.name, self.include) or _matches(norm.name, self.exclude):
            return Refused(Reason.EXCLUDED, "left out by --include/--exclude")
        if not norm.ops:
            return Refused(Reason.NOT_OBSERVED, "it did not run on the example input")
        if module is None or not module.role:
            return Refused(Reason.FUNCTIONAL, "a function call inside forward, not a layer of its own")
        if module.role == "scripted":
            return Refused(Reason.SCRIPTED, "it belongs to a TorchScript module")
        if module.role == "custom_norm":
            return Refused(Reason.CUSTOM_FORWARD, f"{module.kind} has a forward of its own")
        if module.hooked:
            return Refused(Reason.HOOKED, "a hook is registered on it")
        op = norm.ops[0]
        if op.attrs["training"] or "running_mean" not in op.inputs:
            return Refused(Reason.BATCH_STATISTICS, "it normalises by the statistics of each batch")
        if module.left_in_train:
            return Refused(Reason.BATCH_STATISTICS, "it was left in train mode in a model in eval mode")
        return self._read_affine(norm, op)

    def _read_affine(self, norm: _Norm, op: Op) -> Refused | None:
        tensors = {
            role: self.graph.constant(self.graph.input(op, role))
            for role in ("weight", "bias", "running_mean", "running_var")
            if role in op.inputs
        }
        for role, tensor in tensors.items():
            if tensor is None or not self.graph.input(op, role).handle:
                return Refused(Reason.WEIGHT_COMPUTED, f"its {role} is computed, not stored")
            for reader, _ in self.graph.input(op, role).readers:
                other = self.norm_of.get(reader)
                if other is None or other.name not in self.graph.modules:
                    return Refused(Reason.WEIGHT_SHARED, f"{self.graph.ops[reader].label} reads its {role} too")
            bad = _first_bad(tensor, "negative" if role == "running_var" else "")
            if bad:
                return Refused(Reason.BAD_STATISTICS, f"{role} {bad}")
        mean, variance = tensors["running_mean"], tensors["running_var"]
        assert mean is not None and variance is not None
        if bool((variance.double() + op.attrs["eps"] <= 0).any()):
            return Refused(Reason.BAD_STATISTICS, "running_var + eps is zero")
        scale, shift = batch_norm_affine(
            tensors.get("weight"), tensors.get("bias"), mean, variance, op.attrs["eps"]
        )
        norm.affine = Affine(scale, shift, ("bn", norm.name))
        return None

    # -- one BatchNorm ----------------------------------------------------------------------------------

    def _fold(self, norm: _Norm) -> FoldSite:
        """The site of this BatchNorm by the first exact way; refused where there is none."""
        placed = {op.id: norm.placed(self.graph, op) for op in norm.ops}
        refusals: list[tuple[str, Refused]] = []
        ways: list[tuple[str, dict[int, Affine], dict[int, Affine]]] = [("upstream", placed, {})]
        ways.append(("downstream", {}, placed))
        if norm.affine is not None and norm.affine.has_shift and norm.affine.has_scale:
            scales = {i: m.then("scale_part") for i, m in placed.items()}
            ways.append(("split", scales, {i: m.then("shift_part") for i, m in placed.items()}))
            if bool((norm.affine.scale != 0).all()):
                shifts = {i: m.then("unscaled_shift") for i, m in placed.items()}
                ways.append(("split", shifts, scales))
        for name, up, down in ways:
            try:
                way = self._first_choice(norm, up, down)
                edits = self._edits(norm, way)
                for op in norm.ops:
                    self._require_no_overwriting(op)
            except Refused as refusal:
                refusals.append((name, refusal))
                continue
            self._commit(norm, way)
            self.created_bias.update(e.bias for e in edits if e.bias and e.bias not in self.graph.tensors)
            laws = tuple(dict.fromkeys(way.laws + (["split"] if name == "split" else [])))
            layers = tuple(dict.fromkeys(e.layer for e in edits if e.kind != "remove"))
            return FoldSite(norm.name, layers, laws, tuple(edits))
        first = refusals[0][1]
        detail = "; ".join(f"{name}: {r.detail}" for name, r in refusals[:2])
        raise Refused(first.reason, detail)

    def _first_choice(self, norm: _Norm, up: dict[int, Affine], down: dict[int, Affine]) -> _Way:
        """Try the ways to hand out shifts among branches until one holds."""
        self.choices = []
        for _ in range(_MAX_ATTEMPTS):
            self.widths = []
            way = _Way()
            try:
                if up:
                    self._upstream(norm, up, way)
                if down:
                    self._downstream(norm, down, way)
                return way
            except Refused as refusal:
                if not self._next_choice():
                    raise refusal
        raise Refused(Reason.MIXED_BRANCHES, "no way to hand out the shift among the branches was found")

    def choose(self, options: int) -> int:
        position = len(self.widths)
        self.widths.append(options)
        if position == len(self.choices):
            self.choices.append(0)
        return self.choices[position]

    def _next_choice(self) -> bool:
        del self.choices[len(self.widths) :]
        while self.choices:
            if self.choices[-1] + 1 < self.widths[len(self.choices) - 1]:
                self.choices[-1] += 1
                return True
            self.choices.pop()
        return False

    # -- moving -----------------------------------------------------------------------------------------

    def _upstream(self, norm: _Norm, maps: dict[int, Affine], way: _Way) -> None:
        """Turn demands on the BatchNorm's inputs into demands on ever earlier values."""
        demands: dict[int, dict[tuple[int, str], Affine]] = {}
        heap: list[int] = []

        def demand(value: Value, edge: tuple[int, str], affine: Affine) -> None:
            if value.producer is None:
                what = "a constant" if value.constant else "the model's input"
                raise Refused(Reason.REACHES_INPUT, f"it is read straight from {what}")
            if value.id not in demands:
                demands[value.id] = {}
            if -value.producer not in heap:
                heapq.heappush(heap, -value.producer)
            demands[value.id][edge] = affine

        for op in norm.ops:
            demand(self.graph.input(op), (op.id, "input"), maps[op.id])
        while heap:
            op = self.graph.ops[-heapq.heappop(heap)]
            outputs = [self._agreed(self.graph.values[v], demands.get(v, {})) for v in op.outputs]
            if all(affine.is_identity for affine in outputs):
                continue
            if self._takes(op):
                if len(op.outputs) != 1:
                    raise Refused(Reason.UNKNOWN_OP, f"{op.label} has several outputs")
                way.takes.append(_Take(op, "output", output_demand(self, op, outputs[0])))
                way.laws.append(op.kind)
                continue
            for role, affine in self._law(op)[0](self, op, outputs).items():
                if not affine.is_identity:
                    demand(self.graph.input(op, role), (op.id, role), affine)
            self._passed(op, way)

    def _agreed(self, value: Value, asked: dict[tuple[int, str], Affine]) -> Affine:
        """The one map that every reader of a value agrees on."""
        own = identity(len(value.shape))
        if not asked:
            return own
        readers: list[Affine] = []
        for edge in value.readers:
            if edge in asked:
                readers.append(asked[edge])
                continue
            op, role = self.graph.ops[edge[0]], edge[1]
            if op.kind in ("slice", "select") and role == "input":
                untouched = identity(len(self.graph.output(op).shape))
                readers.append(LAWS[op.kind][0](self, op, [untouched])["input"])
            else:
                readers.append(own)
        agreed = readers[0]
        for index, other in enumerate(readers[1:], 1):
            joined = merge(agreed, other)
            if joined is None:
                reader = self.graph.ops[value.readers[index][0]]
                if value.readers[index] in asked:
                    reader = self.graph.ops[value.readers[0][0]]
                producer = self.graph.producer(value)
                what = producer.label if producer else "the value"
                raise Refused(Reason.OUTPUT_USED_ELSEWHERE, f"{what} is also read by {reader.label}")
            agreed = joined
        self._require_free(value)
        return agreed

    def _downstream(self, norm: _Norm, maps: dict[int, Affine], way: _Way) -> None:
        """Carry the map over the BatchNorm's outputs on through every reader."""
        carried: dict[int, Affine] = {}
        heap: list[int] = []

        def carry(value: Value, affine: Affine) -> None:
            if affine.is_identity:
                return
            self._require_free(value)
            if not value.readers:
                raise Refused(Reason.REACHES_OUTPUT, "nothing reads it")
            carried[value.id] = affine
            for reader, _ in value.readers:
                if reader not in heap:
                    heapq.heappush(heap, reader)

        for op in norm.ops:
            carry(self.graph.output(op), maps[op.id])
        while heap:
            op = self.graph.ops[heapq.heappop(heap)]
            inputs = {role: carried[v] for role, v in op.inputs.items() if v in carried}
            if self._takes(op):
                if set(inputs) != {"input"}:
                    raise Refused(Reason.WEIGHT_COMPUTED, f"a weight of {op.label} depends on the data")
                way.takes.append(_Take(op, "input", input_map(self, op, inputs["input"])))
                way.laws.append(op.kind)
                continue
            outputs = self._law(op)[1](self, op, inputs)
            for value, affine in zip(op.outputs, outputs, strict=True):
                carry(self.graph.values[value], affine)
            self._passed(op, way)

    def _takes(self, op: Op) -> bool:
        return op.id not in self.gone and (op.kind in TAKERS or op.kind == "batch_norm")

    def _law(self, op: Op) -> tuple[object, object]:
        if op.id in self.gone:
            return LAWS["identity"]
        try:
            return LAWS[op.kind]
        except KeyError:
            raise Refused(Reason.NONLINEAR, f"{op.label} lets no affine map by") from None

    def _passed(self, op: Op, way: _Way) -> None:
        if op.id not in self.gone:
            way.laws.append(op.kind)

    def _require_free(self, value: Value) -> None:
        """A value that somebody else sees must not change."""
        producer = self.graph.producer(value)
        what = producer.label if producer else "the input"
        if value.is_output:
            raise Refused(Reason.REACHES_OUTPUT, f"the output of {what} is returned by the model")
        if value.escapes:
            raise Refused(Reason.OUTPUT_ESCAPES, f"the output of {what} is kept beyond the forward")
        if value.watched:
            raise Refused(Reason.HOOKED, f"a hook on {value.watched[0]} sees the output of {what}")

    def _require_no_overwriting(self, norm: Op) -> None:
        """Without the BatchNorm its output *is* its input: a later write to either must concern nobody else."""
        value = root = self.graph.input(norm)
        private = True
        while True:
            private &= len(value.readers) == 1 and not value.is_output and not value.escapes
            root, maker = value, self.graph.producer(value)
            if maker is None or not (maker.kind in _VIEWS or maker.id in self.gone):
                break
            value = self.graph.input(maker)
        if private and root.producer is not None:
            return
        waiting = [root.id]
        while waiting:
            for reader, role in self.graph.values[waiting.pop()].readers:
                op = self.graph.ops[reader]
                if op.inplace and role in ("input", "out") and op.id > norm.id:
                    what = f"{op.label} would write in place what others read"
                    raise Refused(Reason.OUTPUT_USED_ELSEWHERE, what)
                if op.id == norm.id or op.kind in _VIEWS or op.id in self.gone:
                    waiting += op.outputs

    # -- taking in --------------------------------------------------------------------------------------

    def _edits(self, norm: _Norm, way: _Way) -> list[Edit]:
        edits: dict[tuple[str, str], Edit] = {}
        self.asked_halves = {}
        for take in way.takes:
            edit = self._edit(take, way)
            known = edits.setdefault((edit.weight, take.side), edit)
            if known.bias != edit.bias or any(
                edit.bias and e.bias == edit.bias and e.weight != edit.weight for e in edits.values()
            ):
                raise Refused(Reason.WEIGHT_SHARED, f"layers beside {take.op.label} share a weight or a bias")
        return [*edits.values(), Edit("remove", norm.name)]

    def _edit(self, take: _Take, way: _Way) -> Edit:
        """The edit of one layer, after everything that forbids changing its weight."""
        op, vector = take.op, take.vector
        kind = "scale_output" if take.side == "output" else "scale_input"
        if op.kind == "batch_norm":
            return self._norm_edit(take, kind, way)
        weight = self.graph.input(op, "weight")
        if not weight.handle:
            raise Refused(Reason.WEIGHT_COMPUTED, f"the weight of {op.label} is computed, not stored")
        tensor = self.graph.tensors[weight.handle]
        if not tensor.is_floating_point():
            raise Refused(Reason.QUANTIZED, f"the weight of {op.label} is {tensor.dtype}")
        self._require_own(weight, take, way)
        owner = weight.handle.rpartition(".")[0]
        bias = ""
        if "bias" in op.inputs:
            bias = self.graph.input(op, "bias").handle
            if not bias:
                raise Refused(Reason.WEIGHT_COMPUTED, f"the bias of {op.label} is computed, not stored")
            if take.side == "output" or vector.has_shift:
                self._require_own(self.graph.input(op, "bias"), take, way)
        elif vector.has_shift or f"{owner}.bias".lstrip(".") in self.created_bias:
            self._require_bias_slot(op, weight, owner)
            bias = f"{owner}.bias" if owner else "bias"
        groups = op.attrs.get("groups", 1)
        edit = Edit(kind, owner, vector.expr, weight.handle, bias, layout_of(op), groups)
        self._require_range(edit, take)
        return edit

    def _require_bias_slot(self, op: Op, weight: Value, owner: str) -> None:
        """A bias may be created only where the call that reads the weight will read it too."""
        module = self.graph.modules.get(owner)
        if module is not None and module.plain_bias and op.scope == owner:
            return
        if len(weight.readers) > 1:
            raise Refused(Reason.WEIGHT_SHARED, f"{weight.handle} is shared, and {op.label} has no bias")
        raise Refused(Reason.CUSTOM_FORWARD, f"{op.label} has no bias, and its own forward may not use one")

    def _norm_edit(self, take: _Take, kind: str, way: _Way) -> Edit:
        """A BatchNorm that stays takes the map in: to its affine it is a depthwise 1×1 convolution."""
        norm = self.norm_of.get(take.op.id)
        module = self.graph.modules.get(norm.name) if norm else None
        if norm is None or norm.affine is None or module is None or len(norm.ops) != 1:
            raise Refused(Reason.CALLED_MORE_THAN_ONCE, f"{take.op.label} cannot take it in")
        handles = [self.graph.input(take.op, r).handle for r in ("weight", "bias") if r in take.op.inputs]
        if len(handles) != 2 or not all(handles):
            raise Refused(Reason.CUSTOM_FORWARD, f"{take.op.label} has no γ and β to take it in")
        for role in ("weight", "bias"):
            self._require_own(self.graph.input(take.op, role), take, way)
        return Edit(kind, norm.name, take.vector.expr, handles[0], handles[1], "norm")

    def _require_own(self, weight: Value, take: _Take, way: _Way) -> None:
        """Every call that reads the weight must ask for the same change."""
        same = [
            t
            for t in way.takes
            if t.side == take.side and t.vector.equals(take.vector) and weight.id in t.op.inputs.values()
        ]
        taking = {t.op.id for t in same}
        for reader, _ in weight.readers:
            if reader in taking:
                continue
            other = self.graph.ops[reader]
            if other.scope == take.op.scope:
                raise Refused(
                    Reason.CALLED_MORE_THAN_ONCE,
                    f"{take.op.label} runs {len(weight.readers)} times, not always with this BatchNorm",
                )
            raise Refused(Reason.WEIGHT_SHARED, f"{other.label} shares {weight.handle}")
        owner, _, slot = weight.handle.rpartition(".")
        same_module = {owner, *self.graph.aliases.get(owner, ())}
        for alias in self.graph.aliases.get(weight.handle, ()):
            other_owner = alias.rpartition(".")[0]
            module = self.graph.modules.get(other_owner)
            if other_owner not in same_module and module is not None and module.calls == 0:
                raise Refused(Reason.WEIGHT_SHARED, f"{alias} is {weight.handle}, and did not run")
        del slot

    def _require_range(self, edit: Edit, take: _Take) -> None:
        """Refuse a folded weight or bias that its own type cannot hold (float16 ends at 65,504)."""
        stored = self.graph.tensors[edit.weight]
        if stored.dtype != torch.float16:
            return
        scale, shift = take.vector.scale.to(stored.device), take.vector.shift.to(stored.device)
        weight = self._half(edit.weight, stored)
        after = {edit.weight: weight * rows(edit.layout, weight, edit.groups, scale, take.side)}
        if edit.bias:
            none = torch.zeros((), device=stored.device)
            bias = self._half(edit.bias, self.graph.tensors.get(edit.bias, none))
            if take.side == "output":
                after[edit.bias] = scale * bias + shift
            else:
                after[edit.bias] = bias + bias_from_input_shift(edit.layout, weight, edit.groups, shift)
        peak = max(float(t.abs().max()) for t in after.values() if t.numel())
        limit = torch.finfo(torch.float16).max
        if peak > limit:
            raise Refused(
                Reason.OVERFLOW, f"the folded weight of {take.op.label} reaches {peak:.3g}, beyond {limit:g}"
            )
        self.asked_halves.update(after)

    def _half(self, handle: str, stored: Tensor) -> Tensor:
        """A float16 tensor as the folds so far have left it, in float64."""
        return self.halves.get(handle, stored.detach().double())

    def _commit(self, norm: _Norm, way: _Way) -> None:
        """Make the fold part of what later BatchNorms see."""
        for take in way.takes:
            taker = self.norm_of.get(take.op.id)
            if take.op.kind == "batch_norm" and taker is not None and taker.affine is not None:
                outer, inner = (
                    (take.vector, taker.affine) if take.side == "output" else (taker.affine, take.vector)
                )
                joined = compose(outer, inner)
                taker.affine = Affine(joined.scale, joined.shift, ("bn", taker.name))
        self.halves.update(self.asked_halves)
        self.gone.update(op.id for op in norm.ops)


def _find_norms(graph: Graph) -> list[_Norm]:
    """Every BatchNorm in the order it first ran, then those that never ran."""
    norms: dict[str, _Norm] = {}
    functional: dict[str, int] = {}
    for op in graph.of_kind("batch_norm"):
        if graph.input(op).constant:
            continue  # a weight being standardised, not data
        module = graph.modules.get(op.scope)
        if module is not None and module.role in ("norm", "norm_act", "custom_norm", "scripted"):
            norms.setdefault(op.scope, _Norm(op.scope, [])).ops.append(op)
            continue
        index = functional[op.scope] = functional.get(op.scope, -1) + 1
        name = f"{op.scope}.batch_norm" if op.scope else "batch_norm"
        name = f"{name}_{index}" if index else name
        norms[name] = _Norm(name, [op])
    for name, module in graph.modules.items():
        if module.role in ("norm", "norm_act", "custom_norm") and name not in norms:
            norms[name] = _Norm(name, [])
    return list(norms.values())


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _first_bad(tensor: Tensor, extra: str) -> str:
    """What is wrong with a statistic, and at which channel; empty where nothing is."""
    tensor = tensor.detach()
    finite = torch.isfinite(tensor)
    if not bool(finite.all()):
        channel = int((~finite).nonzero()[0])
        return f"is {float(tensor[channel])} at channel {channel}"
    if extra == "negative" and bool((tensor < 0).any()):
        channel = int((tensor < 0).nonzero()[0])
        return f"is {float(tensor[channel]):g} (negative) at channel {channel}"
    return ""


