"""Damage every value of real side files in turn, and replay them: part of `make fuzz`.

A damaged document is either carried out or refused, with the place in it and the next step; any other error,
and anything that takes long, is an error of bntool's.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bntool
from bntool.cli.loading import replay_of, side_file_of
from bntool.core.errors import BntoolError
from bntool.files.sidecar import Origin, make_document, sidecar_path
from bntool.pipeline.onnx_folding import fold_onnx

SECONDS = 2.0
_MISSING = object()
_DEEP = "deep"
WAYS: tuple[Any, ...] = (
    _MISSING, None, True, -1, 0, 10**13, 10**400, 1.5, "", "no.such.name", "\x1b[2J", "\ud800",
    [], {}, [[0]], _DEEP,
)  # fmt: skip
"""What is put in the place of a value."""
X = torch.zeros(1, 3, 8, 8)


class Block(nn.Module):
    """Two branches that know how to become one."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.skip = nn.BatchNorm2d(8)
        self.merged = None

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.merged(x) if self.merged else self.norm(self.one(x)) + self.skip(x)
        return out

    def switch_to_deploy(self) -> None:
        weight, bias = torch.zeros(8, 8, 1, 1), torch.zeros(8)
        for norm, own in ((self.norm, self.one.weight), (self.skip, torch.eye(8).reshape(8, 8, 1, 1))):
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            weight = weight + scale.reshape(-1, 1, 1, 1) * own
            bias = bias + norm.bias - scale * norm.running_mean
        self.merged = nn.Conv2d(8, 8, 1)
        self.merged.weight, self.merged.bias = nn.Parameter(weight), nn.Parameter(bias)
        del self.one, self.norm, self.skip


class Residual(nn.Module):
    """A little of what folds go through: a sum, a concatenation, groups, a flatten, a transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.left, self.right = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.Conv2d(8, 4, 1)
        self.joined, self.last = nn.BatchNorm2d(12), nn.ConvTranspose2d(12, 6, 2)
        self.norm2, self.head, self.norm3 = nn.BatchNorm2d(6), nn.Linear(486, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = self.joined(torch.cat([self.left(x), self.right(x)], 1))
        out: Tensor = self.norm3(self.head(torch.flatten(self.norm2(self.last(torch.relu(x))), 1)))
        return out


def plain() -> nn.Module:
    """Without a BatchNorm, with places for all forms of an insertion."""
    inner = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Identity(), nn.ReLU())
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), inner, nn.Conv2d(8, 4, 1), nn.ReLU())


@dataclasses.dataclass(frozen=True)
class Subject:
    """A side file, and the architecture that its plan is replayed on."""

    name: str
    document: dict[str, Any]
    build: Callable[[], nn.Module]


def subjects(folder: Path) -> Iterator[Subject]:
    """Side files of real surgeries on modules, an exported program and an ONNX file."""
    torch.manual_seed(0)
    output = folder / "weights.safetensors"
    output.write_bytes(b"weights")

    def residual() -> nn.Module:
        return Residual().eval()

    def blocks() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 1), Block(), nn.ReLU(), Block()).eval()

    def subject(name: str, plan: Any, build: Callable[[], nn.Module], earlier: Any = None) -> Subject:
        origin = Origin("w.pt", "0" * 64, arch="torchvision:resnet18")
        document = make_document(plan.action, origin, output, plan=plan.to_dict())
        if earlier is not None:
            document["earlier_plans"] = [earlier.to_dict()]
        return Subject(name, json.loads(json.dumps(document)), build)

    inserted = bntool.insert(plain(), X, drop_bias=True)
    yield subject("fold", bntool.plan_fold(residual(), X), residual)
    yield subject("insert", inserted.plan, plain)
    yield subject("fold of an insert", bntool.plan_fold(inserted.model.eval(), X), plain, inserted.plan)
    yield subject("reparameterize", bntool.plan_fold(blocks(), X), blocks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(residual(), (X,))
        yield subject("program", bntool.fold(program, check="none").plan, residual)
        yield subject("ONNX file", _onnx_plan(folder, residual()), residual)


def _onnx_plan(folder: Path, model: nn.Module) -> Any:
    path = bntool.export_onnx(model, X, folder / "net.onnx")
    return fold_onnx(path, None, check="none").plan


def places_of(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a document, those that hold others too."""
    if place:
        yield place
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, held in items:
        yield from places_of(held, (*place, key))


def damaged(document: dict[str, Any], place: tuple[Any, ...], way: Any) -> str:
    """The document as JSON, with something else in one place."""
    changed = copy.deepcopy(document)
    held = changed
    for key in place[:-1]:
        held = held[key]
    if way is _MISSING:
        del held[place[-1]]
    else:
        held[place[-1]] = way
    text = json.dumps(changed)
    return text.replace(f'"{_DEEP}"', "[" * 100_000 + "]" * 100_000) if way is _DEEP else text


def replayed(text: str, subject: Subject, folder: Path) -> str:
    """What comes of it, in one word or in one line that begins with FAILED."""
    output = folder / "weights.safetensors"
    sidecar_path(output).write_text(text, encoding="utf-8")
    started = time.monotonic()
    try:
        told = side_file_of(str(output))
        if told is not None:
            _, prepare = replay_of(str(output), told)
            prepare(subject.build())
        said = "ignored" if told is None else "replayed"
    except BntoolError as error:
        said = "refused" if error.where and error.next_step and error.exit_code == 3 else f"FAILED: {error}"
    except Exception as error:  # noqa: BLE001 - any other is what is looked for
        last = traceback.extract_tb(error.__traceback__)[-1]
        said = f"FAILED: {type(error).__name__}: {error} at {Path(last.filename).name}:{last.lineno}"
    took = time.monotonic() - started
    return said if took < SECONDS else f"FAILED: it took {took:.1f} s"


def damage_documents(cases: int | None, seed: int = 0) -> int:
    """Damage so many places, drawn by the seed, or all of them; return how many times bntool failed."""
    failures = 0
    with tempfile.TemporaryDirectory(prefix="bntool-fuzz-") as place:
        folder = Path(place)
        for subject in subjects(folder):
            counts: dict[str, int] = {}
            jobs = [(at, way) for at in places_of(subject.document) for way in WAYS]
            if cases is not None:
                jobs = random.Random(f"{seed} {subject.name}").sample(jobs, min(cases, len(jobs)))  # noqa: S311
            for at, way in jobs:
                said = replayed(damaged(subject.document, at, way), subject, folder)
                counts[said.partition(":")[0]] = counts.get(said.partition(":")[0], 0) + 1
                if said.startswith("FAILED"):
                    failures += 1
                    print(f"    {'.'.join(map(str, at))} = {ascii(way)[:40]}: {said}")
            print(f"{subject.name:24} {counts}", flush=True)
    return failures
