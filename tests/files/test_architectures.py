"""The architecture of a file of weights, found by its keys and shapes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from bntool.api import load
from bntool.core.errors import LoadError
from bntool.files import architectures
from bntool.files.architectures import Index, load_index, marks_of, take_exact

torchvision = pytest.importorskip("torchvision")


@pytest.fixture(scope="module")
def index() -> Index:
    return load_index(build=("torchvision",))


def test_every_model_of_torchvision_is_in_the_index(index: Index) -> None:
    names = {n for n in torchvision.models.list_models() if not n.startswith("quantized")}
    assert {r.removeprefix("torchvision:") for r in index.marks if r.startswith("torchvision:")} == names
    assert [r for r, marks in index.marks.items() if not len(marks)] == []


@pytest.mark.parametrize(
    "name", ["resnet18", "regnet_x_400mf", "squeezenet1_1", "googlenet", "lraspp_mobilenet_v3_large"]
)
def test_weights_find_their_own_architecture(index: Index, name: str) -> None:
    with torch.device("meta") if name != "regnet_x_400mf" else torch.device("cpu"):
        options = {"weights_backbone": None} if name.startswith("lraspp") else {}
        if name == "googlenet":
            options = {"init_weights": False}
        state = torchvision.models.get_model_builder(name)(weights=None, **options).state_dict()
    best = index.matches(state)[0]
    assert (best.reference, best.exact) == (f"torchvision:{name}", True)


def test_another_head_is_near_and_not_exact(index: Index) -> None:
    state = torchvision.models.resnet18(num_classes=10).state_dict()
    best = index.matches(state)[0]
    assert best.reference == "torchvision:resnet18"
    # All but the two of the head agree, and those two stand on either side.
    counted = [n for n in state if not n.endswith("num_batches_tracked")]
    assert best.score == (len(counted) - 2) / (len(counted) + 2)
    assert str(best).endswith(f"({best.score * 100:.1f} %)") and not best.exact
    with pytest.raises(LoadError, match="fits these weights exactly; the nearest: torchvision:resnet18"):
        take_exact(state, index)


def test_what_is_nothing_known_is_near_nothing(index: Index) -> None:
    assert index.matches(nn.Linear(3, 4).state_dict()) == []
    with pytest.raises(LoadError, match="none is near"):
        take_exact(nn.Linear(3, 4).state_dict(), index)


def test_auto_takes_the_one_that_fits(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bntool.files.loading.load_index", lambda tell=None, **_: index)
    model = torchvision.models.squeezenet1_1(weights=None)
    torch.save(model.state_dict(), tmp_path / "net.pt")
    loaded = load(tmp_path / "net.pt", arch="auto")
    assert loaded.arch == "torchvision:squeezenet1_1"
    assert any("--arch auto: torchvision:squeezenet1_1" in note for note in loaded.notes)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.module.state_dict()[name], tensor)


def test_without_arch_the_name_is_told(tmp_path: Path) -> None:
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), tmp_path / "net.pt")
    with pytest.raises(LoadError, match="torchvision:squeezenet1_1 fits"):
        load(tmp_path / "net.pt")


def test_architectures_that_differ_in_what_they_compute_are_not_chosen_between(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state = torchvision.models.squeezenet1_1(weights=None).state_dict()
    twins = Index({f"torchvision:{n}": marks_of(state) for n in ("a", "b")})
    outputs = {"torchvision:a": torch.ones(3), "torchvision:b": torch.ones(3) * 2}
    monkeypatch.setattr(architectures, "_output", lambda reference, _: outputs[reference])
    with pytest.raises(LoadError, match="fit 2 architectures, which do not compute the same"):
        take_exact(state, twins)
    outputs["torchvision:b"] = torch.ones(3) * (1 + 1e-6)
    assert take_exact(state, twins) == "torchvision:a"
    monkeypatch.setattr(architectures, "_output", lambda *_: None)
    with pytest.raises(LoadError, match="do not compute the same"):
        take_exact(state, twins)


def test_building_stops_in_time_goes_on_and_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(architectures, "_references", lambda: ["torchvision:alexnet", "torchvision:vgg11"])
    assert load_index(seconds=-1).missing == ("torchvision:alexnet", "torchvision:vgg11")
    told: list[str] = []
    assert load_index(told.append).missing == ()
    assert told == [f"looking at architectures, once: {n} of 2" for n in (1, 2)]
    (kept,) = (tmp_path / "bntool").iterdir()
    monkeypatch.setattr(architectures, "_marks_of_model", lambda reference: pytest.fail("built again"))
    assert len(load_index().marks) == 2
    kept.write_bytes(kept.read_bytes()[:50])  # a damaged one is built again
    with pytest.raises(pytest.fail.Exception):
        load_index()


def test_the_index_is_not_kept_where_it_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(architectures, "_references", lambda: ["torchvision:alexnet"])
    assert list(load_index().marks) == ["torchvision:alexnet"]
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
