from __future__ import annotations

import json
from pathlib import Path

import pytest

from bntool.core.errors import LoadError, UsageError
from bntool.core.plan import Plan
from bntool.core.reasons import Reason
from bntool.core.sites import Skip
from bntool.files.atomic import sha256_of
from bntool.files.sidecar import (
    Origin,
    describes,
    make_document,
    output_name,
    read_sidecar,
    sidecar_path,
    write_sidecar,
)


@pytest.mark.parametrize(
    ("source", "action", "expected"),
    [
        ("vgg16.pt", "insert", "vgg16_bn.pt"), ("vgg16_bn.pt", "fold", "vgg16_bn_folded.pt"),
        ("a/b/net.pth", "insert", "a/b/net_bn.pth"), ("ckpt.pth.tar", "insert", "ckpt_bn.pth.tar"),
        ("w.safetensors", "fold", "w_folded.safetensors"), ("model.v1.2.pt", "insert", "model.v1.2_bn.pt"),
        ("torchvision:vgg16", "insert", "vgg16_bn.pt"),
        ("timm:resnet50.a1_in1k", "fold", "resnet50.a1_in1k_folded.pt"),
        ("src/net.py:Net", "insert", "Net_bn.pt"), ("pkg.mod:make", "insert", "make_bn.pt"),
        ("vgg16_bn_folded.pt", "export", "vgg16_bn_folded.onnx"), ("noending", "insert", "noending_bn.pt"),
        ("m.pt", "calibrate", "m_calibrated.pt"),
    ],
)  # fmt: skip
def test_output_names(source: str, action: str, expected: str) -> None:
    assert output_name(source, action) == Path(expected)  # type: ignore[arg-type]


def _document(output: Path) -> dict[str, object]:
    plan = Plan("insert", (), (Skip("0", Reason.NO_ACTIVATION),), key_map={"1.weight": "2.weight"})
    return make_document(
        "insert", Origin(str(output.parent / "in.pt"), "ab", "torchvision:vgg11"), output,
        plan=plan.to_dict(), parameters={"before": 1}, checks=[{"passed": True}],
    )  # fmt: skip


def test_round_trip_the_same_in_every_folder(tmp_path: Path) -> None:
    texts = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        output = folder / "m_bn.pt"
        output.write_bytes(b"model")
        document = _document(output)
        assert write_sidecar(output, document) == folder / "m_bn.pt.bntool.json"
        assert read_sidecar(output) == json.loads(json.dumps(document))
        texts.append(sidecar_path(output).read_bytes())
        with pytest.raises(UsageError):
            write_sidecar(output, document)
        write_sidecar(output, document, force=True)
    assert texts[0] == texts[1]
    read = read_sidecar(tmp_path / "a" / "m_bn.pt")
    assert read is not None
    assert read["schema_version"] == 1
    assert read["source"] == {"reference": "in.pt", "sha256": "ab", "untrained": ""}
    assert read["output"] == {"name": "m_bn.pt", "sha256": sha256_of(tmp_path / "a" / "m_bn.pt")}
    assert read["key_map"] == {"1.weight": "2.weight"}
    assert read["reload"]["arch"] == "torchvision:vgg11"
    assert read["versions"]["torch"]
    assert Plan.from_dict(read["plan"]).skips[0].reason is Reason.NO_ACTIVATION


def test_it_is_known_when_the_output_changed(tmp_path: Path) -> None:
    output = tmp_path / "m.pt"
    output.write_bytes(b"model")
    document = _document(output)
    assert describes(document, output)
    output.write_bytes(b"other")
    assert not describes(document, output)
    assert not describes({"output": 3}, output)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("", ""), ("[]", ""), ("{}", ""), ('{"schema_version": "1"}', ""), ("\x00", ""), ("[" * 100_000, ""),
        ('{"schema_version": 1, "schema_version": 1}', ""), ('{"schema_version": true}', ""),
        ('{"schema_version": 1, "output": 3}', "output"),
        ('{"schema_version": 1, "output": {"sha256": ["0"]}}', "output.sha256"),
        ('{"schema_version": 1, "reload": {"arch": 3}}', "reload.arch"),
        ('{"schema_version": 1, "plan": []}', "plan"),
        ('{"schema_version": 1, "earlier_plans": {}}', "earlier_plans"),
        ('{"schema_version": 1, "earlier_plans": [{}, 1]}', "earlier_plans[1]"),
    ],
)  # fmt: skip
def test_a_damaged_one_is_a_load_error_with_its_place(text: str, place: str, tmp_path: Path) -> None:
    path = sidecar_path(tmp_path / "m.pt")
    path.write_text(text)
    with pytest.raises(LoadError, match="damaged") as caught:
        read_sidecar(tmp_path / "m.pt")
    assert caught.value.where == (f"{path}, {place}" if place else str(path))
    assert str(path) in caught.value.next_step


def test_a_newer_one_asks_for_an_upgrade_and_none_is_none(tmp_path: Path) -> None:
    assert read_sidecar(tmp_path / "m.pt") is None
    sidecar_path(tmp_path / "m.pt").write_text('{"schema_version": 99}')
    with pytest.raises(LoadError, match="schema version 99"):
        read_sidecar(tmp_path / "m.pt")
