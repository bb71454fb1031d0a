"""Fold the BatchNorms of an `ExportedProgram`: observe, plan, apply, check."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from bntool.checking import check_surgery, seeded_batches
from bntool.errors import CheckFailed, UsageError
from bntool.folding import at_graph_level, plan_on_all
from bntool.inputs import Inputs, map_tensors
from bntool.observe.exported_program import ProgramObservation, observe_program
from bntool.observe.program_sizes import Sizes
from bntool.plan import ByPlan, Plan
from bntool.reference import Reference
from bntool.settling import settle
from bntool.surgery.fold_program import apply_fold_program, in_float64
from bntool.verdicts import Check


@dataclasses.dataclass(frozen=True)
class ProgramResult(ByPlan):
    """The new program, the plan behind it, and what the check found."""

    program: ExportedProgram
    plan: Plan
    checks: tuple[Check, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The document of a program's surgery; `unshared` is what the clones of shared layers add."""
        return {
            "plan": self.plan.to_dict(),
            "unshared": self.plan.unshared.to_dict(),
            "checks": [check.to_dict() for check in self.checks],
        }


def fold_program(
    program: ExportedProgram,
    *,
    example_inputs: Any = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    merge: bool = True,
    unshare: bool = False,
    check: Literal["full", "fast", "none"] = "fast",
    atol: float | None = None,
    rtol: float | None = None,
) -> ProgramResult:
    """Fold every BatchNorm of an exported program that algebra allows, functional ones too.

    With `merge`, parallel branches that are one convolution become one; where the check does not bear that
    out, they stay, and a note says so.
    The result's program is new, and the argument is not changed. `check="fast"` runs both on the example
    inputs that the program keeps (seeded ones of its shapes where it keeps none) and on other sizes where the
    program allows them, in their own precision and, where the program runs in it, in float64; `full` on
    several batch sizes too. A BatchNorm whose fold does not stand up stays, as `not-proved`. With `unshare` a
    call that shares its weight with another gets a parameter of its own, where it needs one. `atol` or `rtol`
    replaces the noise-floor limit.

    Raises:
        CheckFailed: the folded program does not compute the same, and no BatchNorm of it is at fault.
    """
    if not isinstance(program, ExportedProgram):
        raise UsageError(
            f"the program is a {type(program).__name__}, not an ExportedProgram",
            next_step="make one with torch.export.export, or fold an nn.Module with bntool.fold",
        )
    observed = observe_program(program)
    prover: list[_Prover] = []

    def plan_without(names: Sequence[str], merges: bool) -> Plan:
        return _plan(observed, include, names, merges, unshare)

    def proof() -> _Prover:
        """The program's own runs, which are made once there is something to prove."""
        if not prover:
            tolerance = (atol, rtol)
            prover.append(_Prover(observed, example_inputs, full=check == "full", tolerance=tolerance))
        return prover[0]

    def carry_out(plan: Plan) -> tuple[ExportedProgram, tuple[Check, ...]]:
        folded = apply_fold_program(observed, plan)
        if check == "none" or not plan:
            return folded, ()
        checks = proof().checks(plan, folded)
        failed = next((row for row in checks if not row.passed), None)
        if failed is not None:
            raise CheckFailed(
                f"the folded program differs from the original: {failed.figures}",
                where=f"{failed.stage} {failed.precision}".strip(),
                next_step="leave a BatchNorm out with exclude=, and please report it",
            )
        return folded, tuple(checks)

    def agrees(part: Plan) -> bool:
        return all(row.passed for row in proof().checks(part, apply_fold_program(observed, part)))

    plan, (folded, checks) = settle(plan_without, carry_out, agrees, exclude, merge)
    return ProgramResult(folded, plan, checks)


def plan_fold_program(
    program: ExportedProgram,
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    merge: bool = True,
    unshare: bool = False,
) -> tuple[Plan, ProgramObservation]:
    """A verdict for every BatchNorm of the program, and the observation it was planned on.

    Where an axis has no fixed size, a fold counts only if it comes out the same for two sets of sizes.
    """
    observed = observe_program(program)
    return _plan(observed, include, exclude, merge, unshare), observed


def _plan(
    observed: ProgramObservation,
    include: Sequence[str],
    exclude: Sequence[str],
    merge: bool,
    unshare: bool,
) -> Plan:
    other = [observe_program(observed.program, sizes=1).graph] if observed.open else []
    plan = plan_on_all(
        [observed.graph, *other], include=include, exclude=exclude, merge=merge, unshare=unshare
    )
    return at_graph_level(plan, observed.hidden)


def example_inputs_of(program: ExportedProgram, seed: int = 0) -> Inputs:
    """The example inputs that a program keeps, else seeded ones of the shapes it was exported with."""
    if program.example_inputs is not None:
        args, kwargs = program.example_inputs
        return Inputs(tuple(args), dict(kwargs), origin="the example that the program keeps")
    return drawn_inputs(program, 0, seed)


def drawn_inputs(program: ExportedProgram, which: int, seed: int = 0) -> Inputs:
    """Seeded inputs of the shapes that a program declares, under one of the two sets of open sizes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = Sizes(program, which)
    user_inputs = {str(name) for name in program.graph_signature.user_inputs}
    drawn: list[Any] = []
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op != "placeholder" or node.name not in user_inputs:
            continue
        if not isinstance(value, Tensor):
            drawn.append(sizes.number(value))
        elif value.is_floating_point():
            drawn.append(torch.randn(sizes.shape(value), generator=generator).to(value.dtype))
        else:
            drawn.append(torch.randint(0, 2, sizes.shape(value), generator=generator).to(value.dtype))
    spec = program.call_spec.in_spec
    if spec is None:
        return Inputs(tuple(drawn))
    args, kwargs = torch.utils._pytree.tree_unflatten(drawn, spec)
    return Inputs(tuple(args), dict(kwargs), origin="the shapes that the program declares")


class _Prover:
    """What a fold of one program is held against: its own runs, in its own precision and in float64."""

    def __init__(
        self,
        observed: ProgramObservation,
        example_inputs: Any,
        *,
        full: bool,
        tolerance: tuple[float | None, float | None] = (None, None),
    ) -> None:
        self._atol, self._rtol = tolerance
        inputs = Inputs.of(example_inputs) if example_inputs is not None else None
        first = inputs or example_inputs_of(observed.program)
        others = seeded_batches(first) if full else []
        if observed.open and inputs is None:
            others.append(drawn_inputs(observed.program, 1))
        self.original = RunnableProgram(observed.program)
        self.reference = Reference(self.original, [first, *others])
        self.wide = in_float64(observed.program)

    def checks(self, plan: Plan, folded: ExportedProgram) -> list[Check]:
        return check_surgery(
            self.original,
            RunnableProgram(folded),
            self.reference.inputs,
            stage="fold",
            candidate64=RunnableProgram(self._folded_in_float64(plan)),
            reference=self.reference,
            atol=self._atol,
            rtol=self._rtol,
        )

    def _folded_in_float64(self, plan: Plan) -> ExportedProgram:
        """The same fold planned and done again on the float64 program: constants differ in their digits."""
        again, observed = plan_fold_program(
            self.wide,
            include=plan.options["include"],
            exclude=plan.options["exclude"],
            merge=bool(plan.merges),
            unshare=bool(plan.options.get("unshare")),
        )
        names = [site.bn for site in plan.fold_sites]
        sites = tuple(site for site in again.fold_sites if site.bn in names)
        if [site.bn for site in sites] != names or len(again.merges) != len(plan.merges):
            raise CheckFailed("the fold does not come out the same in float64")
        return apply_fold_program(observed, dataclasses.replace(again, sites=sites))


class RunnableProgram(nn.Module):
    """A program as a module that runs alike every time: on copies of its inputs, its buffers put back.

    It asserts nothing of types, so that it runs in float64 too.
    """

    def __init__(self, program: ExportedProgram) -> None:
        super().__init__()
        module = program.module()
        assert isinstance(module, torch.fx.GraphModule)
        for node in list(module.graph.nodes):
            if node.target is torch.ops.aten._assert_tensor_metadata.default:
                module.graph.erase_node(node)
        module.recompile()
        self.program = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # An expanded one cannot be written, by the program or afterwards.
        written = [buffer for buffer in self.program.buffers() if not _is_expanded(buffer)]
        before = [(buffer, buffer.clone()) for buffer in written]
        try:
            return self.program(*map_tensors(args, torch.clone), **map_tensors(kwargs, torch.clone))
        finally:
            for buffer, numbers in before:
                buffer.copy_(numbers)


def _is_expanded(tensor: Tensor) -> bool:
    return any(size > 1 and step == 0 for size, step in zip(tensor.shape, tensor.stride(), strict=True))
