"""The page as text: what is told, what is escaped, how large it is."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from typing import Any

import pytest

from bntool.files.references import build
from bntool.report import charts, trees
from bntool.report.chapters import chapters_of
from bntool.report.markdown import markdown
from bntool.report.page import html_page
from bntool.report.reading import Document, as_document
from tests.report import documents

MEBIBYTE = 1 << 20


def document(data: dict[str, Any]) -> Document:
    return as_document(data, "x.json")


def embedded(page: str) -> Any:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page)[1])


def body(page: str) -> str:
    """The page without the charts' library, which is not ours."""
    head, _, rest = page.partition('<script type="application/json"')
    return head + rest.partition("</script>")[0]


def test_a_fold_tells_every_verdict_with_its_reason() -> None:
    page = html_page([document(documents.fold())])
    assert "folded into block.conv through relu" in page
    assert "a sigmoid is in the way" in page
    for part in ("model", "parameters", "norms", "checks", "latency", "notes"):
        assert f'data-part="{part}"' in page
    assert "after is 2.00x faster" in page


def test_the_tree_follows_the_data() -> None:
    (chapter,) = chapters_of([document(documents.fold())])
    before, after = chapter.trees
    assert [child.label for child in before.root.children] == ["stem", "block"]
    block = before.root.children[1]
    assert block.kind == "Block"
    assert [(child.label, child.kind) for child in block.children] == [
        ("conv", "Conv2d"),
        ("bn1", "BatchNorm2d"),
        ("bn2", "BatchNorm2d"),
        ("add", ""),
    ]
    assert block.tones == [("folded", 1), ("kept", 1)]
    assert block.parameters == 72 + 16 + 16
    assert block.children[-1].reads == ((3, "block.bn2"), (0, "stem"))  # the skip is told
    assert block.children[0].reads == ()  # it reads the layer above
    assert [leaf.name for leaf in after.root.leaves] == ["stem", "block.conv", "block.bn2", "block"]
    assert after.root.tones == [("kept", 1), ("holds", 1)]


def test_a_module_that_runs_again_is_drawn_again() -> None:
    data = documents.fold()
    data["model"]["before"]["layers"].append(documents.layer("stem2", "ReLU", [4]))
    data["model"]["before"]["layers"].append(documents.layer("block.conv", "Conv2d", [5], 72))
    (chapter,) = chapters_of([document(data)])
    assert [child.label for child in chapter.trees[0].root.children] == ["stem", "block", "stem2", "block"]


def test_an_insertion_marks_the_newcomer_and_counts_it_where_it_is() -> None:
    (chapter,) = chapters_of([document(documents.insert())])
    before, after = chapter.trees
    assert [leaf.mark.word if leaf.mark else "" for leaf in after.root.leaves] == ["", "inserted", "", ""]
    assert [leaf.mark.word if leaf.mark else "" for leaf in before.root.leaves] == ["", "", "not cut"]
    # layer 2 became 3: no change of either
    assert chapter.charts["layers"].spec["data"]["values"] == [{"what": "1", "change": 16}]


def test_the_changes_are_those_of_the_document() -> None:
    (chapter,) = chapters_of([document(documents.fold())])
    assert chapter.charts["delta"].spec["data"]["values"] == [{"what": "trainable", "change": -16}]
    assert chapter.tiles == (
        ("1", "BatchNorms folded", "folded"),
        ("1", "BatchNorms kept", "kept"),
        ("-16", "parameters", ""),
        ("±0", "buffers", ""),
        ("2 of 2", "checks passed", "passed"),
    )


def test_an_error_of_zero_has_a_place_on_a_logarithmic_axis() -> None:
    (chapter,) = chapters_of([document(documents.fold())])
    values = chapter.charts["checks"].spec["data"]["values"]
    assert min(row["value"] for row in values) > 0
    assert {"check": "2 runtime", "what": "error", "value": 1e-18, "exact": "0"} in values


def test_names_are_shown_and_never_run() -> None:
    data = [document(documents.fold(documents.EVIL)), document(documents.compare(documents.EVIL))]
    page = html_page(data)
    ours = body(page)
    assert "<img" not in ours
    assert "&lt;img src=x" in ours
    assert "<script" not in ours
    assert documents.EVIL in json.dumps(embedded(page)).replace('\\"', '"')


def test_only_our_own_scripts_may_run_and_nothing_may_be_loaded() -> None:
    page = html_page([document(documents.fold())])
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)[1].replace(
        "&#39;", "'"
    )
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-")
    allowed = set(re.findall(r"'sha256-([^']+)'", policy))
    scripts = re.findall(r"<script>(.*?)</script>", page, flags=re.DOTALL)
    hashes = {base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts}
    assert hashes == allowed
    assert len(allowed) == 2
    assert not re.findall(r"""(?:src|href)=["']?(?!#)[^"'\s>]""", body(page))


def test_a_document_of_nothing_says_so() -> None:
    page = html_page([document({"schema_version": 1, "checks": []})])
    assert "This document holds no figure that a report could show." in page
    assert "There is nothing to report." in html_page([])


def test_an_error_is_told_with_what_to_do_next() -> None:
    error = {"what": "it broke <here>", "where": "layer 3", "next": "bntool doctor"}
    page = html_page([document({**documents.fold(), "status": "check-failed", "error": error})])
    assert "it broke &lt;here&gt;" in page
    assert "bntool doctor" in page


def test_a_comparison_without_a_look_inside_and_one_in_which_an_arm_never_ended() -> None:
    data = documents.compare(steps=0)
    assert "Nothing was watched" in html_page([document(data)])
    data = documents.compare()
    data["arms"]["plain"] |= {"best_rate": None}
    data["arms"]["plain"]["rates"][0] |= {"test_accuracy": None}
    (chapter,) = chapters_of([document(data)])
    assert {row["network"] for row in chapter.charts["loss"].spec["data"]["values"]} == {"with BatchNorm"}
    assert "–" in html_page([document(data)])


def test_a_training_watched_at_every_step_is_thinned_out_from_its_first_to_its_last_step() -> None:
    (chapter,) = chapters_of([document(documents.compare(steps=5000))])
    steps = sorted({row["step"] for row in chapter.rows_watched})
    assert (len(steps), steps[0], steps[-1]) == (120, 0, 49_990)


def test_five_hundred_layers_stay_small_and_are_drawn_at_once() -> None:
    start = time.perf_counter()
    page = html_page([document(documents.large())])
    # the library's bundle takes most of it; ten times what it takes on an idle core
    assert time.perf_counter() - start < 20
    assert len(page.encode()) < 5 * MEBIBYTE


def test_the_same_documents_make_the_same_page() -> None:
    data = [document(documents.fold()), document(documents.compare())]
    assert html_page(data) == html_page(data)


@pytest.mark.parametrize("make", [documents.fold, documents.compare])
def test_markdown_means_nothing_but_what_we_mean(make: Any) -> None:
    text = markdown([document(make(documents.EVIL))])
    assert "<img" not in text
    assert "<script" not in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    columns = [len(re.findall(r"(?<!\\)\|", line)) for line in tables]
    assert len(tables) > 8
    assert set(columns) <= {4, 5, 6, 7}


def test_markdown_for_a_pull_request() -> None:
    text = markdown([document(documents.fold())])
    assert text.startswith("## BatchNorm folded: net.pt (ok)\n")
    assert "- **1** BatchNorms folded" in text
    assert "| trainable | 176 | 160 | -16 |" in text
    assert "| block.bn2 | kept | a sigmoid is in the way |" in text
    assert "| fold | passed | torch, cpu | 2.00e-07 | 1.00e-07 | 1.00e-06 |" in text


def side(**parameters: int) -> dict[str, Any]:
    rows = [documents.layer(name, "Conv2d", [], number) for name, number in parameters.items()]
    return {"class": "Net", "layers": rows, "modules": {}, "left_out": 0}


def test_the_changes_of_many_layers_sum_to_that_of_the_whole() -> None:
    before = side(**{f"l{i}": 10 + i for i in range(106)})
    after = side(**{f"l{i}": 0 for i in range(106)})
    spec = charts.delta_by_layer(before, after, {})
    assert spec is not None
    values = spec["data"]["values"]
    assert values[-1]["what"] == "and 76 more"
    assert sum(row["change"] for row in values) == -sum(10 + i for i in range(106))


def test_a_layer_that_runs_twice_is_one_layer() -> None:
    data = side(conv=8)
    data["layers"] += [{**documents.layer("conv", "Conv2d", [0]), "parameters": 0}]
    data["layers"] += [{**documents.layer("", "add", [1]), "op": True}]
    assert trees.grown("model", data, {}).layers == 1
    tree = trees.grown("model", {**data, "count": 3}, {})  # two more, which do not run
    assert (tree.layers, tree.drawn) == (3, 1)


def test_random_weights_are_said_before_any_figure() -> None:
    notes = {"The weights are random": build("torchvision:mobilenet_v3_small").notes}
    notes["No weights were loaded"] = build("tests.cli.nets:plain").notes
    for told, note in notes.items():
        document = as_document({**documents.fold(), "notes": list(note)}, "x.json")
        page = html_page([document])
        assert page.index(told) < page.index('class="tiles"')
        assert markdown([document]).index(told) < markdown([document]).index("BatchNorms folded")
    trained = as_document({**documents.compare(), "notes": list(note)}, "x.json")
    assert "anything of a trained model" not in html_page([trained])
    assert "The weights are random" not in html_page([as_document(documents.fold(), "x.json")])
