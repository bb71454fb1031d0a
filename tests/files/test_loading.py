from __future__ import annotations

import copy
from collections import OrderedDict
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from safetensors.torch import load_file, save_file
from torch import nn

from bntool.api import load
from bntool.core.errors import LoadError, UsageError
from bntool.files.atomic import sha256_of
from bntool.files.saving import save_model

MAKER = """
from torch import nn
def make():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
def tied():
    net = make()
    net.extra = nn.Linear(4, 2)
    net.extra.weight = net[2].weight
    return net
class Wrapper(nn.Module):
    def __init__(self):
        super().__init__()
        self.module = make()
"""


@pytest.fixture
def arch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("bnt_maker.py").write_text(MAKER)
    return "bnt_maker.py:make"


def _net() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))


def _same(model: nn.Module, other: nn.Module) -> bool:
    left, right = model.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(v, right[k]) for k, v in left.items())


def test_a_whole_module_keeps_class_mode_and_hash(tmp_path: Path) -> None:
    net = _net().eval()
    torch.save(net, tmp_path / "net.pt")
    loaded = load(tmp_path / "net.pt")
    assert type(loaded.model) is nn.Sequential
    assert not loaded.model.training
    assert _same(loaded.model, net)
    assert loaded.kind == "module"
    assert loaded.source_hash == sha256_of(tmp_path / "net.pt")
    assert loaded.path == tmp_path / "net.pt"


@pytest.mark.parametrize("wrap", ["bare", "model", "state_dict", "ema", "model_state_dict", "nested"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_weights_are_found_and_saved_back_the_same_way(wrap: str, prefix: str, arch: str) -> None:
    net = _net()
    state = OrderedDict((prefix + k, v) for k, v in net.state_dict().items())
    held = {"bare": state, "nested": {"epoch": 1, "model": {"state_dict": state}}}.get(
        wrap, {wrap: state, "epoch": 1}
    )
    torch.save(held, "w.pth")
    loaded = load("w.pth", arch=arch)
    assert _same(loaded.model, net)
    assert loaded.kind == ("state_dict" if wrap == "bare" else "checkpoint")
    assert loaded.state_dict is not None
    assert list(loaded.state_dict) == list(net.state_dict())

    changed = copy.deepcopy(loaded.model)
    with torch.no_grad():
        changed[0].weight.add_(1)  # type: ignore[index,union-attr,operator]
    save_model(loaded, changed, "out.pth")
    back = torch.load("out.pth", weights_only=True)
    assert back.keys() == held.keys()
    assert wrap == "bare" or wrap == "nested" or back["epoch"] == 1
    assert _same(load("out.pth", arch=arch).model, changed)
    assert _same(loaded.model, net)


@pytest.mark.parametrize("prefix", ["model.", "net.encoder.", "module.model."])
def test_what_a_training_module_put_before_every_key_is_taken_off_and_saved_back(
    prefix: str, arch: str
) -> None:
    net = _net()
    torch.save({"state_dict": {prefix + k: v for k, v in net.state_dict().items()}, "epoch": 1}, "w.ckpt")
    loaded = load("w.ckpt", arch=arch)
    assert _same(loaded.model, net)
    assert f"{prefix!r} was taken off every key" in loaded.notes
    save_model(loaded, loaded.module, "out.ckpt")
    back = torch.load("out.ckpt", weights_only=True)["state_dict"]
    assert list(back) == [prefix + k for k in net.state_dict()]
    assert _same(load("out.ckpt", arch=arch).model, net)


def _lightning(prefix: str, **beside: object) -> dict[str, object]:
    """What a training module keeps, with the net's weights under `prefix`."""
    return {**{prefix + k: v for k, v in _net().state_dict().items()}, **beside}


@pytest.mark.parametrize("prefix", ["model.", "net.", "module.", "_orig_mod.", "module.model._orig_mod."])
@pytest.mark.parametrize("wrap", ["bare", "state_dict"])
def test_entries_that_are_not_the_models_stay_beside_it(prefix: str, wrap: str, arch: str) -> None:
    beside = {"criterion.weight": torch.ones(2), "n_averaged": torch.tensor(3), "head.bias": torch.zeros(1)}
    state = _lightning(prefix, **beside)
    torch.save(state if wrap == "bare" else {wrap: state, "epoch": 1}, "w.ckpt")
    loaded = load("w.ckpt", arch=arch)
    assert _same(loaded.module, _net())
    notes = "; ".join(loaded.notes)
    assert f"{len(_net().state_dict())} weights taken from under {prefix!r}" in notes
    assert "3 others left, and saved as they are: criterion.weight, n_averaged, head.bias" in notes
    with torch.no_grad():
        loaded.module[0].weight.add_(1)  # type: ignore[index,union-attr,operator]
    save_model(loaded, loaded.module, "out.ckpt")
    back = torch.load("out.ckpt", weights_only=True)
    back = back if wrap == "bare" else back[wrap]
    assert back.keys() == state.keys()
    assert torch.equal(back["criterion.weight"], torch.ones(2))
    assert _same(load("out.ckpt", arch=arch).module, loaded.module)


def test_what_training_code_keeps_between_weights_is_left(arch: str) -> None:
    kept = {"total_ops": torch.zeros(1), "0.total_params": torch.zeros(1), "loss_fn.weight": torch.ones(3)}
    torch.save({**_net().state_dict(), **kept, "epoch": 4}, "w.pth")
    loaded = load("w.pth", arch=arch)
    assert _same(loaded.module, _net())
    save_model(loaded, loaded.module, "out.pth")
    back = torch.load("out.pth", weights_only=True)
    assert back.keys() == {*_net().state_dict(), *kept, "epoch"}
    torch.save({**_net().state_dict(), "3.weight": torch.ones(4)}, "larger.pth")
    with pytest.raises(LoadError, match=r"1 unexpected \(3\.weight\)"):
        load("larger.pth", arch=arch)


def test_a_running_average_beside_the_weights_is_left_and_can_be_named(arch: str) -> None:
    averaged = {f"ema.{k}": v + 1 for k, v in _net().state_dict().items()}
    torch.save({"state_dict": {**averaged, **_lightning("net.")}}, "w.ckpt")
    assert _same(load("w.ckpt", arch=arch).module, _net())
    for key in ("ema", "state_dict.ema"):
        assert float(load("w.ckpt", arch=arch, key=key).module.state_dict()["1.running_mean"][0]) == 1
    other = {f"critic.{k}": v + 1 for k, v in _net().state_dict().items()}
    torch.save({"state_dict": {**other, **_lightning("net.")}}, "two.ckpt")
    with pytest.raises(LoadError, match=r"fit under 'critic\.' and under 'net\.'") as caught:
        load("two.ckpt", arch=arch)
    assert caught.value.next_step == "say which: --key state_dict.critic, or --key state_dict.net"
    assert _same(load("two.ckpt", arch=arch, key="state_dict.net").module, _net())


def test_weights_under_a_name_of_ones_own_are_found_or_the_names_are_told(arch: str) -> None:
    state, other = _net().state_dict(), nn.Linear(2, 2).state_dict()
    torch.save({"my": {"weights": state}, "optimizer": {"m": torch.ones(2)}, "epoch": 1}, "one.pt")
    assert _same(load("one.pt", arch=arch).module, _net())
    torch.save({"g": {"net": state}, "d": other}, "two.pt")
    with pytest.raises(LoadError, match="2 sets of weights") as caught:
        load("two.pt", arch=arch)
    assert caught.value.next_step == "say which: --key g.net, --key d"
    assert _same(load("two.pt", arch=arch, key="g.net").module, _net())
    with pytest.raises(UsageError, match="no weights there") as missed:
        load("two.pt", arch=arch, key="g.nets")
    assert missed.value.next_step == "--key g.net, or --key d"
    torch.save({"model": other, "trained": {"deep": {"module." + k: v for k, v in state.items()}}}, "w.pt")
    with pytest.raises(LoadError, match="do not fit") as caught:
        load("w.pt", arch=arch)
    assert caught.value.next_step == "--key trained.deep has all of its names"
    assert _same(load("w.pt", arch=arch, key="trained.deep").module, _net())


def test_wrappers_inside_keys_are_taken_out(arch: str) -> None:
    state = {k.replace("0.", "0.module."): v for k, v in _net().state_dict().items()}
    torch.save({f"model.{k}": v for k, v in state.items()}, "w.pth")
    assert _same(load("w.pth", arch=arch).module, _net())


def test_a_prefix_that_is_the_models_own_child_stays(arch: str) -> None:
    wrapped = nn.Module()
    wrapped.module = _net()
    torch.save(wrapped.state_dict(), "w.pth")
    assert _same(load("w.pth", arch="bnt_maker.py:Wrapper").model, wrapped)


def test_orig_mod_inside_keys_is_taken_out(arch: str) -> None:
    state = {k.replace("0.", "0._orig_mod."): v for k, v in _net().state_dict().items()}
    torch.save(state, "w.pth")
    loaded = load("w.pth", arch=arch)
    assert _same(loaded.model, _net())
    assert any("_orig_mod." in note for note in loaded.notes)


def test_key_takes_another_entry_and_the_note_names_it(arch: str) -> None:
    other = _net()
    with torch.no_grad():
        other[0].weight.zero_()  # type: ignore[index,union-attr,operator]
    torch.save({"state_dict": _net().state_dict(), "averaged": {"deep": other.state_dict()}}, "w.pth")
    torch.save({"state_dict": _net().state_dict(), "ema": other.state_dict()}, "two.pth")
    assert _same(load("w.pth", arch=arch, key="averaged.deep").model, other)
    assert any("ema; --key" in note for note in load("two.pth", arch=arch).notes)
    with pytest.raises(UsageError, match="state_dict, averaged"):
        load("w.pth", arch=arch, key="nothing")


def test_weights_without_arch_say_how_to_name_it(arch: str) -> None:
    torch.save(_net().state_dict(), "w.pth")
    save_file(_net().state_dict(), "w.safetensors")
    for file in ("w.pth", "w.safetensors"):
        with pytest.raises(LoadError, match="only weights") as caught:
            load(file)
        assert "--arch torchvision:resnet50" in caught.value.next_step
        assert caught.value.exit_code == 3


def test_misfits_are_counted_and_named(arch: str) -> None:
    state = _net().state_dict()
    del state["0.bias"]
    state["new.weight"] = torch.zeros(2)
    torch.save(state, "keys.pth")
    with pytest.raises(LoadError, match=r"1 missing \(0.bias\); 1 unexpected \(new.weight\)"):
        load("keys.pth", arch=arch)
    state = _net().state_dict()
    state["2.weight"] = torch.zeros(10, 4)
    torch.save(state, "shape.pth")
    with pytest.raises(LoadError, match=r"2.weight is \[10, 4\], the model has \[2, 4\]"):
        load("shape.pth", arch=arch)
    torch.save({}, "empty.pth")
    with pytest.raises(LoadError, match="it is empty"):
        load("empty.pth", arch=arch)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_keep_the_files_types(dtype: torch.dtype, arch: str) -> None:
    net = _net().to(dtype)
    torch.save(net.state_dict(), "w.pth")
    loaded = load("w.pth", arch=arch)
    assert {p.dtype for p in loaded.model.parameters()} == {dtype}
    assert _same(loaded.model, net)


def test_safetensors_with_tied_weights_round_trip(arch: str) -> None:
    net = _net()
    net.extra = nn.Linear(4, 2)
    net.extra.weight = net[2].weight  # type: ignore[index]
    state = {k: v for k, v in net.state_dict().items() if k != "extra.weight"}
    save_file(state, "w.safetensors", metadata={"format": "pt"})
    loaded = load("w.safetensors", arch="bnt_maker.py:tied")
    assert loaded.kind == "safetensors"
    assert loaded.model.extra.weight is loaded.model[2].weight  # type: ignore[index,union-attr]
    save_model(loaded, loaded.model, "out.safetensors")
    assert load_file("out.safetensors").keys() == state.keys()
    assert dict(load("out.safetensors", arch="bnt_maker.py:tied").metadata) == {"format": "pt"}
    with pytest.raises(UsageError, match="same kind"):
        save_model(loaded, loaded.model, "out.onnx")


def test_a_module_inside_a_checkpoint_goes_back_to_its_place(tmp_path: Path) -> None:
    torch.save({"model": _net(), "epoch": 4}, tmp_path / "c.pt")
    loaded = load(tmp_path / "c.pt")
    new = nn.Sequential(nn.ReLU())
    save_model(loaded, new, tmp_path / "out.pt")
    again = load(tmp_path / "out.pt")
    assert isinstance(again.model[0], nn.ReLU)  # type: ignore[index]
    assert again.wrapped_in is not None
    assert again.wrapped_in.container["epoch"] == 4


def test_prepare_shapes_the_model_before_its_weights(arch: str) -> None:
    net = _net()
    net.late = nn.BatchNorm2d(4)
    torch.save(net.state_dict(), "w.pth")

    def prepare(model: nn.Module) -> nn.Module:
        model.late = nn.BatchNorm2d(4)
        return model

    assert _same(load("w.pth", arch=arch, prepare=prepare).model, net)


def test_files_that_are_no_model_say_what_they_are(tmp_path: Path) -> None:
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", value[:1], value[1:])
    onnx.save(helper.make_model(graph), tmp_path / "m.onnx")
    (tmp_path / "net.py").write_text("class Net: ...\n")
    (tmp_path / "notes.pt").write_text("hello\n")
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "bad.safetensors").write_bytes(b"\x05\0\0\0\0\0\0\0{}abc")
    expected = {
        "m.onnx": "does not load that kind yet", "net.py": "text file", "notes.pt": "text file",
        "empty.pt": "empty file", "bad.safetensors": "damaged", "notess.pt": "did you mean notes.pt",
        "": "is a folder",
    }  # fmt: skip
    for name, words in expected.items():
        with pytest.raises(LoadError, match=words) as caught:
            load(tmp_path / name)
        assert caught.value.next_step
    with pytest.raises(LoadError) as caught:
        load(tmp_path / "net.py")
    assert caught.value.next_step.endswith("net.py:Class")


def test_options_that_do_not_fit_together(arch: str) -> None:
    torch.save(_net().state_dict(), "w.pth")
    torch.save(_net(), "net.pt")
    for options in (
        {"ref": "w.pth", "weights": "w.pth"}, {"ref": "w.pth", "pretrained": True},
        {"ref": arch, "arch": arch}, {"ref": "w.pth", "arch": "net.pt"},
        {"ref": arch, "pretrained": True},
        {"ref": "torchvision:vgg11", "pretrained": True, "weights": "w.pth"},
    ):  # fmt: skip
        with pytest.raises(UsageError):
            load(**options)  # type: ignore[arg-type]
    assert any("not needed" in note for note in load("net.pt", arch=arch).notes)


def test_a_model_that_was_scripted_once_loads(tmp_path: Path) -> None:
    """torch.jit.script leaves a table in every layer."""
    net = _net().eval()
    for layer in net.modules():
        layer.__overloads__ = {}  # what it leaves, without its deprecation
    torch.save(net, tmp_path / "net.pt")
    loaded = load(tmp_path / "net.pt")
    assert _same(loaded.model, net)
    net[0].__overloads__ = {"forward": ["half"]}
    torch.save(net, tmp_path / "net.pt")
    with pytest.raises(LoadError, match="__overloads__"):
        load(tmp_path / "net.pt")


def test_a_file_saved_without_checksums_loads(tmp_path: Path) -> None:
    with_sums = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(_net(), tmp_path / "net.pt")
    finally:
        torch.serialization.set_crc32_options(with_sums)
    assert _same(load(tmp_path / "net.pt").model, _net())


def test_a_text_under_the_name_of_a_method_that_nobody_calls(tmp_path: Path) -> None:
    """Detection models keep the name of a layer's class under `type`."""
    net = _net().eval()
    net[0].type = "torch.nn.modules.conv.Conv2d"
    torch.save(net, tmp_path / "net.pt")
    assert load(tmp_path / "net.pt").model[0].type == "torch.nn.modules.conv.Conv2d"
    net[0].forward = "nothing"
    torch.save(net, tmp_path / "net.pt")
    with pytest.raises(LoadError, match=r"hides the method Conv2d\.forward"):
        load(tmp_path / "net.pt")
