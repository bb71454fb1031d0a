from __future__ import annotations

import json
from typing import Any

import pytest

from bntool.core.errors import PlanError
from bntool.core.plan import SCHEMA_VERSION, Plan
from bntool.core.reasons import Reason
from bntool.core.sites import Edit, FoldSite, InsertSite, Skip

INSERT = Plan(
    action="insert",
    sites=(InsertSite("conv1", "act", "act.0", 8, "wrap", 2, "relu", "act"),),
    skips=(Skip("head", Reason.NO_ACTIVATION, "its output is returned by the model"),),
    model_class="app.Net",
    signature={"conv1.weight": (8, 3, 3, 3), "scale": ()},
    options={"activations": ["relu"], "eps": 1e-5},
    key_map={"2.weight": "3.weight"},
    notes=("conv1: form sequential changed the model; the next form was tried",),
)

_MAP = ("slice", ("multiply_shift", ("bn", "bn1"), ("number", (1.5, -2.0), (1, 2, 1, 1))), 1, 0, None)

FOLD = Plan(
    action="fold",
    sites=(
        FoldSite(
            "bn1",
            ("conv1", "conv2"),
            ("concat", "conv"),
            (
                Edit("scale_output", "conv1", _MAP, "conv1.weight", "conv1.bias", "conv", 2),
                Edit("remove", "bn1"),
            ),
        ),
        FoldSite("bn2", (), (), (), level="graph"),
    ),
    skips=(Skip("bn3", Reason.NONLINEAR),),
)


@pytest.mark.parametrize("plan", [INSERT, FOLD], ids=["insert", "fold"])
def test_a_plan_goes_to_json_and_back(plan: Plan) -> None:
    text = plan.to_json()
    assert Plan.from_json(text) == plan
    assert Plan.from_json(text).to_json() == text
    assert json.loads(text)["schema_version"] == SCHEMA_VERSION


def test_the_documents_keys_are_the_ones_other_programs_read() -> None:
    inserted = INSERT.to_dict()
    assert {"conv", "activation", "bn", "channels", "form"} <= inserted["sites"][0].keys()
    assert inserted["skips"] == [
        {"name": "head", "reason": "no-activation", "detail": "its output is returned by the model"}
    ]
    folded = FOLD.to_dict()
    assert {"bn", "into", "laws"} <= folded["sites"][0].keys()
    assert folded["skips"] == [{"bn": "bn3", "reason": "nonlinear", "detail": ""}]
    assert folded["sites"][0]["edits"][1] == {"kind": "remove", "layer": "bn1", "groups": 1}


def test_a_plan_without_sites_is_false() -> None:
    assert INSERT
    assert not Plan("insert", (), INSERT.skips)
    assert list(INSERT.insert_sites) == list(INSERT.sites)
    assert list(INSERT.fold_sites) == []
    assert list(FOLD.insert_sites) == []


def _broken(**changes: Any) -> dict[str, Any]:
    return {**INSERT.to_dict(), **changes}


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({}, "not a bntool plan"),
        ({"schema_version": "1"}, "not a bntool plan"),
        (_broken(schema_version=SCHEMA_VERSION + 1), "schema version 2"),
        (_broken(sites=[{"conv": "conv1"}]), "damaged"),
        (_broken(sites=None), "damaged"),
        (_broken(skips=[{"name": "a", "reason": "no-such-reason"}]), "no-such-reason"),
        ({k: v for k, v in _broken().items() if k != "action"}, "action"),
        (_broken(signature="weight"), "damaged"),
        (_broken(options=[1]), "damaged"),
        (_broken(key_map=5), "damaged"),
    ],
)
def test_a_document_that_is_no_plan_is_refused(document: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        Plan.from_dict(document)


def test_a_newer_plan_says_to_upgrade_and_no_json_says_so() -> None:
    with pytest.raises(PlanError) as caught:
        Plan.from_dict(_broken(schema_version=99))
    assert "--upgrade" in caught.value.next_step
    with pytest.raises(PlanError, match="not JSON"):
        Plan.from_json("{")


def test_the_model_a_plan_was_made_for_is_accepted() -> None:
    INSERT.require_signature({"scale": (), "conv1.weight": (8, 3, 3, 3)}, "app.Net")


@pytest.mark.parametrize(
    ("signature", "words"),
    [
        ({"scale": ()}, "no tensor 'conv1.weight'"),
        ({"conv1.weight": (8, 3, 5, 5), "scale": ()}, r"\[8, 3, 5, 5\], the plan expects \[8, 3, 3, 3\]"),
        ({"conv1.weight": (8, 3, 3, 3), "scale": (), "extra": (1,)}, "'extra'"),
    ],
)
def test_another_model_is_refused_with_the_first_difference(
    signature: dict[str, tuple[int, ...]], words: str
) -> None:
    with pytest.raises(PlanError, match=words) as caught:
        INSERT.require_signature(signature, "app.Other")
    assert "app.Net" in caught.value.what
    assert caught.value.where == "app.Other"
