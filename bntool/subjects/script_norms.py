"""Which BatchNorms of a TorchScript module must stay, by who calls them and the convolutions before them."""

from __future__ import annotations

from bntool.core.reasons import Reason
from bntool.core.sites import Skip
from bntool.subjects.script_calls import Calls, is_norm, nodes_of


def kept_norms(calls: Calls) -> dict[str, Skip]:
    """A skip for each BatchNorm that is called and may not go.

    One goes where a single place in the code calls it, on what a convolution returned that a single place
    calls too, whichever branch or method that is: so whoever runs the one runs the other.
    """
    norms = [name for name in calls.to if is_norm(calls.modules[name])]
    kept = {name: skip for name in norms if (skip := _judge(calls, name))}
    # The code of a class is one for all its modules: where a call stays for one of them, it stays for all.
    staying = {call.place: name for name in kept for call in calls.to[name]}
    for name in norms:
        for call in calls.to[name]:
            if name not in kept and (other := staying.get(call.place)):
                kept[name] = Skip(name, Reason.SCRIPTED, f"its code is that of {other} too, which stays")
    return {**kept, **_functional(calls)}


def _functional(calls: Calls) -> dict[str, Skip]:
    """A skip for each call of batch_norm itself, named as those of a module's forward are."""
    found: dict[str, Skip] = {}
    for scope, *_ in calls.functional:
        name = first = f"{scope}.batch_norm" if scope else "batch_norm"
        count = 0
        while name in found:
            name, count = f"{first}_{count + 1}", count + 1
        found[name] = Skip(name, Reason.FUNCTIONAL, "a function call in its code, not a layer of its own")
    return found


def _judge(calls: Calls, name: str) -> Skip | None:
    found = calls.to[name]
    norm, call = calls.modules[name], found[0]
    if calls.unclear:
        return Skip(name, Reason.SCRIPTED, f"it cannot be told which module is called by {calls.unclear}")
    if len(found) > 1:
        return Skip(name, Reason.CALLED_MORE_THAN_ONCE, f"{len(found)} places in the code call it")
    if _uses_batch(norm):
        return Skip(name, Reason.BATCH_STATISTICS, "it normalises by the statistics of each batch")
    if getattr(norm, "training", False):
        return Skip(name, Reason.BATCH_STATISTICS, "it was left in train mode in a model in eval mode")
    if name in calls.read:
        return Skip(name, Reason.WEIGHT_SHARED, f"{calls.read[name] or 'the model'} reads its numbers too")
    conv = call.argument
    if not conv or not calls.modules[conv].original_name.startswith("Conv"):
        return Skip(name, Reason.SCRIPTED, "no convolution right before it in its graph")
    others = calls.to[conv]
    if len(others) > 1:
        where = f"{len(others)} places in the code call {conv}, and this BatchNorm follows one of them"
        return Skip(name, Reason.WEIGHT_SHARED, where)
    if not others[0].read_once:
        return Skip(name, Reason.OUTPUT_USED_ELSEWHERE, f"the output of {conv} is read elsewhere too")
    if conv in calls.read:
        return Skip(
            name, Reason.WEIGHT_SHARED, f"{calls.read[conv] or 'the model'} reads a tensor of {conv} too"
        )
    return None


def _uses_batch(norm: object) -> bool:
    """Whether it has no running statistics, or was traced in train mode, which eval() does not change."""
    if getattr(norm, "running_mean", None) is None:
        return True
    graph = norm._c._get_method("forward").graph  # type: ignore[attr-defined]
    training = [list(n.inputs())[5] for n in nodes_of(graph) if n.kind() == "aten::batch_norm"]
    return any(value.node().kind() == "prim::Constant" and bool(value.toIValue()) for value in training)
