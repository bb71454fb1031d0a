"""`--inputs FILE`: real data as what a model is observed on, and what it is checked on."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bntool.core.errors import BntoolError, LoadError, UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.export import ExportedProgram

    from bntool.cli.session import Session
    from bntool.graph.inputs import Inputs

_BATCH = 32
_UNNAMED = re.compile(r"(input|arr)(_\d+)?|\d+")
"""What NumPy, torch and bntool call an array that nobody gave a name."""


class RealInputs:
    """The samples of a file, as inputs like `like`.

    Arrays go to the inputs of the same name, those without a name to the inputs in order, each in the
    input's type. A sample is an entry of the first axis. `fixed` are the lengths that a model demands of that
    axis, by input: such an array is given whole or, where all are fixed, in parts of that length.

    Raises `LoadError` for a file that cannot be read, `UsageError` for arrays that are none like `like`.
    """

    def __init__(self, path: str, like: Inputs, fixed: Mapping[str, int] | None = None) -> None:
        self.path, self._like = path, like
        named = _by_name(held_in(path), like, path)
        self._tensors = {name: _cast(named[name], old, name, path) for name, old in like.tensors().items()}
        rows = {name: (fixed or {}).get(name, 0) for name, tensor in self._tensors.items() if tensor.dim()}
        self._block = max(rows.values(), default=0) if all(rows.values()) else 0
        self._cut = [name for name, length in rows.items() if self._block or not length]
        counts = {len(self._tensors[name]) // (self._block or 1) for name in self._cut}
        if 0 in counts:
            raise UsageError(f"{path} holds no whole sample", next_step="one at least of each input")
        self._count = counts.pop() if len(counts) == 1 else 0

    def batches(self, *, full: bool) -> list[Inputs]:
        """The samples in batches of 1, 2, 3 and then 32, or of the one size that the model takes; without
        `full` only the first.
        """
        if not self._count:
            return [self.whole]
        ends = [0, 1, *([3, 6] if full else [])]
        ends += range(ends[-1] + _BATCH, self._count + _BATCH, _BATCH) if full else []
        if self._block:
            ends = list(range(self._count + 1 if full else 2))
        cuts = itertools.pairwise(ends)
        return [self._of(range(a, min(b, self._count))) for a, b in cuts if a < self._count]

    def taken(self, run: Callable[[Inputs], Any], *, full: bool) -> list[Inputs]:
        """The batches, of a model that runs on the first; else all as they are, where it runs on that: its
        samples lie along another axis. Raises `UsageError` where it runs on neither.
        """
        batches = self.batches(full=full)
        failed: BntoolError | None = None
        for found in (batches, [self.whole]):
            try:
                run(found[0])
            except BntoolError as error:
                failed = failed or error
                continue
            return found
        assert failed is not None
        raise UsageError(
            f"the model does not run on {self.path}: {failed.what}",
            where=", ".join(f"{name} {_shape(t)}" for name, t in batches[0].tensors().items()),
            next_step="give arrays as the model takes them: samples along the first axis",
        )

    def of(self, batch: int) -> Inputs:
        """As many samples as are asked for, from the first again after the last."""
        return self._of([i % self._count for i in range(batch)]) if self._count else self.whole

    @property
    def whole(self) -> Inputs:
        """All of the arrays as they are."""
        return self._filled(self._tensors)

    def _of(self, samples: Sequence[int]) -> Inputs:
        def part(name: str, tensor: Tensor) -> Tensor:
            if name not in self._cut:
                return tensor
            if not self._block:
                return tensor[list(samples)]
            return tensor[samples[0] * self._block : (samples[0] + 1) * self._block]

        return self._filled({name: part(name, tensor) for name, tensor in self._tensors.items()})

    def _filled(self, tensors: Mapping[str, Tensor]) -> Inputs:
        left = iter(tensors.values())
        return dataclasses.replace(self._like.map(lambda _: next(left)), origin=f"--inputs {self.path}")


def file_inputs(path: str | Path, inputs_file: str, *, full: bool) -> tuple[RealInputs, list[Inputs]]:
    """The samples as inputs of an ONNX file, and those batches that it is run on. Raises as `RealInputs`."""
    from bntool.files.onnx_files import open_onnx
    from bntool.observe.onnx_shapes import asked_shapes
    from bntool.runtime.onnx_inputs import SIDES, drawn_inputs
    from bntool.runtime.runner import fits
    from bntool.verifying.onnx_checking import opened

    told = asked_shapes(open_onnx(path).model)
    runner = opened(path, told)
    fixed = {name: axes[0] for name, _, axes in runner.signature if axes and isinstance(axes[0], int)}
    real = RealInputs(inputs_file, drawn_inputs(runner, 1, SIDES[0], 0, told), fixed)
    first = real.batches(full=False)[0].tensors()
    for name, _, axes in runner.signature:
        if not fits(axes, first[name].shape):
            takes = "x".join(str(n) if isinstance(n, int) else "?" for n in axes)
            raise UsageError(
                f"{inputs_file} holds {name} of shape {_shape(first[name])}, and the file takes {takes}",
                where=str(path),
                next_step=f"its inputs are {', '.join(n for n, *_ in runner.signature)}; ? is any length",
            )

    def run(inputs: Inputs) -> None:
        lengths: dict[str, set[int]] = {}
        for name, _, axes in runner.signature:
            for axis, length in zip(axes, inputs.tensors()[name].shape, strict=False):
                if isinstance(axis, str):
                    lengths.setdefault(axis, set()).add(length)
        for axis, found in lengths.items():
            if len(found) > 1:
                raise UsageError(f"the axis {axis} is {' and '.join(map(str, sorted(found)))} long")
        runner.run(inputs)

    return real, real.taken(run, full=full)


def session_inputs(session: Session, inputs_file: str, *, full: bool) -> tuple[RealInputs, list[Inputs]]:
    """The samples as inputs of a model that torch runs, and those batches that it is run on.

    The first becomes the example of the session. Raises as `RealInputs`.
    """
    from bntool.core.errors import ObserveError
    from bntool.runtime.libraries import first_line
    from bntool.runtime.programs import RunnableProgram
    from bntool.runtime.torch_runner import TorchRunner

    program = session.program
    if program is None:
        like = session.inputs or like_arrays(inputs_file, session.model) or session.known_inputs()
        real = RealInputs(inputs_file, like)
    else:
        real = _of_program(program, inputs_file)
    runner = None
    if session.loaded.kind != "module":
        runner = TorchRunner(session.model if program is None else RunnableProgram(program))

    def run(inputs: Inputs) -> None:
        session.on(inputs)
        try:
            session.observe() if runner is None else runner.run(inputs)
        except BntoolError:
            raise
        except Exception as error:  # whatever a model's forward raises
            raise ObserveError(first_line(error)) from error

    found = real.taken(run, full=full)
    return real, found


def _of_program(program: ExportedProgram, inputs_file: str) -> RealInputs:
    """An axis that has one length under both sets of sizes is fixed."""
    from bntool.runtime.programs import drawn_inputs

    like, other = (drawn_inputs(program, which).tensors() for which in (0, 1))
    fixed = {name: len(t) for name, t in like.items() if t.dim() and len(t) == len(other[name])}
    return RealInputs(inputs_file, drawn_inputs(program, 0), fixed)


def held_in(path: str) -> dict[str, Any]:
    """The arrays of a file by name. Raises `LoadError`."""
    from bntool.data.arrays import arrays_in
    from bntool.files.tensors import require_dense

    file = Path(path)
    if not file.is_file():
        raise LoadError(f"no such file: {path}", next_step="name an .npy, .npz or .pt file of inputs")
    held = arrays_in(file)
    require_dense(held.items(), file)
    return held


def like_arrays(path: str, model: nn.Module) -> Inputs | None:
    """Inputs of a module of which none are known: each array by the name of an input, else by its place.
    None where neither tells.

    Floating ones are of the module's type, and so is one array of integers for a module that reads none.
    """
    import torch

    from bntool.cli.example_inputs import first_reads_tokens
    from bntool.data.arrays import tensor_of
    from bntool.graph.inputs import Inputs

    held = {name: tensor_of(array, path) for name, array in held_in(path).items()}
    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    integers = len(held) == 1 and not first_reads_tokens(model)

    def like(tensor: Tensor) -> Tensor:
        tensor = tensor.real if tensor.is_complex() else tensor
        return tensor.to(weight.dtype) if tensor.is_floating_point() or integers else tensor

    try:
        known = inspect.signature(model.forward).parameters
    except ValueError:  # a method of TorchScript tells none
        return Inputs(tuple(map(like, held.values())))
    if held.keys() <= known.keys():
        return Inputs((), {name: like(tensor) for name, tensor in held.items()})
    if len(held) == 1 or all(map(_UNNAMED.fullmatch, held)):
        return Inputs(tuple(map(like, held.values()))).named_for(model.forward)
    needed = [name for name, one in known.items() if one.default is one.empty]
    if needed and set(needed) <= held.keys():
        return Inputs((), {name: like(held[name]) for name in needed})
    return None


def _by_name(held: Mapping[str, Any], like: Inputs, path: str) -> dict[str, Any]:
    from bntool.data.arrays import chosen_arrays

    wanted = list(like.tensors())
    if set(wanted) <= held.keys():
        return {name: held[name] for name in wanted}
    unnamed = all(map(_UNNAMED.fullmatch, held))
    if like.kwargs and not unnamed:
        raise _misnamed(path, held, wanted)
    if len(wanted) > 1 and (len(held) != len(wanted) or not unnamed):
        raise _misnamed(path, held, wanted)
    found = chosen_arrays(dict(held), like, path) if len(wanted) == 1 else held
    return dict(zip(wanted, found.values(), strict=True))


def _misnamed(path: str, held: Mapping[str, Any], wanted: Sequence[str]) -> UsageError:
    return UsageError(
        f"{path} holds {', '.join(held) or 'nothing'}, and the model takes {', '.join(wanted)}",
        next_step=f"name the arrays {', '.join(wanted)}: numpy.savez(FILE, {wanted[0]}=...)",
    )


def _cast(array: Any, old: Tensor, name: str, path: str) -> Tensor:
    """The array in the type of an input, which must hold its numbers."""
    from bntool.data.arrays import tensor_of

    given = tensor_of(array, path)
    holds = (given.is_complex(), given.is_floating_point()) <= (old.is_complex(), old.is_floating_point())
    if given.is_complex() > old.is_complex():
        step = "save real numbers: the imaginary parts would be dropped"
    else:
        step = f"save {name} as {str(old.dtype).removeprefix('torch.')}"
    cast = given.to(old.dtype) if holds else given
    if holds and (old.is_floating_point() or old.is_complex() or bool((cast.to(given.dtype) == given).all())):
        return cast
    raise UsageError(f"{path} holds {name} as {given.dtype}, and the model takes {old.dtype}", next_step=step)


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
