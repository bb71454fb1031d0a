from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bntool.core.errors import UsageError
from bntool.core.explanations import EXPLANATIONS, explain
from bntool.core.options import FoldOptions
from bntool.core.reasons import Reason
from bntool.folding import plan_fold
from bntool.inserting import InsertOptions
from bntool.observe.inference import observe_inferred
from bntool.pipeline.surgeries import fold
from bntool.subjects.base import Checking
from bntool.subjects.insertion import insert_observed
from bntool.subjects.module import ModuleSubject
from tools.docs.make_reasons import document

EXCLUDING = {Reason.EXCLUDED: ("*",)}

NOT_TRIGGERED = {
    Reason.QUANTIZED: "the cast behind an integer layer stops the way before the layer is reached",
    Reason.SHIFT_BLOCKED: "a more exact code is given wherever the op in the way is known",
}


def _trained(model: nn.Module) -> nn.Module:
    """Statistics as training leaves them, where the example has not set its own."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        mean, variance = getattr(module, "running_mean", None), getattr(module, "running_var", None)
        if mean is not None and bool((mean == 0).all()) and bool((variance == 1).all()):
            mean.copy_(torch.randn(mean.shape, generator=generator))
            variance.copy_(torch.rand(mean.shape, generator=generator) + 0.5)
    return model.eval()


def _example(reason: Reason) -> nn.Module:
    names: dict[str, Any] = {"torch": torch, "nn": nn, "F": F, "__name__": "example"}
    torch.manual_seed(0)
    with torch.no_grad(), warnings.catch_warnings():
        if reason is Reason.SCRIPTED:
            warnings.simplefilter("ignore")  # TorchScript is deprecated
        exec(compile(explain(reason).example, f"<{reason}>", "exec"), names)
        return _trained(names["model"])


def _reasons_given(model: nn.Module, exclude: tuple[str, ...]) -> set[Reason]:
    seen = observe_inferred(model, small=True)
    inserted, _, _ = insert_observed(model, seen, InsertOptions(exclude=exclude))
    folded = plan_fold(seen.graph, exclude=exclude)
    given = {skip.reason for skip in (*inserted.skips, *folded.skips)}
    if folded.sites:
        subject = ModuleSubject(model, observed=lambda: seen)
        proved, _ = fold(subject, FoldOptions(exclude=exclude), subject.proof(Checking()))
        given |= {skip.reason for skip in proved.plan.skips}
    return given


def test_every_reason_is_explained_in_order() -> None:
    assert list(EXPLANATIONS) == list(Reason)
    for reason, explanation in EXPLANATIONS.items():
        assert explanation.code == reason.value
        for text in (explanation.title, explanation.paragraph, explanation.remedy):
            assert text
            assert "  " not in text
        assert explanation.paragraph.endswith(".")
        assert explanation.remedy.endswith(".")
        assert not explanation.title.endswith(".")
        assert len(explanation.title) <= 70, "the list shows one line each"
        assert len(explanation.example.splitlines()) <= 10
        assert max(len(line) for line in explanation.example.splitlines()) <= 100


@pytest.mark.parametrize("reason", [r for r in Reason if r not in NOT_TRIGGERED])
def test_the_example_gives_its_reason(reason: Reason) -> None:
    assert reason in _reasons_given(_example(reason), EXCLUDING.get(reason, ()))


@pytest.mark.parametrize("reason", NOT_TRIGGERED)
def test_an_example_that_gives_another_reason_still_runs(reason: Reason) -> None:
    assert reason not in _reasons_given(_example(reason), ())


def test_a_code_is_found_however_it_is_written() -> None:
    assert explain("nonlinear") is explain(Reason.NONLINEAR) is explain(" NON_LINEAR ".replace("N_L", "NL"))
    assert explain("SHIFT_AT_PADDING").code == "shift-at-padding"


@pytest.mark.parametrize(
    ("code", "words"),
    [("non-linear", "nonlinear"), ("padding", "shift-at-padding"), ("qqq", "lists every code")],
)
def test_an_unknown_code_suggests_the_closest(code: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        explain(code)
    assert code in caught.value.what
    assert words in caught.value.next_step


def test_an_explanation_prints_itself_and_goes_to_json() -> None:
    found = explain("negative-scale")
    text = str(found)
    assert text.startswith("negative-scale: a channel has γ < 0")
    assert "\n    model = nn.Sequential(" in text
    assert "What to do: " in text
    assert json.loads(json.dumps(found.to_dict()))["remedy"] == found.remedy


def test_the_page_of_reasons_is_up_to_date() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "reasons.md"
    assert page.read_text(encoding="utf-8") == document(), "run: python tools/docs/make_reasons.py"
