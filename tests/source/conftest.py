"""A file of the user's to edit: written, imported, observed, planned, and what its new source is."""

from __future__ import annotations

import dataclasses
import itertools
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bntool.core.plan import Plan
from bntool.core.verdicts import Check
from bntool.files.references import build
from bntool.files.scripts import import_script
from bntool.graph.inputs import Inputs
from bntool.inserting import InsertOptions, plan_insert
from bntool.observe.eager import Observation, observe
from bntool.source.planning import SourcePlan, plan_source
from bntool.source.proof import Task, make_task, prove
from bntool.source.reading import SourceFile

_numbers = itertools.count()
HEAD = """\
import torch
import torch.nn as nn
import torch.nn.functional as F
from collections import OrderedDict


"""


@dataclasses.dataclass(frozen=True)
class Edited:
    """A source file, the model it makes, and the edits of one insertion."""

    file: SourceFile
    reference: str
    model: nn.Module
    observation: Observation
    edits: SourcePlan

    @property
    def plan(self) -> Plan:
        return self.edits.plan

    @property
    def added(self) -> list[str]:
        """The lines of the new text that the old one does not have, blanks around them left out."""
        old = self.file.text.splitlines()
        return [line.strip() for line in self.edits.text.splitlines() if line not in old]

    @property
    def refused(self) -> list[tuple[int, str]]:
        return [(r.line, r.why) for r in self.edits.refusals]

    def task(self, text: str | None = None) -> Task:
        return make_task(
            self.reference,
            self.file.module,
            self.file.path.resolve(),
            self.file.encoded(self.edits.text if text is None else text),
            self.edits.plan,
            self.model,
            self.observation,
            full=False,
        )

    def proof(self, text: str | None = None) -> tuple[str, Check | None]:
        return prove(self.task(text))


Edit = Callable[..., Edited]


@pytest.fixture
def edit(tmp_path: Path) -> Iterator[Edit]:
    """`edit(code)` plans BatchNorms for `Net` of a file with that code; `edit(path=...)` for a file."""
    before = set(sys.modules)

    def make(
        code: str | bytes = "",
        *,
        name: str = "Net",
        path: Path | None = None,
        shape: tuple[int, ...] = (1, 3, 8, 8),
        **options: Any,
    ) -> Edited:
        if path is None:
            path = tmp_path / f"net_{next(_numbers)}.py"
            path.write_bytes(code if isinstance(code, bytes) else textwrap.dedent(code).encode())
        reference = f"{path}:{name}"
        model = build(reference).model
        file = SourceFile(path, import_script(path))
        example = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        observation = observe(model, Inputs((example,)))
        plan = plan_insert(observation.graph, InsertOptions(**options))
        return Edited(file, reference, model, observation, plan_source(file, name, model, plan))

    yield make
    for module in set(sys.modules) - before:
        if getattr(sys.modules[module], "__file__", None) and str(tmp_path) in sys.modules[module].__file__:
            del sys.modules[module]
