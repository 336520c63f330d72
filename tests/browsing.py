"""A fresh headless Chromium, and what tests ask of it."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

BROWSER, DRIVER = "chromium", "chromedriver"
SWITCHES = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


@contextmanager
def fresh_browser(profile: Path) -> Iterator[Any]:
    """The driver of a browser that has its profile in that folder; the test is skipped where there is none."""
    paths = [shutil.which(name) for name in (BROWSER, DRIVER)]
    if None in paths:
        pytest.skip(f"{BROWSER} and {DRIVER} are not installed; tests/cluster/packages.sh installs them")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = paths[0]
    for switch in (*SWITCHES, f"--user-data-dir={profile}"):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(paths[1]))
    driver.set_page_load_timeout(60)
    try:
        yield driver
    finally:
        driver.quit()


def show_as(browser: Any, theme: str, width: int, height: int = 800) -> None:
    """In the light or dark theme, in a window of that size; up to 500 pixels wide as on a phone."""
    media = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def requested(browser: Any) -> list[str]:
    """Addresses that anything on the page has asked for since the last call."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [one["params"]["request"]["url"] for one in messages if one["method"] == "Network.requestWillBeSent"]
