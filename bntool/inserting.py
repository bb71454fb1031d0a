"""Plan an insertion: BatchNorm between a convolution and its activation, wherever that is safe.

A site is a layer that runs once, whose output goes to one activation and nowhere else. Everything else
is a skip with its reason. The planner also picks the form in which the module tree takes the newcomer
in, the least intrusive first: an `nn.Identity` already in the slot, a sibling in a plain `nn.Sequential`,
the activation wrapped, a convolution subclass.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Literal

from bntool.errors import UsageError
from bntool.graph import Graph, Module, Op, Value
from bntool.observe.aten import ACTIVATIONS
from bntool.patterns import chosen
from bntool.plan import InsertSite, Plan, Skip
from bntool.reasons import Reason

_NORMS = frozenset(
    {"batch_norm", "instance_norm", "group_norm", "layer_norm", "native_layer_norm", "rms_norm"}
)
_STOCK = frozenset(
    f"torch.nn.modules.{name}"
    for name in (
        *(f"conv.Conv{d}d" for d in (1, 2, 3)),
        *(f"conv.ConvTranspose{d}d" for d in (1, 2, 3)),
        "linear.Linear",
    )
)
"""Layers of exactly these classes can become the subclass that holds a BatchNorm."""

Form = Literal["identity", "sequential", "wrap", "subclass"]
FORMS: tuple[Form, ...] = ("identity", "sequential", "wrap", "subclass")


@dataclasses.dataclass(frozen=True)
class InsertOptions:
    """What to insert and where.

    `activations` are kinds (`relu`, `silu`, …) or `any`. `banned` maps a layer to the forms that were
    tried on this model and broke it.
    """

    activations: tuple[str, ...] = ("relu",)
    position: Literal["before", "after"] = "before"
    linear: bool = False
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    keep_keys: bool = False
    affine: bool = True
    eps: float = 1e-5
    momentum: float = 0.1
    init: Literal["identity", "calibrate", "default"] = "identity"
    sync: bool = False
    banned: Mapping[str, frozenset[str]] = dataclasses.field(default_factory=dict)

    def validate(self) -> None:
        """Raise `UsageError` for an unknown activation or option, or a number out of range."""
        choices = {"position": ("before", "after"), "init": ("identity", "calibrate", "default")}
        for option, allowed in choices.items():
            if getattr(self, option) not in allowed:
                raise UsageError(f"{option} is {' or '.join(allowed)}, not {getattr(self, option)!r}")
        for option in ("activations", "include", "exclude"):
            if isinstance(getattr(self, option), str):
                raise UsageError(f"{option} is a tuple of names, not one string")
        for name in self.activations:
            if name != "any" and name not in ACTIVATIONS:
                close = difflib.get_close_matches(name.lower(), sorted(ACTIVATIONS), n=3)
                raise UsageError(
                    f"unknown activation {name!r}",
                    next_step=f"did you mean {', '.join(close)}?" if close else "see bntool insert --help",
                )
        if not 0 < self.eps < 1:
            raise UsageError(f"eps must lie between 0 and 1, not {self.eps}")
        if not 0 <= self.momentum <= 1:
            raise UsageError(f"momentum must lie between 0 and 1, not {self.momentum}")

    def to_dict(self) -> dict[str, object]:
        fields = dataclasses.asdict(self)
        del fields["banned"]
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}


def plan_insert(graph: Graph, options: InsertOptions) -> Plan:
    """Give every convolution (and linear layer, on request) a verdict: a site or a skip."""
    options.validate()
    planner = _Planner(graph, options)
    drafts, skips = planner.verdicts()
    return planner.named(drafts, skips)


@dataclasses.dataclass
class _Draft:
    """A site before the names are settled: `parent` gets a new child in form `sequential`."""

    conv: str
    activation: str
    kind: str
    channels: int
    dims: int
    form: Form
    slot: str
    after_child: str = ""


class _Refuse(Exception):
    def __init__(self, reason: Reason, detail: str) -> None:
        self.reason, self.detail = reason, detail


class _Planner:
    def __init__(self, graph: Graph, options: InsertOptions) -> None:
        self.graph = graph
        self.options = options
        self.by_layer: dict[str, list[Op]] = {}
        for op in graph.of_kind("conv", "linear"):
            if not graph.input(op).constant:
                self.by_layer.setdefault(self._owner(op), []).append(op)

    def _owner(self, op: Op) -> str:
        """The module whose layer this op is: the layer that runs it, else the owner of the weight."""
        module = self.graph.modules.get(op.scope)
        if module is not None and module.role in ("conv", "linear"):
            return op.scope
        handle = self.graph.input(op, "weight").handle
        return handle.rpartition(".")[0] if handle else op.scope

    def verdicts(self) -> tuple[list[_Draft], list[Skip]]:
        drafts, skips = [], []
        wanted = {"conv", "linear"} if self.options.linear else {"conv"}
        for name, ops in self.by_layer.items():
            if ops[0].kind not in wanted:
                continue
            try:
                drafts.append(self._draft(name, ops))
            except _Refuse as refusal:
                skips.append(Skip(name or "(root)", refusal.reason, refusal.detail))
        for name, module in self.graph.modules.items():
            if module.role in wanted and name not in self.by_layer:
                skips.append(Skip(name, Reason.NOT_OBSERVED, "it did not run on the example input"))
        return drafts, skips

    # -- one layer --------------------------------------------------------------------------------------

    def _draft(self, name: str, ops: Sequence[Op]) -> _Draft:
        op = ops[0]
        module = self.graph.modules.get(name)
        if not chosen(name, self.options.include, self.options.exclude):
            raise _Refuse(Reason.EXCLUDED, "left out by --include/--exclude")
        if module is None or module.role not in ("conv", "linear") or op.scope != name:
            raise _Refuse(Reason.NOT_A_MODULE, "a function call inside forward, not a layer of its own")
        if len(ops) > 1 or module.calls > 1:
            count = max(len(ops), module.calls)
            raise _Refuse(Reason.CALLED_MORE_THAN_ONCE, f"it runs {count} times; one BN would mix them")
        activation = self._activation(op)
        value = self.graph.output(op if self.options.position == "before" else activation)
        if self.options.position == "after":
            self._require_not_normed(value)
            self._require_unseen(value)
        shape = value.shape
        dims = op.attrs.get("dims", 1)
        rank = dims + 2 if op.kind == "conv" else 2
        if len(shape) != rank:
            raise _Refuse(Reason.AXIS_MISMATCH, f"its output has {len(shape)} axes; BatchNorm needs {rank}")
        form, slot, child = self._form(name, module, activation, value)
        channels = shape[1]
        return _Draft(name, activation.scope, activation.kind, channels, dims, form, slot, child)

    def _activation(self, op: Op) -> Op:
        """The one activation that reads the layer's output; refused where that is not so."""
        value = self.graph.output(op)
        readers = [self.graph.ops[r] for r, _ in value.readers]
        self._require_not_normed(value)
        self._require_unseen(value)
        if not readers:
            raise _Refuse(Reason.NO_ACTIVATION, "nothing reads its output")
        if len(readers) > 1:
            others = ", ".join(r.label for r in readers[:3])
            raise _Refuse(Reason.OUTPUT_USED_ELSEWHERE, f"its output is read by {others}")
        reader = readers[0]
        if reader.kind not in ACTIVATIONS:
            raise _Refuse(Reason.NO_ACTIVATION, f"{reader.label} follows, not an activation")
        if "any" not in self.options.activations and reader.kind not in self.options.activations:
            raise _Refuse(
                Reason.OTHER_ACTIVATION, f"{reader.kind} follows; --activation {reader.kind} takes it"
            )
        return reader

    def _require_not_normed(self, value: Value) -> None:
        readers = [self.graph.ops[r] for r, _ in value.readers]
        if len(readers) == 1 and readers[0].kind in _NORMS:
            raise _Refuse(Reason.ALREADY_NORMALISED, f"{readers[0].label} follows")

    def _require_unseen(self, value: Value) -> None:
        if value.is_output:
            raise _Refuse(Reason.NO_ACTIVATION, "its output is returned by the model")
        if value.escapes:
            raise _Refuse(Reason.OUTPUT_ESCAPES, "its output is kept beyond the forward")
        if value.watched:
            raise _Refuse(Reason.HOOKED, f"a hook on {value.watched[0]} sees its output")

    # -- the form ---------------------------------------------------------------------------------------

    def _form(self, name: str, layer: Module, activation: Op, value: Value) -> tuple[Form, str, str]:
        """The first form that fits and is not banned: (form, slot, child it comes after)."""
        banned = self.options.banned.get(name, frozenset())
        act = self._activation_module(activation)
        after = self.options.position == "after"
        if "identity" not in banned:
            for slot in value.through:
                info = self.graph.modules[slot]
                if info.role == "identity" and info.calls == 1 and not info.hooked:
                    return "identity", slot, ""
        if "sequential" not in banned and act is not None:
            parent, _, child = name.rpartition(".")
            act_parent, _, act_child = act.name.rpartition(".")
            info_parent = self.graph.modules.get(parent)
            if (
                info_parent is not None
                and parent == act_parent
                and info_parent.role == "sequential"
                and info_parent.calls == 1
                and _adjacent(info_parent.children, child, act_child)
            ):
                return "sequential", parent, act_child if after else child
        if "wrap" not in banned and act is not None and act.own_tensors == 0 and not act.hooked:
            return "wrap", act.name, ""
        if "subclass" not in banned and not after and layer.kind in _STOCK:
            return "subclass", name, ""
        if layer.kind not in _STOCK and not after:
            raise _Refuse(Reason.CUSTOM_FORWARD, f"{layer.kind} has a forward of its own")
        if after:
            raise _Refuse(Reason.NOT_A_MODULE, "its activation is a function call; nothing can follow it")
        raise _Refuse(Reason.FORM_BROKE_MODEL, "every form that fits changed what the model computes")

    def _activation_module(self, activation: Op) -> Module | None:
        """The module that is nothing but this activation, called once; None for a function call."""
        module = self.graph.modules.get(activation.scope)
        if module is None or module.calls != 1 or not activation.scope:
            return None
        if module.whole != [[activation.id]] or module.role or module.children:
            return None
        return module

    # -- names ------------------------------------------------------------------------------------------

    def named(self, drafts: Sequence[_Draft], skips: Sequence[Skip]) -> Plan:
        """Settle every newcomer's qualified name, and how old names move."""
        renamed: dict[str, dict[str, str]] = {}
        new_names: dict[tuple[str, str], str] = {}
        by_parent: dict[str, list[_Draft]] = {}
        for draft in drafts:
            if draft.form == "sequential":
                by_parent.setdefault(draft.slot, []).append(draft)
        for parent, group in by_parent.items():
            wanted = {d.after_child for d in group}
            renamed[parent], named = sequential_names(
                self.graph.modules[parent].children, wanted, self.options.keep_keys
            )
            for alias in self.graph.aliases.get(parent, ()):
                renamed[alias] = renamed[parent]
            new_names.update({(parent, child): new for child, new in named.items()})

        def new_name(old: str) -> str:
            parts = old.split(".") if old else []
            result, path = [], ""
            for part in parts:
                result.append(renamed.get(path, {}).get(part, part))
                path = f"{path}.{part}" if path else part
            return ".".join(result)

        sites = []
        for d in drafts:
            if d.form == "sequential":
                bn = _join(new_name(d.slot), new_names[d.slot, d.after_child])
            elif d.form == "wrap":
                bn = _join(new_name(d.slot), "1" if self.options.position == "after" else "0")
            elif d.form == "identity":
                bn = new_name(d.slot)
            else:
                bn = _join(new_name(d.conv), "bn")
            sites.append(InsertSite(d.conv, d.activation, bn, d.channels, d.form, d.dims, d.kind, d.slot))
        names = [n for first in self.graph.tensors for n in (first, *self.graph.aliases.get(first, ()))]
        key_map = {old: new_name(old) for old in names if new_name(old) != old}
        return Plan(
            action="insert",
            sites=tuple(sites),
            skips=tuple(skips),
            model_class=self.graph.model_class,
            signature=self.graph.signature(),
            options=self.options.to_dict(),
            key_map=key_map,
        )


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


def _adjacent(children: Sequence[str], first: str, second: str) -> bool:
    return (
        first in children
        and second in children
        and list(children).index(second) == list(children).index(first) + 1
    )


def _join(parent: str, child: str) -> str:
    return f"{parent}.{child}" if parent else child
