from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.cli import nets
from tests.cli.conftest import Shell, contents


def test_the_document(bntool: Shell) -> None:
    nets.save(nets.plain(), "model.pt")
    said = bntool("insert", "model.pt", *nets.INPUT, "--json")
    document = said.document
    assert (said.code, said.err, document["status"]) == (0, "", "ok")
    assert document["output"] == "model_bn.pt"
    assert document["dry_run"] is False
    (site,) = document["sites"]
    assert {k: site[k] for k in ("conv", "activation", "bn", "channels", "form")} == {
        "conv": "0",
        "activation": "1",
        "bn": "1",
        "channels": 4,
        "form": "sequential",
    }
    (skip,) = document["skips"]
    assert (skip["name"], skip["reason"]) == ("2", "no-activation")
    assert skip["detail"]
    assert document["check"]["passed"] is True
    assert document["check"]["batches"] == 3
    assert document["key_map"] == {"2.weight": "3.weight", "2.bias": "3.bias"}


def test_the_delta_is_a_recount_of_the_files(bntool: Shell) -> None:
    nets.save(nets.plain(), "model.pt")
    delta = bntool("insert", "model.pt", *nets.INPUT, "--json").document["parameters"]["delta"]
    before, after = nets.counted("model.pt"), nets.counted("model_bn.pt")
    assert (delta["trainable"], delta["buffers"]) == (after[0] - before[0], after[1] - before[1])
    assert delta["conv_bias"] == 0


def test_the_output_computes_the_same(bntool: Shell) -> None:
    nets.save(nets.plain(), "model.pt")
    assert bntool("insert", "model.pt").code == 0
    images = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        before = nets.plain().eval()(images)
        after = torch.load("model_bn.pt", weights_only=False).eval()(images)
    assert torch.equal(before, after)


def test_a_dry_run_writes_nothing_and_remembers_nothing(bntool: Shell, folder: Path) -> None:
    nets.save(nets.plain(), "model.pt")
    before = contents(folder.parent)
    said = bntool("insert", "model.pt", "--dry-run", "--json")
    assert said.code == 0
    assert (said.document["output"], said.document["dry_run"]) == (None, True)
    assert len(said.document["sites"]) == 1
    assert contents(folder.parent) == before
    assert bntool("summary").code == 2


def test_twice_needs_force_and_gives_the_same_bytes(bntool: Shell, folder: Path) -> None:
    nets.save(nets.plain(), "model.pt")
    assert bntool("insert", "model.pt").code == 0
    before = contents(folder)
    again = bntool("insert", "model.pt")
    assert again.code == 2
    assert "model_bn.pt exists already" in again.err
    assert "--force" in again.err
    assert contents(folder) == before
    assert bntool("insert", "model.pt", "--force").code == 0
    assert contents(folder) == before


def test_twice_in_a_row_finds_every_place_taken(bntool: Shell, folder: Path) -> None:
    nets.save(nets.plain(), "model.pt")
    assert bntool("insert", "model.pt").code == 0
    before = contents(folder)
    said = bntool("insert")
    assert said.code == 4
    assert "already-normalised" in said.out
    assert "each place has a BatchNorm already, which bntool fold takes out" in said.err
    assert contents(folder) == before


def test_a_model_that_is_normalised_already_is_sent_to_fold(refused: Shell) -> None:
    last = nn.Conv2d(4, 4, 3)  # no activation follows: no place either
    nets.save(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), last), "model.pt")
    refused(
        "insert", "model.pt", code=4, says="each place has a BatchNorm already, which bntool fold takes out"
    )


def test_a_model_without_sites_says_why(refused: Shell) -> None:
    nets.save(nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU()), "model.pt")
    said = refused("insert", "model.pt", code=4, says="--activation any")
    assert "not cut: 0 [other-activation]" in said.out

    document = refused("insert", "model.pt", "--json", code=4).document
    assert document["status"] == "nothing-to-do"
    assert [skip["reason"] for skip in document["skips"]] == ["other-activation"]

    nets.save(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), "linear.pt")
    refused("insert", "linear.pt", code=4, says="--linear")


def test_options_reach_the_layers(bntool: Shell) -> None:
    nets.save(nets.plain(), "model.pt")
    words = ["--no-affine", "--eps", "0.001", "--momentum", "0.2", "-o", "out.pt"]
    assert bntool("insert", "model.pt", *words).code == 0
    (layer,) = (
        m for m in torch.load("out.pt", weights_only=False).modules() if isinstance(m, nn.BatchNorm2d)
    )
    assert (layer.affine, layer.eps, layer.momentum) == (False, 0.001, 0.2)


def test_the_plan_in_the_side_file_can_be_replayed(bntool: Shell, refused: Shell) -> None:
    nets.save(nets.plain(), "model.pt")
    nets.save(nets.normalised(), "other.pt")
    assert bntool("insert", "model.pt").code == 0
    side_file = "model_bn.pt.bntool.json"
    assert json.loads(Path(side_file).read_text())["plan"]["action"] == "insert"
    said = bntool("insert", "model.pt", "--plan", side_file, "-o", "again.pt", "--json")
    assert (said.code, said.document["status"]) == (0, "ok")
    assert nets.state_of("again.pt").keys() == nets.state_of("model_bn.pt").keys()
    refused("insert", "other.pt", "--plan", side_file, "-o", "x.pt", code=2, says="another model")
    assert bntool("fold", "other.pt").code == 0
    refused(
        "insert", "other.pt", "--plan", "other_folded.pt.bntool.json", "-o", "x.pt", code=2, says="of a fold"
    )


def test_a_check_that_differs_writes_nothing(refused: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    from bntool.subjects import module

    def corrupted(*args: object, **options: object) -> object:
        check = honest(*args, **options)
        return type(check)(**{**vars(check), "passed": False})

    honest = module.check_unchanged
    nets.save(nets.plain(), "model.pt")
    monkeypatch.setattr(module, "check_unchanged", corrupted)
    refused("insert", "model.pt", code=1, says="changes the output")
    assert [p.name for p in Path().iterdir()] == ["model.pt"]


def test_quiet_shows_totals_alone(bntool: Shell) -> None:
    nets.save(nets.plain(), "model.pt")
    said = bntool("insert", "model.pt", "-q")
    assert said.out.startswith("not cut: 2 ")
    assert "sequential" not in said.out
    assert "note:" not in said.out
    assert "1 BatchNorm layer inserted over 4 channels" in said.out


def test_a_reference_is_written_into_this_folder(bntool: Shell) -> None:
    nets.user_model()
    nets.forget("user_net")
    said = bntool("insert", "user_net.py:Net", *nets.INPUT, "--json")
    assert said.document["output"] == "Net_bn.pt"
    assert Path("Net_bn.pt").is_file()
    assert bntool("summary").code == 0


def test_a_site_list_names_the_layers(bntool: Shell, refused: Shell) -> None:
    nets.save(nets.plain(), "model.pt")
    Path("sites.json").write_text('["0"]')
    Path("sites.toml").write_text('sites = ["0"]')
    for name in ("sites.json", "sites.toml"):
        document = bntool("insert", "model.pt", "--sites", name, *nets.INPUT, "--dry-run", "--json").document
        assert [site["conv"] for site in document["sites"]] == ["0"]
    Path("sites.json").write_text('["00"]')
    refused(
        "insert", "model.pt", "--sites", "sites.json", *nets.INPUT, code=2, says="no layer is called '00'"
    )
    refused("insert", "model.pt", "--sites", "none.json", code=2, says="cannot read a list of sites")
    Path("sites.json").write_text("{}")
    refused("insert", "model.pt", "--sites", "sites.json", *nets.INPUT, code=2, says="no list of layer names")


def test_a_plan_takes_the_inputs_given_and_no_other_choice(
    bntool: Shell, refused: Shell, folder: Path
) -> None:
    (folder / "two.py").write_text(
        "from torch import nn\n\n\n"
        "class Two(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.conv, self.act = nn.Conv2d(3, 4, 3), nn.ReLU()\n\n"
        "    def forward(self, x, y):\n"
        "        return self.act(self.conv(x)) + y\n"
    )
    line = ["insert", "two.py:Two", "--input", "1x3x8x8", "--input", "1x4x6x6"]
    assert bntool(*line, "-o", "two.pt").code == 0
    line += ["--plan", "two.pt.bntool.json", "-o", "again.pt"]
    refused(*line, "--activation", "silu", code=2, says="--plan and --activation do not go together")
    refused(*line, "--no-affine", code=2, says="--plan and --no-affine do not go together")
    assert bntool(*line).code == 0
    assert nets.state_of("again.pt").keys() == nets.state_of("two.pt").keys()
