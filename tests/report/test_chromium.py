"""The page in a real headless Chromium: nothing loaded, nothing run, everything in its place and at hand."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bntool.report import drawing
from bntool.report.page import html_page
from bntool.report.reading import as_document
from tests.report import documents

CHROMIUM = os.environ.get("BNTOOL_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
needs_playwright = pytest.mark.skipif(
    importlib.util.find_spec("playwright") is None, reason="playwright is not installed"
)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium (apt-get install chromium)"),
    needs_playwright,
    # playwright leaves its own sockets to the collector
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

DESKTOP, PHONE, WIDE = (1280, 900), (360, 740), (1920, 1080)


@dataclasses.dataclass
class Tab:
    """A page that was opened, what it said on its console, and what it asked for."""

    page: Any
    said: list[str]
    asked: list[str]
    seconds: float


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


Opener = Callable[..., Tab]


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Opener]:
    tabs = []

    def open_page(*data: dict[str, Any], size: tuple[int, int] = DESKTOP, theme: str = "light") -> Tab:
        path = tmp_path / "report.html"
        path.write_text(html_page([as_document(d, "x.json") for d in data]), encoding="utf-8")
        width, height = size
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=theme)
        tab = Tab(page, [], [], 0.0)
        page.set_default_timeout(10_000)
        page.on("console", lambda message: tab.said.append(message.text))
        page.on("pageerror", lambda error: tab.said.append(str(error)))
        page.on("request", lambda request: tab.asked.append(request.url))
        start = time.perf_counter()
        page.goto(path.as_uri(), wait_until="load")
        tab.seconds = time.perf_counter() - start
        page.wait_for_selector("html[data-ready=yes]", state="attached", timeout=30_000)
        tabs.append(tab)
        return tab

    yield open_page
    for tab in tabs:
        tab.page.close()


EVERYTHING = (documents.fold(), documents.insert(), documents.compare())


def test_it_opens_with_every_part_and_loads_nothing(opened: Opener) -> None:
    tab = opened(*EVERYTHING)
    parts = tab.page.eval_on_selector_all("[data-part]", "all => all.map(e => e.id)")
    assert parts == [
        *(f"c1-{part}" for part in ("model", "parameters", "norms", "checks", "latency", "notes")),
        *(f"c2-{part}" for part in ("model", "parameters", "norms", "checks")),
        *(f"c3-{part}" for part in ("parameters", "norms", "training")),
    ]
    charts = tab.page.locator(".chart")
    assert charts.count() == 23
    assert tab.page.locator(".chart .vega svg").count() == charts.count()
    assert tab.said == []
    assert [url for url in tab.asked if not url.startswith("file:")] == []
    assert len(tab.asked) == 1


def test_names_are_shown_and_not_run(opened: Opener) -> None:
    tab = opened(documents.fold(documents.EVIL), documents.compare(documents.EVIL))
    page = tab.page
    assert page.title().startswith("BatchNorm report")
    assert page.locator("img").count() == 0
    assert page.locator(".kept .label").first.inner_text().endswith("</script>")
    for details in page.locator(".figures > summary").all():
        details.click()
    page.locator("select[data-norm]").first.select_option(index=1)
    page.locator(
        "#c1-checks .vega .mark-symbol.role-mark path"
    ).last.hover()  # a tooltip is made of the data too
    assert page.locator("img").count() == 0
    assert page.title().startswith("BatchNorm report")
    assert tab.said == []


def test_a_search_finds_and_gives_back(opened: Opener) -> None:
    page = opened(documents.large(90)).page
    page.get_by_role("button", name="Collapse all", exact=True).click()
    assert page.locator(".leaf:visible").count() == 0
    page.get_by_role("searchbox").fill("layer41")
    assert page.locator(".leaf:visible").count() == 2
    assert page.locator("[data-found]").inner_text() == "2 layers found"
    page.get_by_role("searchbox").fill("no such layer")
    assert page.locator("[data-found]").inner_text() == "0 layers found"
    page.get_by_role("searchbox").fill("")
    assert page.locator(".leaf:visible").count() == 0


def test_modules_fold_open_and_shut_on_both_sides_by_the_keyboard(opened: Opener) -> None:
    page = opened(documents.fold()).page
    modules = page.locator("details[data-path=block]")
    assert modules.count() == 2
    assert [m.get_attribute("open") is not None for m in modules.all()] == [True, True]
    modules.first.locator("summary").focus()
    page.keyboard.press("Enter")
    assert [m.get_attribute("open") is not None for m in modules.all()] == [False, False]
    page.keyboard.press("Enter")
    assert [m.get_attribute("open") is not None for m in modules.all()] == [True, True]


def test_a_reason_shows_on_hover_and_on_focus_and_goes_at_escape(opened: Opener) -> None:
    page = opened(documents.fold()).page
    chip = page.locator('[data-side="before"] button.kept')
    tip = page.locator(f"#{chip.get_attribute('aria-describedby')}")
    assert not tip.is_visible()
    chip.hover()
    assert tip.is_visible()
    assert tip.inner_text() == "nonlinear: a sigmoid is in the way"
    page.mouse.move(0, 0)
    assert not tip.is_visible()
    chip.focus()
    assert tip.is_visible()
    page.keyboard.press("Escape")
    assert not tip.is_visible()


def test_a_link_to_a_layer_opens_what_hides_it(opened: Opener) -> None:
    page = opened(documents.fold()).page
    link = page.locator('[data-side="before"] .reads a', has_text="block.bn2")
    link.click()
    page.get_by_role("button", name="Collapse all", exact=True).click()
    page.evaluate("location.hash = '#c1-before-2'")
    page.wait_for_function("document.querySelector('#c1-before-2').checkVisibility()")


def test_the_slider_goes_through_the_training(opened: Opener) -> None:
    page = opened(documents.compare()).page
    slider = page.get_by_role("slider")
    assert slider.get_attribute("aria-valuetext") == "step 0"
    page.locator("#c1-training .figures > summary").nth(2).click()
    slider.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert slider.get_attribute("aria-valuetext") == "step 20"
    assert page.locator("[data-slider-told]").inner_text() == "20"
    steps = page.eval_on_selector_all(
        '[data-chart="c1-distributions"] tbody tr', "rows => rows.map(r => r.cells[0].textContent)"
    )
    assert steps == ["20"] * 4


def test_every_batchnorm_can_be_looked_at(opened: Opener) -> None:
    page = opened(documents.fold()).page
    told = page.locator("[data-norm-told]")
    assert told.inner_text() == "block.bn1: 8 channels, 1 dead"
    page.get_by_role("button", name="Next").click()
    assert told.inner_text() == "block.bn2: 8 channels, 1 dead"
    page.get_by_role("button", name="Next").click()
    assert told.inner_text() == "block.bn2: 8 channels, 1 dead"
    page.get_by_role("button", name="Previous").click()
    assert told.inner_text() == "block.bn1: 8 channels, 1 dead"


def test_the_theme_follows_the_system_and_the_button(opened: Opener) -> None:
    tab = opened(documents.fold(), theme="dark")
    page = tab.page
    ground = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(ground) == "rgb(15, 19, 24)"
    label = page.locator("#c1-checks .vega svg text").first
    dark = label.get_attribute("fill")
    page.get_by_role("button", name="Light theme").click()
    assert page.evaluate(ground) == "rgb(255, 255, 255)"
    page.wait_for_function(
        "dark => document.querySelector('#c1-checks .vega svg text').getAttribute('fill') !== dark", arg=dark
    )
    assert tab.said == []


OVERFLOWING = """() => [...document.querySelectorAll('body *')].filter(e => {
  if (!e.checkVisibility() || e.closest('.scroll, .unseen, .skip, nav')) return false;
  if (e.closest('svg') && e.tagName !== 'text' && e.tagName !== 'svg') return false;
  const box = e.getBoundingClientRect();
  return box.width > 0 && (box.right > innerWidth + 1 || box.left < -1);
}).map(e => e.outerHTML.slice(0, 120))"""


@pytest.mark.parametrize("size", [PHONE, WIDE], ids=["phone", "wide"])
def test_nothing_hangs_over_the_edge(opened: Opener, size: tuple[int, int]) -> None:
    long = "a" * 150 + ".b"
    page = opened(*EVERYTHING, documents.fold(long), size=size).page
    for which in page.get_by_label("both").all():
        which.check()
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    assert page.evaluate(OVERFLOWING) == []


@pytest.mark.skipif(
    importlib.util.find_spec("axe_playwright_python") is None, reason="axe-playwright-python is not installed"
)
@pytest.mark.parametrize(("theme", "size"), [("light", PHONE), ("dark", DESKTOP)], ids=["light", "dark"])
def test_axe_finds_nothing(opened: Opener, theme: str, size: tuple[int, int]) -> None:
    from axe_playwright_python.sync_playwright import Axe

    error = {"what": "it broke", "where": "layer 3", "next": "bntool doctor"}
    failed = {
        **documents.fold(),
        "status": "check-failed",
        "error": error,
        "checks": [documents.check(passed=False)],
    }
    page = opened(failed, documents.insert(), documents.compare(), theme=theme, size=size).page
    page.locator(".figures > summary").first.click()
    found = Axe().run(page).response["violations"]
    assert [(v["id"], [n["html"][:100] for n in v["nodes"][:3]]) for v in found] == []


def test_five_hundred_layers_open_within_two_seconds(opened: Opener) -> None:
    tab = opened(documents.large())
    assert tab.page.locator('[data-side="before"] .leaf').count() == 500
    assert tab.seconds < 2


def test_it_prints_with_every_verdict_and_without_the_buttons(opened: Opener) -> None:
    page = opened(documents.fold()).page
    assert len(page.pdf()) > 10_000
    page.emulate_media(media="print")
    assert not page.get_by_role("searchbox").is_visible()
    assert page.locator(".verdicts table").first.is_visible()


def _inks(pdf: bytes) -> set[str]:
    """The colours, as #rrggbb, that the pages of a PDF fill and stroke with."""
    found = set()
    for stream in re.findall(rb"stream\r?\n(.*?)endstream", pdf, flags=re.DOTALL):
        try:
            drawn = zlib.decompressobj().decompress(stream)
        except zlib.error:
            continue
        for parts in re.findall(rb"([\d.]+) ([\d.]+) ([\d.]+) (?:rg|RG)\b", drawn):
            found.add("#" + "".join(f"{round(255 * float(part)):02x}" for part in parts))
    return found


def test_what_was_drawn_in_the_dark_prints_in_the_light_and_is_dark_again_afterwards(opened: Opener) -> None:
    light, dark = (set(drawing.theme(dark=d)["range"]["category"][:2]) for d in (False, True))
    page = opened(documents.fold(), theme="dark").page
    drawn = page.locator(".vega svg [fill]").evaluate_all("all => all.map(e => e.getAttribute('fill'))")
    assert dark <= set(drawn)
    inks = _inks(page.pdf(print_background=True))
    assert light <= inks
    assert inks & (dark | {"#171c23"}) == set()  # the ground of a chart in the dark is #171c23
    after = page.locator(".vega svg [fill]").evaluate_all("all => all.map(e => e.getAttribute('fill'))")
    assert after == drawn
