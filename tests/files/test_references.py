from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from bntool.api import load
from bntool.core.errors import LoadError, UsageError
from bntool.files import references
from bntool.files.saving import allow_entries_of, save_model
from bntool.files.security.allowed import allow_entries_for

SOURCE = """
import bnt_sibling
from torch import nn
print("noise on stdout")
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(bnt_sibling.CHANNELS, 4, 3)
class Nested:
    Net = Net
def broken():
    raise ValueError("no data")
def needs(argument): ...
def number():
    return 5
ready = Net()
constant = 3
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "bnt_script.py").write_text(SOURCE)
    (tmp_path / "sub" / "bnt_sibling.py").write_text("CHANNELS = 3\n")
    (tmp_path / "bnt_pkg").mkdir()
    (tmp_path / "bnt_pkg" / "__init__.py").write_text("")
    (tmp_path / "bnt_pkg" / "nets.py").write_text(
        "from torch import nn\ndef make(): return nn.Linear(2, 3)\n"
    )
    monkeypatch.chdir(tmp_path)
    yield tmp_path  # type: ignore[misc]
    for name in [n for n in sys.modules if n.startswith("bnt_")]:
        del sys.modules[name]


def test_script_class_function_nested_name_and_instance(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = list(sys.path)
    for name in ("Net", "Nested.Net", "ready"):
        loaded = load(f"sub/bnt_script.py:{name}")
        assert type(loaded.model).__name__ == "Net"
        assert loaded.kind == "reference"
        assert loaded.source_hash == ""
        assert loaded.path is None
    assert capsys.readouterr().out == ""
    assert sys.path == before


def test_package_factory_and_weights(project: Path) -> None:
    torch.save(nn.Linear(2, 3).state_dict(), "w.pth")
    loaded = load("bnt_pkg.nets:make", weights="w.pth")
    assert torch.equal(loaded.model.weight, torch.load("w.pth", weights_only=True)["weight"])  # type: ignore[arg-type]
    assert loaded.source_hash
    assert [p.name for p in loaded.files] == ["w.pth"]


@pytest.mark.parametrize(
    ("ref", "words"),
    [
        ("sub/bnt_script.py:Nett", "did you mean Net"), ("sub/bnt_script.py:broken", "ValueError: no data"),
        ("sub/bnt_script.py:needs", "missing 1 required"), ("sub/bnt_script.py:number", "gave a int"),
        ("sub/bnt_script.py:constant", "is a int"), ("sub/none.py:Net", "no such file"),
        ("bnt_pkg.none:make", "cannot import"), ("bnt_pkg.nets:other", "has no other"),
        ("torchvision:resnet5O", "did you mean resnet50"), ("timm:resnet5O", "did you mean resnet50"),
        ("C:\\nothing.pt", "no such file"), ("weights/none.pt", "no such file"),
        ("resnet18", "no such file: resnet18; did you mean torchvision:resnet18"),
        ("https://example.org/resnet.pt", "https://example.org/resnet.pt is an address"),
    ],
)  # fmt: skip
def test_what_cannot_be_made_is_one_clear_error(ref: str, words: str, project: Path) -> None:
    with pytest.raises(LoadError, match=words) as caught:
        load(ref)
    assert caught.value.next_step


def test_a_script_that_would_shadow_a_module_is_refused(project: Path) -> None:
    Path("json.py").write_text("class Net: ...\n")
    with pytest.raises(LoadError, match="rename") as caught:
        load("json.py:Net")
    assert caught.value.next_step == "rename the script"


def test_a_script_that_fails_leaves_no_module(project: Path) -> None:
    Path("bnt_bad.py").write_text("import nothing_of_that_name\n")
    with pytest.raises(LoadError, match="ModuleNotFoundError"):
        load("bnt_bad.py:Net")
    assert "bnt_bad" not in sys.modules


def test_random_weights_are_the_same_every_time_and_the_rng_is_untouched() -> None:
    torch.manual_seed(99)
    random.seed(99)
    expected = torch.rand(3)
    torch.manual_seed(99)
    first = load("torchvision:mobilenet_v3_small")
    assert torch.equal(torch.rand(3), expected)
    second = load("torchvision:mobilenet_v3_small")
    pairs = zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert any("random weights" in note for note in first.notes)
    assert first.example_inputs is None


def test_a_detector_needs_no_download() -> None:
    assert load("torchvision:ssdlite320_mobilenet_v3_large").model is not None


def test_timm_records_its_input_size(tmp_path: Path) -> None:
    loaded = load("timm:resnet10t")
    assert loaded.example_inputs is not None
    assert loaded.example_inputs.shapes() == "1x3x176x176"
    save_model(loaded, loaded.model, tmp_path / "m.pt")
    again = load(tmp_path / "m.pt")
    assert again.example_inputs is not None
    assert again.example_inputs.shapes() == "1x3x176x176"


@pytest.mark.parametrize(
    "size", [(3, 10**9, 10**9), (3, -1, 4), ("a",), "3x4", None, (3, 2.5), (), (1 << 16, 1 << 16), (3,) * 9]
)
def test_an_absurd_recorded_size_is_not_used(size: object) -> None:
    model = nn.Linear(1, 1)
    model.default_cfg = {"input_size": size}  # type: ignore[assignment]
    assert references.recorded_inputs(model) is None


def test_a_failed_download_is_a_load_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm
    import torchvision

    def offline(*args: object, **options: object) -> nn.Module:
        raise OSError("network is unreachable")

    monkeypatch.setattr(timm, "create_model", offline)
    monkeypatch.setattr(torchvision.models, "get_model_builder", lambda name: offline)
    for ref in ("timm:resnet10t", "torchvision:vgg11"):
        with pytest.raises(LoadError, match="network is unreachable") as caught:
            load(ref, pretrained=True)
        assert "--weights" in caught.value.next_step
    with pytest.raises(UsageError):
        references.build("bnt_pkg.nets:make", pretrained=True)


def test_a_saved_model_tells_which_entries_load_it_again(project: Path) -> None:
    loaded = load("sub/bnt_script.py:Net")
    save_model(loaded, loaded.model, "net.pt")
    entries = allow_entries_of("net.pt")
    assert entries == (f"{project / 'sub' / 'bnt_script.py'}:Net",)
    with pytest.raises(LoadError, match=r"bnt_script\.Net"):
        load("net.pt")
    assert type(load("net.pt", allow=entries).model) is type(loaded.model)
    assert allow_entries_for(["pkg.mod.Net"]) == ("pkg.mod.Net",)
