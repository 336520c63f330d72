"""The report in a real browser: light, dark, on a phone and on paper."""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsing import CONTRASTS, fresh_browser, requested, show_as, visit
from forged_runs import write_run

from fcn_dist.commands.entry import run_script

pytestmark = pytest.mark.slow

THEMES = ("light", "dark")
DESKTOP, PHONE = 1200, 360
LEAST_CONTRAST = 4.5  # WCAG 2.1, 1.4.3, of text

# Charts and pictures with their sizes, and texts that stick out of the chart they are in.
SIZES = """
const boxes = [...document.querySelectorAll("svg, img")].map(one => one.getBoundingClientRect());
const out = [];
for (const text of document.querySelectorAll("svg text")) {
  const box = text.getBoundingClientRect(), chart = text.ownerSVGElement.getBoundingClientRect();
  const beyond = [chart.left - box.left, box.right - chart.right, chart.top - box.top, box.bottom - chart.bottom];
  if (Math.max(...beyond) > 2) out.push(text.textContent);
}
const texts = [...document.querySelectorAll("svg text")].map(one => one.getBoundingClientRect().height);
return {sizes: boxes.map(box => [box.width, box.height]), out: out, smallest: Math.min(...texts),
        whole: [...document.images].every(one => one.complete && one.naturalWidth > 0)};
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A fresh headless Chromium; the tests skip where there is none."""
    with fresh_browser(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The page of one run, and one that compares two."""
    folder = tmp_path_factory.mktemp("runs")
    one, other = write_run(folder / "one"), write_run(folder / "other-with-a-name-that-is-long-for-a-column", scenes=3)
    assert run_script("report", [str(one)]) == run_script("report", [str(one), str(other)]) == 0
    return {"one": one / "report.html", "several": one / "comparison.html"}


def show(browser: Any, page: Path, theme: str, width: int) -> None:
    show_as(browser, theme, width)
    visit(browser, page.as_uri())
    browser.execute_script("for (const one of document.querySelectorAll('details')) one.open = true;")


@pytest.mark.parametrize("name", ["one", "several"])
def test_a_page_asks_for_nothing_and_has_no_error(browser: Any, pages: dict[str, Path], name: str) -> None:
    browser.get_log("performance"), browser.get_log("browser")
    show(browser, pages[name], "light", DESKTOP)
    asked = requested(browser)
    assert asked and {url for url in asked if not url.startswith("data:")} == {pages[name].as_uri()}
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("width", [DESKTOP, PHONE])
@pytest.mark.parametrize("name", ["one", "several"])
def test_everything_is_seen_whole(browser: Any, pages: dict[str, Path], name: str, width: int, theme: str) -> None:
    show(browser, pages[name], theme, width)
    found = browser.execute_script(SIZES)
    assert len(found["sizes"]) == (47 if name == "one" else 12) and found["whole"]
    assert all(width >= 50 and height >= 35 for width, height in found["sizes"])
    assert found["out"] == [] and found["smallest"] > 8, "pixels"
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    low = [(ratio, text) for ratio, text in browser.execute_script(CONTRASTS) if ratio < LEAST_CONTRAST]
    assert low == []


def test_themes_differ_and_paper_is_light(browser: Any, pages: dict[str, Path]) -> None:
    grounds, inks = [], []
    for theme in THEMES:
        show(browser, pages["one"], theme, DESKTOP)
        grounds.append(browser.execute_script("return getComputedStyle(document.body).backgroundColor"))
        inks.append(browser.execute_script("return getComputedStyle(document.querySelector('svg text')).fill"))
    assert grounds == ["rgb(255, 255, 255)", "rgb(20, 23, 27)"] and len(set(inks)) == 2
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"media": "print", "features": [{"name": "prefers-color-scheme", "value": "dark"}]},
    )
    assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") == grounds[0]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    printed = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"])
    assert printed.startswith(b"%PDF") and len(printed) > 20_000


def test_without_scripts_the_page_is_the_same(browser: Any, pages: dict[str, Path]) -> None:
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    show(browser, pages["one"], "light", DESKTOP)
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    assert browser.execute_script("return document.querySelectorAll('svg').length") == 11
    assert browser.execute_script("return document.scripts.length") == 0
