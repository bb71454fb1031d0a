"""Weights folded in their file, by a saved plan, without the model: the same bits as with it."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import bntool
from bntool.cli import run
from bntool.core.documents import DOCUMENTS
from bntool.core.errors import BntoolError, DamagedPlan, LoadError, PlanError, StateError
from bntool.core.plan import Plan
from bntool.files.safetensors_files import read_index
from bntool.files.stored import open_stored
from bntool.surgery.fold_stored import fold_stored
from tools.measures import streaming


class Net(nn.Module):
    """With and without bias, grouped, transposed, linear, γ below zero, and no γ at all."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3, groups=4), nn.BatchNorm2d(8, eps=1e-3, affine=False), nn.ReLU(),
            nn.ConvTranspose2d(8, 6, 2, groups=2, bias=False), nn.BatchNorm2d(6), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Sequential(nn.Linear(6 * 81, 4, bias=False), nn.BatchNorm1d(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def trained(seed: int) -> Net:
    torch.manual_seed(seed)
    net = Net().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.1, 2)
            if module.affine:
                nn.init.uniform_(module.weight, -1.5, 1.5)
                nn.init.uniform_(module.bias, -1, 1)
    return net


X = torch.zeros(1, 3, 12, 12)


@pytest.fixture(scope="module")
def plan() -> Plan:
    made = bntool.plan_fold(trained(0), X)
    assert len(made.sites) == 4 and not made.skips
    return Plan.from_json(made.to_json())


def _save_zip(net: nn.Module, path: Path) -> Path:
    torch.save(net.state_dict(), path.with_suffix(".pt"))
    return path.with_suffix(".pt")


def _save_one(net: nn.Module, path: Path) -> Path:
    save_file(net.state_dict(), path.with_suffix(".safetensors"), {"format": "pt", "by": "me"})
    return path.with_suffix(".safetensors")


def _save_shards(net: nn.Module, path: Path) -> Path:
    """Weights in one file, everything else in another: a layer's tensors lie apart."""
    places = {}
    for part in ("weight", ""):
        name = f"{path.name}-{part or 'rest'}.safetensors"
        chosen = {n: t for n, t in net.state_dict().items() if n.endswith("weight") == bool(part)}
        save_file(chosen, path.with_name(name), {"format": "pt"})
        places |= dict.fromkeys(chosen, name)
    index = path.with_name(path.name + ".safetensors.index.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


SAVES: dict[str, Callable[[nn.Module, Path], Path]] = {
    "zip": _save_zip,
    "one": _save_one,
    "shards": _save_shards,
}


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".json":
        return {name: header.read(name) for name, header in read_index(path).headers()}
    return load_file(path)


@pytest.mark.parametrize("how", SAVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_same_bits_as_with_the_model(tmp_path: Path, plan: Plan, how: str, dtype: torch.dtype) -> None:
    net = trained(1).to(dtype)  # another checkpoint than the plan was made from
    stored = open_stored(SAVES[how](net, tmp_path / "net"))
    output = tmp_path / ("out.safetensors.index.json" if how == "shards" else "out.safetensors")
    fold_stored(stored, plan).write(output)
    expected = bntool.apply(copy.deepcopy(net), plan, check="none").model.state_dict()
    found = _read(output)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_the_result_computes_what_the_model_did(tmp_path: Path, plan: Plan) -> None:
    net = trained(2).double()
    fold_stored(open_stored(_save_one(net, tmp_path / "net")), plan).write(tmp_path / "out.safetensors")
    folded = bntool.apply(copy.deepcopy(net), plan, check="none").model
    folded.load_state_dict(load_file(tmp_path / "out.safetensors"))
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    # Both sum a few hundred products in float64.
    torch.testing.assert_close(folded(x), net(x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("how", SAVES)
def test_a_plan_is_applied_to_weights_from_python_too(tmp_path: Path, plan: Plan, how: str) -> None:
    net = trained(2)
    result = bntool.apply(SAVES[how](net, tmp_path / "net"), plan)
    expected = bntool.apply(net, plan, check="none")
    assert (result.kind, result.status, result.checks) == ("weights", "ok", ())
    assert result.parameters["delta"] == expected.parameters["delta"]
    assert result.model.keys() == expected.model.state_dict().keys()
    for name, tensor in expected.model.state_dict().items():
        assert torch.equal(result.model[name], tensor), name


def test_weights_without_their_model_are_asked_for_it_where_it_takes_one(tmp_path: Path) -> None:
    path = _save_one(trained(1), tmp_path / "net")
    for function in (bntool.fold, bntool.insert, bntool.plan_fold, bntool.plan_insert):
        with pytest.raises(LoadError, match="holds only weights"):
            function(path)
    with pytest.raises(PlanError, match="the plan of an insert"):
        bntool.apply(path, bntool.plan_insert(trained(1), X))


def test_metadata_stays_and_only_what_the_layer_reads_is_copied(tmp_path: Path, plan: Plan) -> None:
    path = _save_one(trained(1), tmp_path / "net")
    fold_stored(open_stored(path), plan).write(tmp_path / "out.safetensors")
    assert open_stored(tmp_path / "out.safetensors").metadata == {"format": "pt", "by": "me"}


def _slice_of_more(net: nn.Module, path: Path) -> Path:
    """A state_dict whose weight is a transposed view into a larger storage."""
    state = net.state_dict()
    weight = state["body.0.weight"]
    larger = torch.cat([torch.zeros(5), weight.permute(3, 2, 1, 0).reshape(-1), torch.zeros(7)])
    state["body.0.weight"] = larger[5:-7].reshape(3, 3, 3, 8).permute(3, 2, 1, 0)
    torch.save(state, path)
    return path


def test_a_view_into_a_larger_storage_is_read_as_it_is(tmp_path: Path, plan: Plan) -> None:
    net = trained(1)
    stored = open_stored(_slice_of_more(net, tmp_path / "view.pt"))
    assert torch.equal(stored.read("body.0.weight"), net.body[0].weight)


def _other(change: Callable[[nn.Module], object]) -> nn.Module:
    net = trained(1)
    with torch.no_grad():
        change(net)
    return net


def _beyond_half(net: nn.Module) -> None:
    net.half().body[1].weight.fill_(6e4)
    net.body[1].running_var.fill_(1e-3)


@pytest.mark.parametrize(
    ("net", "error", "says"),
    [
        (nn.Linear(2, 2), PlanError, "knows no tensor"),
        (nn.Sequential(nn.Linear(2, 2)), PlanError, "knows no tensor"),
        (_other(lambda n: setattr(n.head, "0", nn.Linear(5, 4, bias=False))), PlanError, "the plan expects"),
        (_other(lambda n: n.body[1].running_var.fill_(-1)), StateError, "negative"),
        (_other(lambda n: n.body[4].running_mean.fill_(torch.nan)), StateError, "not finite"),
        (_other(_beyond_half), StateError, r"not finite in torch\.float16"),
    ],
)
def test_weights_that_the_plan_does_not_fit(
    tmp_path: Path, plan: Plan, net: nn.Module, error: type[BntoolError], says: str
) -> None:
    stored = open_stored(_save_one(net, tmp_path / "net"))
    with pytest.raises(error, match=says):
        fold_stored(stored, plan).write(tmp_path / "out.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["net.safetensors"]


def test_a_fold_that_needs_the_model_is_refused(tmp_path: Path) -> None:
    through = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.MaxPool2d(2), nn.BatchNorm2d(4)).eval()
    made = bntool.plan_fold(through, X)
    assert made.sites
    stored = open_stored(_save_one(through, tmp_path / "net"))
    with pytest.raises(PlanError, match="needs the model"):
        fold_stored(stored, made)


def test_a_plan_without_eps_and_one_without_the_bias_that_is_needed(tmp_path: Path, plan: Plan) -> None:
    stored = open_stored(_save_one(trained(1), tmp_path / "net"))
    with pytest.raises(PlanError, match="does not tell"):
        fold_stored(stored, dataclasses.replace(plan, eps={}))
    fresh = bntool.plan_fold(Net().eval(), X)  # statistics that shift nothing
    with pytest.raises(PlanError, match="makes no bias"):
        fold_stored(stored, fresh)


@pytest.mark.parametrize(
    ("damage", "place"),
    [
        (lambda edits: edits[0].update(map=["bn", "body.4"]), "sites[0].edits[0].map"),
        (lambda edits: edits[0].update(map=["bn", "nope"]), "sites[0].edits[0].map"),
        (lambda edits: edits[0].update(map=["slice", edits[0]["map"], 0, 0, 7, 1]), "sites[0].edits[0].map"),
        (lambda edits: edits[0].update(layout="matmul"), "sites[0].edits[0].layout"),
        (lambda edits: edits[0].update(groups=3), "sites[0].edits[0].groups"),
        (lambda edits: edits[0].update(bias="body.3.weight"), "sites[0].edits[0].bias"),
        (lambda edits: edits[1].update(layer="body.4"), "sites[0].edits[1].layer"),
        (lambda edits: edits.append(edits[0]), "sites[0].edits[2]"),
    ],
)
def test_an_edit_that_is_not_plainly_that_of_its_batch_norm_is_told_with_its_place(
    tmp_path: Path, plan: Plan, damage: Callable[[list[dict[str, object]]], object], place: str
) -> None:
    data = json.loads(plan.to_json())
    damage(data["sites"][0]["edits"])
    with pytest.raises(DamagedPlan) as caught:
        fold_stored(open_stored(_save_one(trained(1), tmp_path / "net")), Plan.from_dict(data))
    assert caught.value.where == place
    assert caught.value.exit_code == 3


def test_a_bias_that_the_plan_leaves_out_is_missed(tmp_path: Path, plan: Plan) -> None:
    data = json.loads(plan.to_json())
    del data["sites"][1]["edits"][0]["bias"]
    with pytest.raises(DamagedPlan, match=r"leaves out 'body\.3\.bias'"):
        fold_stored(open_stored(_save_one(trained(1), tmp_path / "net")), Plan.from_dict(data))


def test_tied_tensors_and_whole_modules_are_refused(tmp_path: Path, plan: Plan) -> None:
    net = trained(1)
    state = net.state_dict()
    torch.save({**state, "second": state["body.0.weight"]}, tmp_path / "tied.pt")
    with pytest.raises(LoadError, match="two names"):
        open_stored(tmp_path / "tied.pt")
    torch.save(nn.Linear(2, 2), tmp_path / "whole.pt")
    with pytest.raises(LoadError, match="more than a plain state_dict"):
        open_stored(tmp_path / "whole.pt")
    save_file({**state, "second": state["body.0.weight"].clone()}, tmp_path / "twice.safetensors")
    with pytest.raises(PlanError, match="knows no tensor 'second'"):
        fold_stored(open_stored(tmp_path / "twice.safetensors"), plan)


@pytest.mark.parametrize("how", SAVES)
def test_the_command_writes_beside_and_says_so(
    tmp_path: Path, plan: Plan, how: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = SAVES[how](trained(1), tmp_path / "net")
    Path("plan.json").write_text(plan.to_json())
    assert run(["fold", path.name, "--plan", "plan.json", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    written = Path(document["output"])
    assert written.name == (
        "net_folded.safetensors.index.json" if how == "shards" else "net_folded.safetensors"
    )
    assert len(document["sites"]) == 4
    assert (document["kind"], document["bn_folded"]) == ("weights", 4)
    assert document.keys() == msgspec.structs.asdict(DOCUMENTS["fold"]()).keys()
    # γ and β of two, γ and β less a bias made, and none: 2·8 - 8 + 0 + 2·6 - 6 + 2·4 - 4
    assert document["parameters"]["delta"]["trainable"] == -18
    assert document["parameters"]["delta"]["conv_bias"] == 18
    sidecar = json.loads(Path(f"{written}.bntool.json").read_text())
    assert sidecar["output"]["name"] == written.name and sidecar["plan"]["action"] == "fold"
    assert run(["fold", path.name, "--plan", "plan.json"]) == 2  # it is there already
    before = path.read_bytes()
    assert run(["fold", path.name, "--plan", "plan.json", "--force"]) == 0
    assert path.read_bytes() == before
    # A side file is a plan too.
    assert run(["fold", path.name, "--plan", f"{written}.bntool.json", "--dry-run"]) == 0
    assert run(["fold", path.name, "--plan", "plan.json", "--export", "onnx"]) == 2
    assert run(["fold", "gone.safetensors", "--plan", "plan.json"]) == 3


def test_the_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    inputs, layers = streaming.shape(0.15, 4)
    index, made = streaming.write(tmp_path, layers, inputs)
    size = sum(path.stat().st_size for path in tmp_path.glob("in-*")) / 2**20
    output = tmp_path / "out.safetensors.index.json"
    figures = streaming.fold_elsewhere(index, made, output)
    # Far below what is promised, so that a file of this size could not be held.
    assert figures["peak_over_import_mib"] <= 4 * 4 + 60 < size / 2
    assert streaming.check(output, layers, inputs) == 0
