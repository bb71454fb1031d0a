"""An insertion looked at where the example does not lead: on inputs of another size, and in training mode.

The new BatchNorms change nothing while they are in eval mode. So with them in it both models give the same
bits, in training too, as long as nothing has moved; and each newcomer runs no more often than its layer.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bntool.core.plan import Plan
from bntool.core.sites import InsertSite
from bntool.graph.inputs import Inputs, named_tensors
from bntool.observe.eager import Observation
from bntool.observe.inference import has_fixed_size
from bntool.observe.isolation import Isolation, fresh, same_random_numbers
from bntool.runtime.libraries import first_line
from bntool.subjects.sizes import other_sizes, smaller
from bntool.verifying.differences import difference


@dataclasses.dataclass(frozen=True)
class _Run:
    """What a model returned, and how often each of its layers ran."""

    outputs: Mapping[str, Tensor]
    calls: Counter[str]


class Elsewhere:
    """The model before an insertion, run in eval mode on another size and in training mode.

    That is a small size, unless Python asked how long a tensor is: then what a model does may go by size, and
    it runs on a longer input, and in training on its own size.

    Args:
        model: the module before it.
        observation: what its example showed.

    `notes` says what could not be tried.
    """

    def __init__(self, model: nn.Module, observation: Observation) -> None:
        self._model = model
        self.notes: list[str] = []
        example, graph = observation.inputs, observation.graph
        fixed = has_fixed_size(model)
        *longer, own = other_sizes(example, fixed=fixed)
        small = [] if fixed or graph.reads_sizes else list(smaller(example, graph))[:-1]
        self._runs = list(self._first([*small, *longer], training=False, told="on inputs of another size"))
        taken = [inputs for inputs, *_ in self._runs if small]
        # two samples or more, as BatchNorm wants them in training
        self._runs += self._first([*taken, own, example], training=True, told="in training mode")

    def _first(
        self, tries: Sequence[Inputs], *, training: bool, told: str
    ) -> Iterator[tuple[Inputs, bool, _Run]]:
        """The first of some inputs that the model takes."""
        why = "its size is fixed"
        for inputs in tries:
            try:
                yield inputs, training, _run(self._model, inputs, training=training)
                return
            except Exception as error:  # noqa: BLE001 - whatever a model's forward raises
                why = first_line(error)
        self.notes.append(f"not tried {told}: {why}")

    def broken(self, plan: Plan, modified: nn.Module) -> list[InsertSite] | None:
        """The sites whose newcomers run more often than their layers do, an empty list where something else
        differs and it cannot be told by which, or None where nothing does.

        Args:
            plan: the insertion, with newcomers that change nothing.
            modified: the model behind it.
        """
        norms = {name for site in plan.insert_sites for name in site.norms}
        for inputs, training, before in self._runs:
            try:
                after = _run(modified, inputs, training=training, but=norms)
            except Exception:  # noqa: BLE001 - as above
                return []
            moved = [
                site
                for site in plan.insert_sites
                if sum(after.calls[norm] for norm in site.norms) > before.calls[site.conv]
            ]
            if moved or not _same(before, after):
                if not _same(before, _run(self._model, inputs, training=training)):
                    self._say("the model gives something else each time, so its runs tell nothing")
                    continue
                return moved
        return None

    def mixed(self, plan: Plan) -> list[str]:
        """What to say of layers that training runs more often than the example did."""
        found = []
        for site in plan.insert_sites:
            most = max((run.calls[site.conv] for *_, run in self._runs), default=0)
            if most > site.calls:
                found.append(f"{site.conv} runs {most} times elsewhere, and its BatchNorm would mix them")
        return found

    def _say(self, note: str) -> None:
        self.notes += [note] if note not in self.notes else []


def _run(model: nn.Module, inputs: Inputs, *, training: bool, but: Collection[str] = ()) -> _Run:
    """One forward in isolation; in training mode all layers are in it but these."""
    calls: Counter[str] = Counter()
    with contextlib.ExitStack() as stack:
        running = stack.enter_context(Isolation(model).run())
        stack.enter_context(torch.no_grad())
        stack.enter_context(same_random_numbers(0))
        modules = list(running.named_modules(remove_duplicate=False))
        quiet = {id(module) for name, module in modules if name in but}
        for name, module in modules:
            module.training = training and id(module) not in quiet
            handle = module.register_forward_hook(_counting(calls, name))
            stack.callback(handle.remove)
        given = fresh(inputs)
        found = named_tensors(running(*given.args, **given.kwargs))
        return _Run({name: tensor.detach().clone() for name, tensor in found}, calls)


def _counting(calls: Counter[str], name: str) -> Any:
    def count(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001 - a hook's arguments
        calls[name] += 1

    return count


def _same(one: _Run, other: _Run) -> bool:
    return one.outputs.keys() == other.outputs.keys() and all(
        difference(tensor, other.outputs[name]).max_abs == 0 for name, tensor in one.outputs.items()
    )
