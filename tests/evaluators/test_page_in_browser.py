"""The report page in headless Chromium: nothing leaves it, nothing runs in it, and it can be read and operated."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from evaluators.page import write_page
from st_clp import Collection

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
OPTIONS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
PHONE, DESKTOP = 390, 1200
# (language, a query's direction)
SCRIPTS = {"ko": "ltr", "fa": "rtl", "hi": "ltr"}

# The contrast of each piece of text with what is painted behind it, by WCAG's formula.
CONTRAST = """() => {
  const parse = text => { const c = text.match(/[\\d.]+/g).map(Number);
    const scale = text.startsWith('color(') ? 255 : 1;
    return [...c.slice(0, 3).map(v => scale * v), c[3] ?? 1]; };
  const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = c => { const [r, g, b] = c.map(v => linear(v / 255));
    return .2126 * r + .7152 * g + .0722 * b; };
  const behind = node => { let layers = [];
    for (let n = node; n; n = n.parentElement) layers.push(parse(getComputedStyle(n).backgroundColor));
    return layers.reverse().reduce((under, [r, g, b, a]) => [r, g, b].map((v, i) => a * v + (1 - a) * under[i]),
      [255, 255, 255]); };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement, text = walker.currentNode.data.trim();
    if (!text || node.closest('style, title') || !node.checkVisibility({contentVisibilityAuto: true})) continue;
    const style = getComputedStyle(node);
    const a = light(parse(node.closest('svg') ? style.fill : style.color)), b = light(behind(node));
    found.push([(Math.max(a, b) + .05) / (Math.min(a, b) + .05), text.slice(0, 40)]);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="the page is looked at with playwright: st-clp[test]")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser on the PATH (looked for {', '.join(BROWSERS)})")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=OPTIONS)
        yield browser
        browser.close()


class Opened:
    """A page that is open, what it said and what it asked for."""

    def __init__(self, browser: Any, path: Path, width: int, scheme: str) -> None:
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        self.page = context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.failed: list[str] = []
        self.page.on("requestfailed", lambda request: self.failed.append(request.failure))
        self.page.goto(path.as_uri())

    def require_quiet(self, path: Path) -> None:
        assert self.said == []
        assert [url for url in self.asked if not url.startswith("data:")] == [path.as_uri()]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, evaluations_in: Any, report: dict[str, Any]) -> Path:
    """A page of three scripts with everything on it."""
    folder = tmp_path_factory.mktemp("page")
    make = evaluations_in(folder)
    collections = {language: Collection.load(f"embedded/{language}", split="dev") for language in SCRIPTS}
    evaluations = [
        make("base", collections, skill=0.4),
        make("org/a-model-with-quite-a-long-name", collections, seed=1, skill=0.7),
    ]
    return write_page(folder / "page.html", evaluations, runs={"my run": report})


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_three_scripts_are_set_right_at_any_width_in_light_and_dark(browser, path, tmp_path, width, scheme) -> None:
    opened = Opened(browser, path, width, scheme)
    page = opened.page
    # Nothing is wider than the screen but what scrolls by itself.
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate(
        "[...document.querySelectorAll('svg.chart')].map(e => e.getBoundingClientRect()).every("
        f"box => box.width > 250 && box.height > 100 && box.right <= {width})"
    )
    assert page.locator("svg.chart").count() >= 10
    page.evaluate("document.querySelectorAll('details').forEach(details => { details.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    for language, direction in SCRIPTS.items():
        for kind in (".query", "dd p"):
            text = page.locator(f'{kind}[lang="{language}"]').first
            assert text.evaluate("e => getComputedStyle(e).direction") == direction
            # Text begins at its own side of the box.
            sides = text.evaluate(
                "e => { const range = document.createRange(), first = e.firstChild;"
                " range.setStart(first, 0); range.setEnd(first, 1);"
                " const text = range.getClientRects()[0], box = e.getBoundingClientRect();"
                " return [text.left - box.left, box.right - text.right]; }"
            )
            assert sides[direction == "rtl"] < 3
    # Text in charts is as large as a footnote at least, on a phone too.
    sizes = page.evaluate("[...document.querySelectorAll('svg.chart text')].map(e => e.getBoundingClientRect().height)")
    assert min(sizes) > 11
    contrasts = page.evaluate(CONTRAST)
    assert len(contrasts) > 300
    assert [pair for pair in contrasts if pair[0] < 4.5] == []
    picture = tmp_path / f"{width} {scheme}.png"
    page.screenshot(path=picture, full_page=True)
    assert picture.stat().st_size > 50_000
    opened.require_quiet(path)


@pytest.mark.parametrize("width", [PHONE, 1280])
def test_no_figure_of_a_comparison_is_cut_off(browser, path, width) -> None:
    page = Opened(browser, path, width, "light").page
    regions = "[...document.querySelectorAll('[aria-label=\"Table of differences\"]')]"
    assert page.evaluate(f"{regions}.length") == 1
    assert page.evaluate(f"{regions}.every(e => e.scrollWidth <= e.clientWidth)")
    shown = page.locator('[aria-label="Table of differences"]').inner_text()
    assert "lost" in shown
    # The one search stands within the first two screens of a desk, and before all tables.
    if width > PHONE:
        assert page.locator(".asked").bounding_box()["y"] < 1600


def test_hostile_text_stays_text(browser, hostile, hostile_texts, hostile_report, tmp_path) -> None:
    path = write_page(tmp_path / "page.html", hostile, runs={hostile_texts[2]: hostile_report}, title=hostile_texts[0])
    opened = Opened(browser, path, DESKTOP, "light")
    page = opened.page
    page.evaluate("document.querySelectorAll('details').forEach(details => { details.open = true; })")
    assert page.evaluate("window.hacked") is None
    assert page.title() == hostile_texts[0]
    assert page.locator("script, img, b, i").count() == 0
    shown = " ".join(page.locator("main").inner_text().split())
    for text in hostile_texts:
        assert f"query {text}" in shown
        assert f"document {text}" in shown
    # And what found a way in all the same could load nothing.
    page.evaluate(
        "document.body.append(Object.assign(document.createElement('img'), {src: 'http://localhost:9/x.png'}))"
    )
    page.wait_for_timeout(100)
    assert opened.failed == ["csp"]


def test_it_can_be_operated_by_keyboard(browser, path) -> None:
    opened = Opened(browser, path, DESKTOP, "light")
    page = opened.page
    page.keyboard.press("Tab")
    focus = (
        "(() => { const e = document.activeElement;"
        " return [e.tagName, getComputedStyle(e).outlineWidth, e.className]; })()"
    )
    assert page.evaluate(focus)[2] == "skip"
    assert page.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
    # Every link, fold and scrolling table is reached, in order and visibly.
    expected = page.evaluate(
        "document.querySelectorAll('a, summary, details[open] .wide, :not(details) > .wide').length"
    )
    reached = ["A"]
    opened_details = None
    while len(reached) < 1000:
        page.keyboard.press("Tab")
        tag, outline, kind = page.evaluate(focus)
        if tag == "BODY":
            break
        assert float(outline.removesuffix("px")) >= 2, (tag, kind)
        reached.append(tag)
        if tag == "SUMMARY" and opened_details is None:
            page.keyboard.press("Enter")
            opened_details = page.evaluate("document.activeElement.parentElement.open")
            page.keyboard.press("Enter")
    assert opened_details is True
    assert len(reached) == expected
    opened.require_quiet(path)


def test_what_is_folded_is_open_on_paper(browser, path, tmp_path) -> None:
    opened = Opened(browser, path, DESKTOP, "dark")
    page = opened.page
    seen = "[...document.querySelectorAll('h4 ~ details > div')].map(e => e.checkVisibility())"
    assert set(page.evaluate(seen)) == {False}
    page.emulate_media(media="print")
    assert set(page.evaluate(seen)) == {True}
    # Black on white, whatever the screen is.
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    contrasts = page.evaluate(CONTRAST)
    assert [pair for pair in contrasts if pair[0] < 4.5] == []
    page.pdf(path=tmp_path / "page.pdf", format="A4")
    assert (tmp_path / "page.pdf").read_bytes().count(b"/Type /Page\n") > 5
    opened.require_quiet(path)
