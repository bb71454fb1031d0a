"""Models as people write and wrap them: what is folded, what is handed back, and what an export makes."""

from __future__ import annotations

import collections
import copy
import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

import bntool
from bntool.core.options import FoldOptions
from tests.fold_zoo import enliven


def parts() -> list[nn.Module]:
    return [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)]


class ReturnsNothing(nn.Sequential):
    """As many write it: without the `return`."""

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)

    def eval(self) -> None:  # type: ignore[override]
        super().eval()

    def double(self) -> None:  # type: ignore[override]
        super().double()

    def to(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        super().to(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> None:  # type: ignore[override]
        super()._apply(fn, recurse)


class NamedLikeMethods(nn.Sequential):
    def __init__(self, *modules: nn.Module) -> None:
        super().__init__(*modules)
        for name in ("type", "name", "float", "double", "to", "copy", "apply", "cpu"):
            vars(self)[name] = "an attribute"


def compiled(*modules: nn.Module) -> nn.Module:
    return torch.compile(nn.Sequential(*modules), backend="eager")  # type: ignore[return-value]


FORMS: dict[str, Callable[[], nn.Module]] = {
    "returns nothing": lambda: ReturnsNothing(*parts()),
    "attributes named like methods": lambda: NamedLikeMethods(*parts()),
    "DataParallel": lambda: nn.DataParallel(nn.Sequential(*parts())),
    "averaged": lambda: AveragedModel(nn.Sequential(*parts())),
    "compiled": lambda: compiled(*parts()),
    "a compiled part": lambda: nn.Sequential(compiled(*parts()), nn.ReLU()),
    "checkpoints": lambda: checkpoint_wrapper(nn.Sequential(*parts())),
    "a part with checkpoints": lambda: nn.Sequential(checkpoint_wrapper(nn.Sequential(*parts())), nn.ReLU()),
}


WRAPPED = ("averaged", "compiled", "checkpoints", "a compiled part")


@pytest.mark.parametrize("form", FORMS)
def test_a_model_in_any_wrapping_is_folded_proved_and_exported(form: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = FORMS[form]()
    nn.Module.eval(model)
    enliven(model)
    x = torch.randn(2, 3, 8, 8)
    result = bntool.fold(model, x)
    assert (type(result.model), len(result.plan.sites)) == (type(model), 2)
    assert "float64" in {row.precision for row in result.checks}
    if form not in WRAPPED:
        return
    bntool.export_onnx(result.model, x, tmp_path / "m.onnx")
    written = onnx.load(tmp_path / "m.onnx").graph
    assert not [n for n in written.node if n.op_type == "BatchNormalization"]
    assert not [w.name for w in written.initializer if w.name.startswith(("module.", "_orig_mod.", "_check"))]


def test_what_is_excluded_stays_in_the_file_of_a_wrapped_model(tmp_path: Path) -> None:
    """The file has the names of the model inside, the plan those of the wrapper."""
    model = enliven(nn.DataParallel(nn.Sequential(*parts())).eval())
    options = FoldOptions(exclude=("module.1",))
    bntool.fold_to_onnx(model, tmp_path / "m.onnx", torch.randn(1, 3, 8, 8), fold=options)
    kept = [n.name for n in onnx.load(tmp_path / "m.onnx").graph.node if n.op_type == "BatchNormalization"]
    assert kept == ["1/BatchNormalization"]


@dataclasses.dataclass
class Found:
    maps: Tensor
    pooled: Tensor
    note: str = "of no tensor"


Pair = collections.namedtuple("Pair", "maps pooled")


class Returns(nn.Module):
    def __init__(self, made: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.net, self.made = nn.Sequential(*parts()), made

    def forward(self, *, image: Tensor) -> Any:
        maps = self.net(image)
        return self.made(maps, maps.mean((2, 3)))


@pytest.mark.parametrize("made", [Found, Pair, lambda a, b: {"maps": a, "pooled": b}])
def test_results_of_any_class_are_exported_under_the_names_of_their_fields(made: Any, tmp_path: Path) -> None:
    model = enliven(Returns(made).eval())
    inputs = ((), {"image": torch.randn(1, 3, 8, 8)})
    result = bntool.fold(model, inputs)
    bntool.export_onnx(result.model, inputs, tmp_path / "m.onnx")
    graph = onnx.load(tmp_path / "m.onnx").graph
    assert [v.name for v in graph.output] == ["maps", "pooled"]
    assert all(row.passed for row in bntool.verify(model, tmp_path / "m.onnx", inputs).checks)


class TakesADict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.scale = nn.Sequential(*parts()), nn.Linear(2, 4)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.net(batch["image"]).mean((2, 3)) * self.scale(batch["meta"])


def test_the_batch_axis_of_a_dict_of_inputs_stays_open(tmp_path: Path) -> None:
    model = enliven(TakesADict().eval())
    inputs = ({"image": torch.randn(1, 3, 8, 8), "meta": torch.randn(1, 2)},)
    bntool.export_onnx(model, inputs, tmp_path / "m.onnx")
    graph = onnx.load(tmp_path / "m.onnx").graph
    assert [v.type.tensor_type.shape.dim[0].dim_param for v in graph.input] == ["batch", "batch"]


def test_an_instance_norm_with_running_statistics_exports(tmp_path: Path) -> None:
    torch.manual_seed(0)
    norm = nn.InstanceNorm2d(8, affine=True, track_running_stats=True)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.BatchNorm2d(8), nn.ReLU())
    model(torch.randn(4, 3, 12, 12))
    model.eval()
    x = torch.randn(2, 3, 12, 12)
    bntool.export_onnx(model, x, tmp_path / "m.onnx")
    assert all(row.passed for row in bntool.verify(model, tmp_path / "m.onnx", x).checks)


def test_the_processes_of_a_distributed_model_are_not_asked() -> None:
    """Its wrapper writes the buffers of the first process into all of them before a forward."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = enliven(nn.parallel.DistributedDataParallel(nn.Sequential(*parts())).eval())
        x = torch.randn(2, 3, 8, 8)
        result = bntool.fold(model, x)
        assert (type(result.model), len(result.plan.sites)) == (type(model), 2)
        assert model.require_forward_param_sync and result.model.require_forward_param_sync
        assert any("wrap result.model.module" in note for note in result.plan.notes)
        torch.testing.assert_close(result.model(x), model(x), rtol=1e-5, atol=1e-5)
    finally:
        torch.distributed.destroy_process_group()


class Tap:
    """Holds the handle of a hook that keeps what a layer gave."""

    def __init__(self, layer: nn.Module) -> None:
        self.stored: Tensor | None = None
        self.hook = layer.register_forward_hook(self.keep)

    def keep(self, layer: nn.Module, args: Any, output: Tensor) -> None:
        self.stored = output


class Tapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enc, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.dec = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
        self.tap = Tap(self.enc)

    def forward(self, x: Tensor) -> Tensor:
        y = self.dec(torch.relu(self.bn(self.enc(x))))
        assert self.tap.stored is not None
        return y + self.tap.stored


@pytest.mark.parametrize("check", ["none", "fast"])
def test_a_result_with_handles_of_hooks_is_copied_and_pickled_as_the_original_is(check: Any) -> None:
    model, x = Tapped().eval(), torch.randn(1, 3, 8, 8)
    folded = bntool.fold(model, x, check=check).model
    assert folded.tap is not model.tap
    copied = copy.deepcopy(folded)
    held = io.BytesIO()
    torch.save(copied, held)
    held.seek(0)
    read = torch.load(held, weights_only=False)
    wide = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        for one in (folded, copied, read):
            torch.testing.assert_close(one(wide), model(wide), rtol=1e-5, atol=1e-5)
