"""Folders of a Hugging Face layout: loaded by their library, nothing is fetched or run."""

from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import bntool
from bntool.core.errors import LoadError, UsageError

ASKED: dict[str, Any] = {}


class PreTrainedModel(nn.Module):
    @classmethod
    def from_pretrained(cls, folder: str, **options: Any) -> nn.Module:
        ASKED.update(options, offline=os.environ.get("HF_HUB_OFFLINE"))
        model = cls()
        model.load_state_dict(load_file(f"{folder}/model.safetensors"))
        return model


class TinyNet(PreTrainedModel):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(pixel_values))


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    """What bntool asks of transformers."""
    made: Any = types.ModuleType("transformers")
    made.PreTrainedModel, made.TinyNet, made.__version__ = PreTrainedModel, TinyNet, "0"
    made.Path = Path
    monkeypatch.setitem(sys.modules, "transformers", made)


def saved(folder: Path, **config: Any) -> Path:
    folder.mkdir()
    told = {"model_type": "tiny", "architectures": ["TinyNet"], **config}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in told.items() if v is not None}))
    save_file(TinyNet().state_dict(), folder / "model.safetensors")
    return folder


@pytest.mark.usefixtures("library")
def test_its_own_library_loads_it_and_is_told_to_fetch_nothing(tmp_path: Path) -> None:
    before = os.environ.get("HF_HUB_OFFLINE")
    result = bntool.fold(saved(tmp_path / "net"), torch.randn(1, 3, 8, 8))
    assert [site.bn for site in result.plan.fold_sites] == ["bn"]
    assert ASKED == {
        "local_files_only": True,
        "trust_remote_code": False,
        "use_safetensors": True,
        "offline": "1",
    }
    assert os.environ.get("HF_HUB_OFFLINE") == before


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"auto_map": {"AutoModel": "code.Net"}}, "code of its own"),
        ({"architectures": ["Path"]}, "no model 'Path'"),
        ({"architectures": ["Other"]}, "no model 'Other'"),
        ({"model_type": None, "architecture": "resnet18"}, r"a timm model \(resnet18\)"),
        ({"model_type": None, "_class_name": "UNet2DModel"}, "a diffusers model"),
    ],
)
def test_what_is_no_model_of_it_is_told_by_what_it_is(
    tmp_path: Path, config: dict[str, Any], said: str
) -> None:
    with pytest.raises(LoadError, match=said) as caught:
        bntool.load(saved(tmp_path / "net", **config))
    assert caught.value.next_step


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "it is empty"),
        ("notes.txt", "it holds notes.txt"),
        ("model_index.json", "a diffusers pipeline"),
        ("modules.json", "a sentence-transformers model"),
        ("config.json", "it holds config.json"),
    ],
)
def test_another_layout_is_named(tmp_path: Path, name: str, said: str) -> None:
    if name:
        (tmp_path / name).write_text("[[" * 9)
    with pytest.raises(LoadError, match=said):
        bntool.load(tmp_path)


@pytest.mark.usefixtures("library")
def test_weights_that_are_a_pickle_or_do_not_fit_are_told(tmp_path: Path) -> None:
    folder = saved(tmp_path / "net")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(LoadError, match=r"pytorch_model.bin, a pickle, and no safetensors"):
        bntool.load(folder)
    save_file({"other": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(LoadError, match="transformers does not load TinyNet"):
        bntool.load(folder)
    with pytest.raises(UsageError, match="--arch is for a file"):
        bntool.load(folder, arch="timm:resnet18")


def test_without_the_library_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(LoadError, match="transformers is not installed") as caught:
        bntool.load(saved(tmp_path / "net"))
    assert caught.value.next_step == "pip install transformers"
