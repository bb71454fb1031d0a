"""The folder of a comparison: what in it may be replaced, and what is left when a new one is stopped."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bntool.experiment import folder as comparison_folder
from bntool.experiment import training
from tests.cli.conftest import Said, Shell, contents
from tests.experiment.nets import NET_CODE, write_npz

LINE = (*"compare net.py:net --data data.npz --batch-size 24 --lr 0.05 -o out -q --epochs".split(),)
MODELS = ("net_trained.pt", "net_bn_trained.pt")


@pytest.fixture
def compared(bntool: Shell, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a comparison that came to its end."""
    monkeypatch.setattr("bntool.experiment.plots.write_plots", lambda found, folder: [])
    (folder / "net.py").write_text(NET_CODE)
    write_npz(folder)
    assert bntool(*LINE, "1").code == 0
    for name in comparison_folder.FILES:  # the pictures, which take long to be drawn
        if not (folder / "out" / name).exists():
            (folder / "out" / name).write_bytes(b"a picture")
    return folder / "out"


def test_forced_and_stopped_midway_no_former_result_is_left(
    bntool: Shell, compared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (compared / "net_bn_trained.pt").write_bytes(b"trained on by the user")
    (compared / "notes.txt").write_text("mine")
    real = training.write_checkpoint

    def once(*given: object) -> None:
        real(*given)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "write_checkpoint", once)
    assert bntool(*LINE, "2", "--force").code == 130
    assert sorted(contents(compared)) == [
        "net_bn_trained.pt",
        "net_bn_trained.pt.bntool.json",
        "notes.txt",
        "runs/plain-0.05-0.pt",
        "settings.json",
    ]
    assert (compared / "net_bn_trained.pt").read_bytes() == b"trained on by the user"


def test_killed_while_the_former_results_go_the_former_settings_stay(
    bntool: Shell, compared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else what is left of the old results, or checkpoints, would pass for those of the new settings."""
    before = contents(compared)
    removed: list[Path] = []

    def dies(path: Path) -> None:
        if len(removed) == 2:
            raise KeyboardInterrupt
        removed.append(path)
        path.unlink()

    monkeypatch.setattr(comparison_folder, "remove", dies)
    assert bntool(*LINE, "2", "--force").code == 130
    gone = {str(path.relative_to("out")) for path in removed}
    assert len(gone) == 2
    assert contents(compared) == {name: held for name, held in before.items() if name not in gone}


def test_the_shards_of_a_former_result_go_with_it(folder: Path) -> None:
    from safetensors.torch import save_file

    from bntool.files.sidecar import Origin, make_document, write_sidecar

    shards = [f"net_trained-0123456789ab-0000{n}-of-00002.safetensors" for n in (1, 2)]
    index = folder / "net_trained.safetensors.index.json"
    for name in shards:
        save_file({name: torch.zeros(1)}, name)
    places = ", ".join(f'"{name}": "{name}"' for name in shards)
    index.write_text(f'{{"metadata": {{}}, "weight_map": {{{places}}}}}')
    write_sidecar(index, make_document("compare", Origin("net.py"), index))
    save_file({"w": torch.zeros(1)}, "net_trained.safetensors")
    comparison_folder.open_folder(folder / "new", {"epochs": 1}, force=False)
    (folder / "settings.json").write_bytes((folder / "new" / "settings.json").read_bytes())
    comparison_folder.open_folder(folder, {"epochs": 1}, force=True)
    assert sorted(contents(folder)) == ["net_trained.safetensors", "new/settings.json", "settings.json"]


def test_nothing_is_written_through_a_link_in_it(refused: Callable[..., Said], compared: Path) -> None:
    for name in ("settings.json", *MODELS, "compare.json", "curves.png", "runs/plain-0.05-0.pt"):
        place = compared / name
        place.rename("precious")
        place.symlink_to(Path("precious").resolve())
        for force in ((), ("--force",)):
            refused(*LINE, "1", *force, code=2, says=f"out/{name} is a link")
        Path("precious").replace(place)


def test_data_with_a_second_name_in_it_is_not_written_over(
    refused: Callable[..., Said], compared: Path
) -> None:
    (compared / "curves.png").unlink()
    os.link("data.npz", compared / "curves.png")
    for force in ((), ("--force",)):
        refused(*LINE, "1", *force, code=2, says="the output out/curves.png is the input itself")


@pytest.mark.parametrize("name", MODELS)
def test_a_foreign_model_in_it_goes_by_force_alone(
    bntool: Shell, refused: Callable[..., Said], compared: Path, name: str
) -> None:
    """One that the user trained on, under the name that the comparison gave it."""
    (compared / name).write_bytes(b"precious")
    refused(*LINE, "1", code=2, says=f"out/{name} is no file of this comparison")
    assert bntool(*LINE, "1", "--force").code == 0
    torch.load(compared / name, weights_only=False)
    (compared / f"{name}.bntool.json").write_text("mine")
    refused(*LINE, "1", "--force", code=2, says=f"out/{name}.bntool.json is no file of bntool's")


@pytest.mark.usefixtures("compared")
def test_its_report_is_none_of_its_own_files(refused: Callable[..., Said]) -> None:
    for name in ("compare.json", *MODELS):
        refused(*LINE, "1", "--force", "--report", f"out/{name}", code=2, says="is to be written twice")


def test_a_folder_of_other_things_is_told_as_such_before_its_links(
    refused: Callable[..., Said], compared: Path
) -> None:
    (compared / "settings.json").unlink()
    (compared / "python").symlink_to("/usr/bin/env")
    refused(*LINE, "1", code=2, says="out exists, and is no comparison")
