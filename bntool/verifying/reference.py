"""The original's own runs, against which every candidate is measured: in its own precision and in float64."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from bntool.core.errors import BntoolError, CheckFailed
from bntool.core.tolerances import DOUBLE, DRAWS, EXACT, Limit, walk
from bntool.graph.inputs import Inputs
from bntool.precision.casting import Arithmetic
from bntool.precision.perturbing import shaken_copy
from bntool.runtime.libraries import first_line
from bntool.runtime.torch_runner import TorchRunner
from bntool.verifying.comparing import constant_outputs, noise_limits, silent_outputs
from bntool.verifying.conditions import Progress, silent
from bntool.verifying.float64 import run_as_it_stands, run_float64, run_in_a_copy


class Reference:
    """The original's own runs on some inputs: in its own precision on `device`, and in float64 on the CPU.

    With `arithmetic` the own precision is that coarser one, emulated. Each runs once, when first needed. An
    input that the original cannot run is left out and noted. `ran` are its own runs, where somebody has made
    them already. `floor` is a reference on smaller inputs on the same path: what the model's rounding does
    there is taken for what it does here, and nothing runs in float64 here, as long as no candidate fails. The
    first of the inputs `beside` that the original takes is run in float64 alone, for `algebra`.
    Raises `CheckFailed` when there is no input that it can run.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs_list: Sequence[Inputs],
        *,
        device: str = "cpu",
        progress: Progress = silent,
        arithmetic: Arithmetic | None = None,
        ran: Sequence[dict[str, Tensor]] | None = None,
        floor: Reference | None = None,
        beside: Iterable[Inputs] = (),
    ) -> None:
        self._model = model
        self._ran = ran
        self._floor = floor
        self._beside = beside
        self._arithmetic = arithmetic
        self._given = list(inputs_list)
        self._device = device
        self._progress = progress
        self.notes: list[str] = []
        self.narrowed: set[torch.dtype] = set()
        self._with_parts = False
        self._stands = False

    @functools.cached_property
    def layers(self) -> int:
        return sum(1 for module in self._model.modules() if _is_leaf(module))

    @functools.cached_property
    def eps(self) -> float:
        return _coarsest_eps(self._model) if self._arithmetic is None else self._arithmetic.eps

    @property
    def parts(self) -> bool:
        """Whether the parts of the model are compared too, since the model itself returned nothing."""
        return bool(self._own_runs) and self._with_parts

    @functools.cached_property
    def _own_runs(self) -> list[tuple[Inputs, dict[str, Tensor]]]:
        if self._ran is not None and any(t.numel() for outputs in self._ran for t in outputs.values()):
            return list(zip(self._given, self._ran, strict=True))
        runner = self._own_runner(self._model)
        runs: list[tuple[Inputs, dict[str, Tensor]]] = []
        refused: list[tuple[Inputs, Exception]] = []
        for inputs in self._given:
            self._progress(f"running the original on {inputs.shapes()}")
            try:
                runs.append((inputs, runner.run(self._narrowed(inputs))))
            except BntoolError:
                raise
            except Exception as error:  # noqa: BLE001 - whatever a model's forward raises
                refused.append((inputs, error))
        if not runs:
            why = f": {first_line(refused[0][1])}" if refused else ""
            raise CheckFailed(
                f"there is nothing to compare: no input that the original can run{why}",
                where=refused[0][0].shapes() if refused else "",
                next_step="pass an input it accepts with --input NAME:SHAPE or --inputs FILE",
            )
        if not self._with_parts and not any(t.numel() for _, outputs in runs for t in outputs.values()):
            self._with_parts = True
            self.notes.append(
                "every output is empty on these inputs, so what the model's parts return is compared"
            )
            runner = self._own_runner(self._model)
            runs = [(inputs, runner.run(self._narrowed(inputs))) for inputs, _ in runs]
        self.notes += [f"the original cannot run {inputs.shapes()}, left out" for inputs, _ in refused]
        self.notes += runner.notes
        return runs

    def _own_runner(self, model: nn.Module) -> TorchRunner:
        model = model if self._arithmetic is None else self._arithmetic.copy(model)
        return TorchRunner(model, self._device, parts=self._with_parts)

    def _narrowed(self, inputs: Inputs) -> Inputs:
        stored = self._arithmetic.stored if self._arithmetic is not None else None
        return inputs if stored is None else inputs.to(dtype=stored).to(dtype=torch.float32)

    def in_arithmetic(self, arithmetic: Arithmetic) -> Reference:
        """The same reference for a candidate of a coarser arithmetic: the noise is what that itself makes."""
        coarse = Reference(self._model, self.inputs, progress=self._progress, arithmetic=arithmetic)
        coarse.__dict__["exact"] = self.exact
        coarse.narrowed = self.narrowed
        coarse.notes.append(f"the noise floor is that of {arithmetic.name}, emulated in torch")
        return coarse

    @property
    def inputs(self) -> list[Inputs]:
        return [inputs for inputs, _ in self._own_runs]

    @property
    def own(self) -> list[dict[str, Tensor]]:
        """The original's outputs in its own precision, one mapping for each batch."""
        return [outputs for _, outputs in self._own_runs]

    @functools.cached_property
    def exact(self) -> list[dict[str, Tensor]] | None:
        """The original's outputs in float64, or None (and a note) where it cannot run in float64."""
        self._progress("running the original in float64")
        found = run_as_it_stands(self._model, self.inputs, parts=self.parts)
        self._stands = found is not None
        if found is not None:
            return found
        try:
            runs, self.narrowed = run_in_a_copy(self._model, self.inputs, parts=self.parts)
        except Exception as error:  # noqa: BLE001 - whatever a model's forward raises on float64
            self.notes.append(
                f"the model does not run in float64 ({first_line(error)}); the limit is derived, not measured"
            )
            return None
        if self.narrowed:
            names = ", ".join(sorted(str(d).removeprefix("torch.") for d in self.narrowed))
            self.notes.append(f"the model casts to {names} inside, so its float64 run is not all float64")
        return runs

    @functools.cached_property
    def algebra(self) -> list[tuple[Inputs, dict[str, Tensor]]]:
        """The float64 runs that a surgery is held to where it is redone in float64."""
        if self.exact is None:
            return []
        found = list(zip(self.inputs, self.exact, strict=True))
        for inputs in self._beside:
            runs = self._in_float64(inputs)
            if runs is not None:
                return [*found, (inputs, runs[0])]
        return found

    def _in_float64(self, inputs: Inputs) -> list[dict[str, Tensor]] | None:
        """One more float64 run, as those before; None where the model does not take the inputs."""
        if self._stands:
            return run_as_it_stands(self._model, [inputs], parts=self.parts)
        try:
            return run_in_a_copy(self._model, [inputs], parts=self.parts)[0]
        except Exception:  # noqa: BLE001 - whatever a model's forward raises on inputs it does not take
            return None

    @property
    def floor(self) -> Reference | None:
        """The reference on smaller inputs that this one may be judged by; None where that does not hold."""
        small = self._floor
        if small is None or self.parts or small.parts or small.exact is None or small.narrowed:
            return None
        if any(limit.undecidable for limit in small.limits.values()):
            return None
        alike = all(outputs.keys() == small.limits.keys() for outputs in self.own)
        return small if alike else None

    @property
    def outputs(self) -> list[dict[str, Tensor]]:
        """What a candidate is measured against: the float64 runs, else the runs in own precision."""
        return self.own if self.exact is None else self.exact

    @functools.cached_property
    def limits(self) -> dict[str, Limit]:
        if self.exact is not None and self.eps > DOUBLE:
            return noise_limits(self.exact, self.own, self.layers, self.eps)
        # Without float64, or where the model itself is in float64, no noise is measured.
        limit = walk(self.eps, self.layers)
        return {
            name: limit if t.is_floating_point() or t.is_complex() else EXACT
            for outputs in self.own
            for name, t in outputs.items()
        }

    @functools.cached_property
    def redrawn_limits(self) -> dict[str, Limit]:
        """The limits by more draws of the model's own rounding: one run is one draw, and it may be lucky.

        Each further draw is the model with a rounding's worth of noise in its numbers (`shaken_copy`).
        Without a float64 run they are measured against the run in own precision, which carries a draw itself,
        as does a candidate that is compared with it.
        """
        if self.eps <= DOUBLE:
            return self.limits
        self._progress("drawing the model's own rounding again")
        runs = [] if self.exact is None else list(self.own)
        try:
            for seed in range(DRAWS):
                runner = self._own_runner(shaken_copy(self._model, self.eps, seed))
                runs += [runner.run(self._narrowed(inputs)) for inputs in self.inputs]
        except Exception:  # noqa: BLE001 - a class may refuse to be copied, a forward may check its numbers
            return self.limits
        draws = DRAWS if self.exact is None else DRAWS + 1
        return noise_limits(self.outputs * draws, runs, self.layers, self.eps)

    @functools.cached_property
    def exact_limits(self) -> dict[str, Limit]:
        """The same in float64: how far the model carries the rounding of float64 itself."""
        if self.exact is None:
            return {}
        self._progress("drawing the rounding of float64")
        runs: list[dict[str, Tensor]] = []
        try:
            for seed in range(DRAWS):
                shaken = shaken_copy(self._model, DOUBLE, seed, torch.float64)
                runs += run_float64(shaken, self.inputs, parts=self.parts)[0]
        except Exception:  # noqa: BLE001 - as above
            return {}
        return noise_limits(self.exact * DRAWS, runs, self.layers, DOUBLE)

    def decidable(self) -> Reference:
        """This reference, or one that holds the model's parts too, where no output tells anything: rounding
        decides them all, or they do not answer to the inputs.
        """
        found = self.telling()
        if found is not self or self._with_parts:
            return found
        decided = {name for name, limit in self.limits.items() if limit.undecidable}
        if decided == self.limits.keys():
            return self._by_parts("rounding decides every output")
        if decided | constant_outputs(self.outputs, self.limits).keys() != self.limits.keys():
            return self
        return self._by_parts("rounding decides every output that answers to the inputs")

    def telling(self) -> Reference:
        """The same, by the outputs in own precision alone."""
        exact = {name: EXACT for outputs in self.own for name in outputs}
        silent = {**silent_outputs(self.own), **constant_outputs(self.own, exact)}
        if self._with_parts or silent.keys() < exact.keys():
            return self
        return self._by_parts("no output answers to the inputs")

    def _by_parts(self, why: str) -> Reference:
        found = Reference(self._model, self.inputs, device=self._device, progress=self._progress)
        found._with_parts = True
        found.notes.append(f"{why}, so what the model's parts return is compared")
        return found

    @property
    def detail(self) -> str:
        return "; ".join(self.notes)


def _coarsest_eps(model: nn.Module) -> float:
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return max((torch.finfo(dtype).eps for dtype in dtypes), default=torch.finfo(torch.float32).eps)


def _is_leaf(module: nn.Module) -> bool:
    # a child is never asked whether it is true: a compiled one then asks what it holds for its length
    return all(child is None for child in module._modules.values())
