"""What every kind of model can be asked, and how a surgery on it is checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from bntool.core.options import CheckOptions, ExportOptions, FoldOptions, InsertOptions
from bntool.core.plan import Plan
from bntool.core.tolerances import BY_NOISE, Tolerance
from bntool.core.verdicts import Check
from bntool.verifying.conditions import Conditions

if TYPE_CHECKING:
    from bntool.export.exporting import ExportResult
    from bntool.graph.dataflow import Graph
    from bntool.graph.inputs import Inputs

Kind = Literal["module", "program", "onnx", "script"]
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
        step: is told what is done at the moment.
    """

    full: bool = False
    torch_device: str = "cpu"
    onnx_device: str = "cpu"
    tolerance: Tolerance = BY_NOISE
    tf32: bool = False
    seed: int = 0
    axes: Mapping[str, Sequence[int]] = dataclasses.field(default_factory=dict)
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


class Proof(Protocol[S_contra]):
    """What a fold of one model is held against: that model's own runs, each made once."""

    @property
    def looks_elsewhere(self) -> bool:
        """Whether it also runs on inputs of other sizes than those that the plan has seen."""

    def rows(self, plan: Plan, after: S_contra) -> list[Check]:
        """The model after the fold against the one before. Raises `CheckFailed` where it does not run."""

    def agrees(self, plan: Plan) -> bool:
        """Whether a part of a plan stands up."""


class Subject(Protocol):
    """A model that a surgery is done to. No method changes it."""

    kind: Kind
    name: str
    files: tuple[Path, ...]
    """Every file that it was read from; none may be written over."""

    @property
    def model(self) -> Any:
        """The module, the program, or the path of the ONNX file."""

    @property
    def runnable(self) -> Any:
        """The model as an `nn.Module` that runs alike every time, where torch runs it."""

    def graph(self) -> Graph:
        """The model as a graph; raises `ObserveError` where there is none to be had."""

    def example(self) -> Inputs | None:
        """An input that it takes, where one is known."""

    def parameters(self: S, after: S) -> Parameters:
        """Counts `before`, `after` and their `delta`."""

    def plan_fold(self, options: FoldOptions, *, thorough: bool) -> Plan:
        """A verdict for every BatchNorm; `thorough` looks at inputs of other sizes too."""

    def folded(self: S, plan: Plan) -> S:
        """A new model, with the plan carried out."""

    def proof(self: S, checking: Checking) -> Proof[S]:
        """What a fold of it is held against."""

    def plan_insert(self, options: InsertOptions) -> Plan:
        """Where a BatchNorm would go."""

    def inserted(self: S, options: InsertOptions) -> tuple[Plan, S]:
        """A plan, and a new model with it carried out."""

    def insert_rows(self: S, plan: Plan, after: S, checking: Checking) -> list[Check]:
        """The model with an insertion against the one without. Raises `CheckFailed` where they differ."""


class Exportable(Subject, Protocol):
    """A model that torch can export."""

    def export(self, path: Path, how: ExportOptions, metadata: Mapping[str, str]) -> ExportResult:
        """Write it as ONNX into a new file, without any folding."""
