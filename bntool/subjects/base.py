"""What every kind of model can be asked, and how a surgery on it is checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from torch import nn

from bntool.core.documents import Kind
from bntool.core.errors import UsageError
from bntool.core.options import CheckOptions, ExportOptions, FoldOptions, InsertOptions
from bntool.core.plan import Plan
from bntool.core.reasons import Reason
from bntool.core.refusals import refused
from bntool.core.tolerances import BY_NOISE, Tolerance
from bntool.core.verdicts import Check
from bntool.folding.untrained import with_untrained_told
from bntool.results.counting import parameter_delta
from bntool.results.summary import Summary, summarize
from bntool.subjects.replanning import replanned
from bntool.verifying.checking import seeded_batches
from bntool.verifying.conditions import Conditions

if TYPE_CHECKING:
    from bntool.export.exporting import ExportResult
    from bntool.files.drafting import Drafts
    from bntool.graph.dataflow import Graph
    from bntool.graph.inputs import Inputs
    from bntool.verifying.blaming import Found

Parameters = dict[str, dict[str, int]]
S = TypeVar("S", bound="Subject")
S_contra = TypeVar("S_contra", bound="Subject", contravariant=True)


@dataclasses.dataclass(frozen=True)
class Checking:
    """How a surgery is checked: on how much, where, and by what limit.

    Args:
        full: on batches of 1, 2 and 3, not on the example alone.
        torch_device: where torch runs the candidate.
        onnx_device: where ONNX Runtime runs it, or the names of its providers.
        tolerance: what the user allows in place of the noise floor.
        tf32: whether a row with TF32 on is added to those of an ONNX file.
        seed: of whatever inputs are drawn.
        axes: those that are to be open, by input; one more input is then longer along them.
        inputs: the user's own, instead of drawn ones.
        step: is told what is done at the moment.
    """

    full: bool = False
    torch_device: str = "cpu"
    onnx_device: str = "cpu"
    tolerance: Tolerance = BY_NOISE
    tf32: bool = False
    seed: int = 0
    axes: Mapping[str, Sequence[int]] = dataclasses.field(default_factory=dict)
    inputs: tuple[Inputs, ...] = ()
    step: Callable[[str], None] = lambda text: None

    @classmethod
    def of(cls, asked: CheckOptions, **more: Any) -> Checking | None:
        """What the options ask for, with where it runs and on what; None where nothing is to be checked."""
        if asked.check == "none":
            return None
        full, tf32 = asked.check == "full", asked.tf32 == "both"
        return cls(full=full, tolerance=asked.tolerance, tf32=tf32, **more)

    def on_torch(self) -> Conditions:
        """What a candidate that torch runs is held to."""
        return Conditions(self.torch_device, self.tolerance, progress=self.step)

    def on_onnx(self) -> Conditions:
        """What an ONNX file is held to."""
        return Conditions(self.onnx_device, self.tolerance, tf32=self.tf32, progress=self.step)

    def batches_of(self, example: Inputs) -> list[Inputs]:
        """What both models run on: the user's own inputs, else seeded batches of the example, or it alone."""
        if self.inputs:
            return list(self.inputs)
        return seeded_batches(example, seed=self.seed) if self.full else [example]


class Proof(Protocol[S_contra]):
    """What a fold of one model is held against: that model's own runs, each made once."""

    @property
    def looks_elsewhere(self) -> bool:
        """Whether it also runs on inputs of other sizes than those that the plan has seen."""

    def rows(self, plan: Plan, after: S_contra) -> list[Check]:
        """The model after the fold against the one before. Raises `CheckFailed` where it does not run."""

    def agrees(self, plan: Plan) -> bool:
        """Whether a part of a plan stands up."""


class Subject:
    """A model that a surgery is done to. No method changes it. What a kind does not write, it cannot do."""

    kind: Kind
    name: str
    model: Any
    """The module, the program, the path of the ONNX file, or the weights by name."""
    files: tuple[Path, ...] = ()
    """Every file that it was read from; none may be written over."""
    suffix: str = ".pt"
    """How the name of a file ends that it is written to, where it writes itself."""
    on_torch: bool = True
    """Whether torch runs it."""
    runs: bool = True
    """Whether anything does, so that what is done to it can be proved."""

    @property
    def runnable(self) -> Any:
        """The model as an `nn.Module` that runs alike every time, where torch runs it; else None."""
        return self.model if self.on_torch else None

    def graph(self) -> Graph:
        """The model as a graph; raises `ObserveError` where there is none to be had."""
        raise refused(self.kind, "read the graph of", self.name)

    def example(self) -> Inputs | None:
        """An input that it takes, where one is known."""
        return None

    def read_as(self, *, run: bool = True, freeze: bool = False) -> None:
        """How an ONNX file is read; others have one way."""

    def batched(self, seed: int = 0) -> Callable[[int], Inputs | None]:
        """Seeded inputs of any batch size, None for one that it does not take.

        Raises `UsageError` where no example is known.
        """
        example = self.example()
        if example is None:
            raise UsageError(
                f"no example input of {self.name} is known", next_step="give one as example_inputs"
            )
        return example.batched(seed)

    def run_on(self, real: Sequence[Inputs]) -> None:
        """Inputs of the user's own take the place of drawn ones, where they were not observed already."""

    def counted(self) -> Summary:
        """The summary of the model as it stands, without running it."""
        if not isinstance(self.model, nn.Module):
            raise refused(self.kind, "count", self.name)
        return summarize(self.model)

    def parameters(self: S, after: S) -> Parameters:
        """Counts `before`, `after` and their `delta`."""
        return parameter_delta(self.runnable, after.runnable)

    def prepared(self: S, options: FoldOptions) -> S:
        """As a fold begins with it: with `bake`, weights that layers compute are stored first.

        Raises `CheckFailed` where with the stored weights it does not compute the same.
        """
        return self

    def plan_fold(self, options: FoldOptions, *, thorough: bool) -> Plan:
        """A verdict for every BatchNorm; `thorough` looks at inputs of other sizes too."""
        raise refused(self.kind, "plan a fold of", self.name)

    def told(self, plan: Plan) -> Plan:
        """The plan of a fold, with what it says of layers that were not trained."""
        return with_untrained_told(plan, self.graph())

    def only_in_a_graph(self, options: FoldOptions) -> frozenset[Reason]:
        """Why a BatchNorm may stay that its exported graph lets fold."""
        return frozenset()

    def folded(self: S, plan: Plan) -> S:
        """A new model, with the plan carried out."""
        raise refused(self.kind, "fold", self.name)

    def proof(self: S, checking: Checking) -> Proof[S]:
        """What a fold of it is held against."""
        raise refused(self.kind, "run", self.name)

    def plan_insert(self, options: InsertOptions) -> Plan:
        """Where a BatchNorm would go."""
        raise refused(self.kind, "insert into", self.name)

    def inserted(self: S, options: InsertOptions) -> tuple[Plan, S]:
        """A plan, and a new model with it carried out."""
        return self.plan_insert(options), self

    def insert_rows(self: S, plan: Plan, after: S, checking: Checking) -> list[Check]:
        """The model with an insertion against the one without. Raises `CheckFailed` where they differ."""
        raise refused(self.kind, "insert into", self.name)

    def replayed(self: S, plan: Plan, *, checked: bool) -> tuple[Plan, S]:
        """A plan from elsewhere carried out: that plan, or on a graph the same made anew.

        Raises `PlanError` where it was made for another model, and `Damaged` where it is none.
        """
        return replanned(self, plan)

    def apart(self, after: Subject, proof: Any) -> Found | None:
        """The first layer or node at which a fold that its proof did not bear out and the original part."""
        from bntool.verifying.blaming import blame_modules  # which loads ONNX

        return blame_modules(self.runnable, after.runnable, proof.reference.inputs, stage="fold")

    def exportable(self, how: ExportOptions) -> Subject:
        """As one that can be written as ONNX. Raises `UsageError` where that is done already."""
        return self

    def export(self, path: Path, how: ExportOptions, metadata: Mapping[str, str]) -> ExportResult:
        """Write it as ONNX into a new file, without any folding."""
        raise refused(self.kind, "export", self.name)

    def owned(self, model: Any, *, share: bool) -> Any:
        """What a surgery made of it, for the caller to keep: a module shares no tensor unless it may."""
        return model

    def working_in(self: S, folder: Callable[[], Path]) -> S:
        """The same, where new files are made in the folder that this makes, if it needs any."""
        return self

    def draft(self, path: Path, drafts: Drafts) -> str:
        """Write it into the drafts of a claimed `path`, where it writes itself; its sha256."""
        raise refused(self.kind, "write", self.name)
