"""Run an `nn.Module` in eval mode and leave it, and the process, as they were found."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bntool.core.errors import CheckFailed, DeviceError
from bntool.graph.inputs import Inputs, outputs_of
from bntool.observe.isolation import SEED, Isolation, fresh, same_random_numbers
from bntool.observe.modules import modules_of
from bntool.observe.stand_in import cast, own_copy


class TorchRunner:
    """Runs a torch model in eval mode, each time from the state that it has and on the same random numbers.

    A stand-in is what runs, so that nothing stays behind (`Isolation`); `notes` says what could not be
    isolated. `tf32` lets CUDA round the factors of float32 products; without it they are full float32.
    Another device or dtype runs a copy. With `parts`, what the root's own children return is given too, by
    their names: for models whose last step can leave nothing (a detector that keeps no box). Each forward
    runs inside of a context that `within` makes. Raises `DeviceError` when the device is not there.
    """

    def __init__(
        self,
        model: nn.Module,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        *,
        parts: bool = False,
        tf32: bool = False,
        within: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        require_torch_device(device)
        self._tf32 = tf32
        self._parts = parts
        self._within = within
        self._model = _placed(model, torch.device(device), dtype)
        self._isolation = Isolation(self._model)
        self._dtype = dtype
        self._asked = torch.device(device)

    @property
    def model(self) -> nn.Module:
        """What stand-ins are made of: the model given, or its copy on another device or in another type."""
        return self._model

    @property
    def notes(self) -> list[str]:
        """What the runs so far could not keep apart from the model."""
        return self._isolation.notes

    @property
    def label(self) -> str:
        dtype = str(self._dtype).removeprefix("torch.") if self._dtype else ""
        return f"torch {type(self._model).__name__} {dtype}".strip()

    @property
    def device(self) -> str:
        """`cpu`, or `cuda:0 (name of the card)`, read from the tensors the model holds."""
        found = next((t.device for t in _tensors(self._model)), self._asked)
        if found.type != "cuda":
            return found.type
        return f"{found} ({torch.cuda.get_device_name(found)})"

    @property
    def provider(self) -> str:
        return "torch"

    def run(self, inputs: Inputs, *, prepare: Callable[[nn.Module], None] | None = None) -> dict[str, Tensor]:
        """Every output by name, detached, on the CPU. `prepare` is shown the stand-in before it runs.

        Raises `CheckFailed` when the model returns no tensor. Whatever the model's forward raises is not
        caught here.
        """
        moved = fresh(inputs.to(device=self._asked, dtype=self._dtype))
        with self._isolation.run() as model, self._held(), self._within():
            if prepare is not None:
                prepare(model)
            result = _with_parts(model, moved) if self._parts else _called(model, moved)
            return {name: t.detach().cpu().clone() for name, t in outputs_of(result).items()}

    @contextlib.contextmanager
    def ready(self, inputs: Inputs) -> Iterator[Callable[[], None]]:
        """Meanwhile, a function that runs the model once on these inputs and waits for the device.

        The runs follow each other on one stand-in, unwatched, for they are timed; where a first run wrote to
        a parameter, the stand-in has its own.
        """
        moved = fresh(inputs.to(device=self._asked, dtype=self._dtype))
        on_cuda = self._asked.type == "cuda"
        with self._isolation.run() as model, self._held():
            _called(model, fresh(moved))
        written = self._isolation.written
        isolation = Isolation(self._model, own_parameters=bool(written), writes=written)
        with isolation.run(watched=False) as model, self._held():

            def run() -> None:
                _called(model, moved)
                if on_cuda:
                    torch.cuda.synchronize(self._asked)

            yield run

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        # no_grad and not inference_mode: a tensor that a forward keeps in a global would be left as one
        # that autograd refuses later.
        with same_random_numbers(SEED), float32_products(tf32=self._tf32), torch.no_grad():
            yield


def _called(model: nn.Module, inputs: Inputs) -> Any:
    return model(*inputs.args, **dict(inputs.kwargs))


def _with_parts(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """The result, and what each child of the root returned at its last call."""
    seen: dict[str, Any] = {}

    def keep(name: str) -> Any:
        return lambda module, args, output: seen.__setitem__(name, output)

    hooks = [child.register_forward_hook(keep(name)) for name, child in model.named_children()]
    try:
        result = _called(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return {**seen, "result": result}


def require_torch_device(device: str) -> None:
    """Raise `DeviceError` unless torch can use `device`."""
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        built = torch.version.cuda
        raise DeviceError(
            "CUDA was asked for, but torch cannot use it",
            where="torch was built without CUDA" if built is None else f"no usable driver for CUDA {built}",
            next_step="run `bntool doctor`, or use --device cpu",
        )


@contextlib.contextmanager
def float32_products(*, tf32: bool) -> Iterator[None]:
    """Full float32 in matrix products and convolutions, or TF32 where CUDA has it; restored after."""
    backends: Any = torch.backends
    older = [(backends.cuda.matmul, "allow_tf32", tf32), (backends.cudnn, "allow_tf32", tf32)]
    newer = [
        (op, "fp32_precision", "tf32" if tf32 else "ieee")
        for op in (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)
    ]
    before = [(op, flag, _read_flag(op, flag)) for op, flag, _ in older + newer]
    try:
        matmul = torch.get_float32_matmul_precision()
    except RuntimeError:
        matmul = ""
    try:
        # Both sets of flags: torch refuses to read one that disagrees with the other.
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        for op, flag, value in older + newer:
            setattr(op, flag, value)
        yield
    finally:
        # This order: the older flag can say high or highest, but not medium.
        for op, flag, value in before[: len(older)]:
            if value is not None:
                setattr(op, flag, value)
        if matmul:
            torch.set_float32_matmul_precision(matmul)
        for op, flag, value in before[len(older) :]:
            setattr(op, flag, value)


def _read_flag(op: Any, flag: str) -> Any:
    """The flag's value, or None where torch refuses to read it because older and newer flags disagree."""
    try:
        return getattr(op, flag)
    except RuntimeError:
        return None


def _placed(model: nn.Module, device: torch.device, dtype: torch.dtype | None) -> nn.Module:
    if all(
        t.device.type == device.type and (dtype is None or t.dtype == dtype or not t.is_floating_point())
        for t in _tensors(model)
    ):
        return model
    try:
        moved = own_copy(model)
    except Exception as error:
        raise CheckFailed(
            f"the model cannot be copied, so it cannot run as {dtype or device}: {error}",
            where=type(model).__name__,
            next_step="remove what cannot be copied from the model (locks, open files, non-leaf tensors)",
        ) from error
    return cast(moved, dtype, device)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    for module in modules_of(model):
        for slots in (module._parameters, module._buffers):
            yield from (tensor for tensor in slots.values() if tensor is not None)
