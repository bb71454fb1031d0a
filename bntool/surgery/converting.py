"""Checkpoints from before an insertion, under the names and with the layers of the model after it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from bntool.core.errors import PlanError, UsageError
from bntool.core.plan import Plan
from bntool.core.sites import InsertSite

_MOMENTS = frozenset(
    "exp_avg exp_avg_sq max_exp_avg_sq exp_inf momentum_buffer square_avg grad_avg sum".split()
)
"""What PyTorch's optimizers keep for a parameter in its own shape."""


def convert_state_dict(
    state: Mapping[str, Any], plan: Plan, model: nn.Module | None = None
) -> dict[str, Any]:
    """A checkpoint from before an insertion, for the model after it; loads with `strict=True`.

    A model's state_dict is renamed by the plan's key map. Each new BatchNorm gets the values with which it
    keeps the eval output (identity), or PyTorch's own where the plan says so; a bias that moved is taken into
    the running mean. An optimizer's state_dict needs `model`, the one after the insertion: moments follow
    their parameters, new parameters join the first group and start without any.

    Raises:
        PlanError: the plan is not that of an insertion.
        UsageError: the optimizer does not hold the parameters of the model before.
    """
    if plan.action != "insert":
        raise PlanError(f"this is the plan of a {plan.action}", next_step="give the plan of an insert")
    if "param_groups" in state and "state" in state:
        if model is None:
            raise UsageError(
                "an optimizer's state holds numbers, not names",
                next_step="give the model after the insertion too: convert_state_dict(state, plan, model)",
            )
        return _optimizer_state(state, plan, model)
    new = {plan.key_map.get(name, name): tensor for name, tensor in state.items()}
    for site in plan.insert_sites:
        like = state.get(f"{site.conv}.weight".lstrip("."))
        for name in _every_name(plan, *site.norms):
            for key, tensor in _newcomer(site, plan, like).items():
                new.setdefault(f"{name}.{key}", tensor)
    for dropped in plan.dropped:
        places = _every_name(plan, plan.key_map.get(dropped.bias, dropped.bias))
        bias, *_ = [new.pop(place, None) for place in places]
        for name in _every_name(plan, *dropped.norms) if isinstance(bias, Tensor) else ():
            mean = new.get(f"{name}.running_mean")
            if isinstance(mean, Tensor):
                new[f"{name}.running_mean"] = (mean.double() - bias.double()).to(mean.dtype)
    return new


def _every_name(plan: Plan, *names: str) -> list[str]:
    """Names of the model after the insertion, each with the others that its module is registered under."""
    return [place for name in names for place in (name, *plan.aliases.get(name, ()))]


def _newcomer(site: InsertSite, plan: Plan, like: Tensor | None) -> dict[str, Tensor]:
    """The state of a new BatchNorm that no data has reached: `surgery.insert_modules.new_norm` in keys."""
    made = nn.BatchNorm1d(
        site.channels,
        eps=float(plan.options["eps"]),
        affine=bool(plan.options["affine"]),
        dtype=None if like is None else like.dtype,
        device=None if like is None else like.device,
    )
    if plan.options["init"] != "default" and made.running_var is not None:
        made.running_var.fill_(1.0 - made.eps)
    return {key: tensor.detach() for key, tensor in made.state_dict().items()}


def _require_fitting(held: Mapping[str, Any], name: str, parameters: Mapping[str, Tensor]) -> None:
    """Raise `UsageError` where a moment has not the shape of the parameter that it would go to."""
    for key in _MOMENTS & held.keys():
        moment, parameter = held[key], parameters[name]
        if isinstance(moment, Tensor) and moment.shape != parameter.shape:
            raise UsageError(
                f"the optimizer's {key} of shape {list(moment.shape)} would go to {name}, of shape "
                f"{list(parameter.shape)}: it was built over the parameters in another order",
                next_step="build it over model.named_parameters(), so that its state has names",
            )


def _optimizer_state(state: Mapping[str, Any], plan: Plan, model: nn.Module) -> dict[str, Any]:
    new_names = [name for name, _ in model.named_parameters()]
    index = {name: i for i, name in enumerate(new_names)}
    gone = {dropped.bias for dropped in plan.dropped}
    old_names = [n for n in plan.signature if n in gone or plan.key_map.get(n, n) in index]
    groups = state["param_groups"]
    held = [number for group in groups for number in group["params"]]
    given = [name for group in groups for name in group.get("param_names", ())]
    if not given and (len(groups) > 1 or len(held) != len(old_names)):
        raise UsageError(
            f"the optimizer holds {len(held)} parameters in {len(groups)} groups, "
            f"the model before had {len(old_names)}",
            next_step="build it over model.named_parameters(), so that its state has names",
        )
    name_of = dict(zip(held, given or old_names, strict=True))
    moved = {number: index.get(plan.key_map.get(name, name)) for number, name in name_of.items()}
    kept = set(moved.values())
    before = {plan.key_map.get(name, name) for name in plan.signature}
    added = [i for i, name in enumerate(new_names) if i not in kept and name not in before]
    new_groups = []
    for position, group in enumerate(groups):
        numbers = [moved[number] for number in group["params"]]
        members = sorted([n for n in numbers if n is not None] + (added if position == 0 else []))
        names = {"param_names": [new_names[n] for n in members]} if "param_names" in group else {}
        new_groups.append({**group, "params": members, **names})
    # load_state_dict pairs by position: numbers run on over the groups in their order
    order = {n: i for i, n in enumerate(n for group in new_groups for n in group["params"])}
    for group in new_groups:
        group["params"] = [order[n] for n in group["params"]]
    moments = {order[moved[k]]: v for k, v in state["state"].items() if moved.get(k) is not None}
    parameters = dict(model.named_parameters())
    for number, held_state in state["state"].items():
        place = moved.get(number)
        if place is not None:
            _require_fitting(held_state, new_names[place], parameters)
    return {**state, "state": moments, "param_groups": new_groups}
