"""One summary for every kind of model, run where it can be, beside a baseline of any kind."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from bntool.core.errors import BntoolError, ObserveError
from bntool.graph.inputs import Inputs
from bntool.inserting import redundant_biases
from bntool.observe.eager import observe
from bntool.observe.inference import first_that_runs
from bntool.results.graph_layers import calls_by_tensors
from bntool.results.notes import Note
from bntool.results.summary import Summary, since, summarize
from bntool.results.walking import Calls, observe_calls
from bntool.subjects.base import Subject


def summarized(subject: Subject, inputs: Inputs | None = None, *, baseline: Any = None) -> Summary:
    """The summary of a subject.

    Args:
        subject: of whatever kind.
        inputs: what a module is run on; without, the first that it takes of those that its layers suggest.
        baseline: a subject, a module or a `Summary` to compare with; only its numbers are looked at.
    """
    found = _module(subject.model, inputs) if isinstance(subject.model, nn.Module) else subject.counted()
    if baseline is None:
        return found
    return since(found, baseline if isinstance(baseline, Summary | nn.Module) else baseline.counted())


def _module(model: nn.Module, inputs: Inputs | None) -> Summary:
    """A module that does not run is counted all the same, and the reason is a note."""
    notes: tuple[Note, ...] = ()
    calls: Calls | None = None
    if inputs is not None:
        calls = _observed(model, inputs)
    else:
        tried: list[tuple[Inputs, Calls]] = []
        try:
            inputs, calls = first_that_runs(model, lambda given: _tried(model, given, tried))
            notes = (Note(f"example input: {inputs.origin} (--input, or example_inputs=, sets another)"),)
        except ObserveError as error:
            # the one that got furthest still tells what ran up to there
            inputs, calls = max(tried, key=lambda one: len(one[1].by_name), default=(None, None))
            if calls is None or not calls.by_name:
                wanted = f"; {error.next_step}" if error.next_step else ""
                inputs, calls, notes = None, None, (Note(f"shapes are left out: {error.what}{wanted}"),)
    idle = _idle_biases(model, inputs) if calls is not None and calls.biased_into_norm else []
    found = summarize(model, inputs, idle_biases=idle, calls=calls)
    return dataclasses.replace(found, notes=(*notes, *found.notes))


def _tried(model: nn.Module, given: Inputs, tried: list[tuple[Inputs, Calls]]) -> tuple[Inputs, Calls]:
    """One more run; `ObserveError`, with the module that failed, for one that does not end well."""
    calls = _observed(model, given)
    tried.append((given, calls))
    if calls.failure:
        raise ObserveError(
            f"the model does not run on {given.shapes()}: {calls.failure}", where=calls.failed_in
        )
    return given, calls


def _observed(model: nn.Module, inputs: Inputs) -> Calls:
    """The calls of one run; those inside TorchScript, where no hook works, by the tensors they read."""
    calls = observe_calls(model, inputs)
    scripts = {name for name, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)}
    if not scripts or calls.failure:
        return calls
    try:
        inside = calls_by_tensors(observe(model, Inputs.of(inputs)).graph)
    except BntoolError:
        return calls
    found = {name: call for name, call in inside.items() if name in scripts}
    return dataclasses.replace(calls, by_name={**found, **calls.by_name})


def _idle_biases(model: nn.Module, inputs: Inputs | None) -> list[str]:
    """The layers whose bias has no effect: only the graph tells that nobody else reads their output."""
    try:
        graph = observe(model, Inputs.of(inputs)).graph
    except BntoolError:
        return []
    return [dropped.conv for dropped in redundant_biases(graph)]
