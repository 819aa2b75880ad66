"""A headless Chromium that opens MLflow's pages as a user does, with Debian's packages chromium and chromium-driver."""

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

PATIENCE = 90.0  # seconds for a page that takes a few on an idle machine
SIZE = (1440, 900)  # pixels of the page: a laptop's
FLAGS = (
    "--headless",
    "--no-sandbox",  # as root
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",  # containers have little of it
    # As with a mouse, whose absence makes the charts show their tool bars all the time.
    "--blink-settings=primaryHoverType=2,availableHoverTypes=2,primaryPointerType=4,availablePointerTypes=4",
)

CLOSE = "[data-component-id='mlflow.assistant.chat_panel.close']"

# What the list shows: one mapping a row, from a column's id to a cell, which is not whole if its text is wider.
ROWS = """
const rows = {};
for (const cell of document.querySelectorAll('.ag-row .ag-cell[col-id]')) {
    const index = cell.closest('.ag-row').getAttribute('row-index');
    const inner = [cell, ...cell.querySelectorAll('*')];
    const box = cell.getBoundingClientRect();
    (rows[index] ??= {})[cell.getAttribute('col-id')] = {
        text: cell.innerText.trim(),
        whole: inner.every(each => each.scrollWidth <= Math.ceil(each.getBoundingClientRect().width) + 1),
        inside: box.left >= 0 && box.right <= window.innerWidth
            && cell.contains(document.elementFromPoint(box.right - 6, box.top + box.height / 2)),
    };
}
return Object.keys(rows).map(Number).sort((a, b) => a - b).map(index => rows[index]);
"""

# Where the charts are, among them those that Plotly does not draw.
CARDS = """
return [...document.querySelectorAll("[data-testid='experiment-view-compare-runs-card']")].map(card => {
    const {left, top, right, bottom} = card.getBoundingClientRect();
    return [card.innerText.split('\\n')[0], [left, top, right, bottom].map(Math.round)];
});
"""

# Pictures that have arrived, in pixels of their own.
PICTURES = """
return [...document.querySelectorAll('img')].map(each => [each.naturalWidth, each.naturalHeight]).filter(
    ([width]) => width > 200);
"""

# What the charts show: one mapping a chart, with the runs whose curves are drawn.
CHARTS = """
return [...document.querySelectorAll('.js-plotly-plot')].map(plot => ({
    title: plot.closest("[data-testid='experiment-view-compare-runs-card']").innerText.split('\\n')[0],
    scale: plot._fullLayout.yaxis?.type ?? '',
    drawn: plot.querySelectorAll('.scatterlayer .trace path.js-line').length,
    curves: plot.data.filter(trace => trace.mode?.startsWith('lines')).map(
        trace => ({run: trace.name, steps: Array.from(trace.x), values: Array.from(trace.y)})),
}));
"""


class Missing(Exception):
    """A program of the system that this needs is not installed."""


@contextmanager
def chromium(*, size: tuple[int, int] = SIZE) -> Iterator[Chrome]:
    """A browser without a past, `size` pixels of page: what it shows, a user's first visit shows."""
    programs = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    if missing := [name for name, path in programs.items() if path is None]:
        raise Missing(
            f"{' and '.join(missing)} not found on PATH. Expected Debian's packages chromium and chromium-driver: "
            "`sh tests/system-packages` installs them."
        )
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = ChromeOptions()
        options.binary_location = programs["chromium"]
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        driver = Chrome(options=options, service=ChromeService(executable_path=programs["chromedriver"]))
        try:
            resize(driver, size)
            yield driver
        finally:
            driver.quit()


def resize(driver: Chrome, size: tuple[int, int]) -> None:
    """Give the page this many pixels; a window's size would include its frame."""
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def until(driver: Chrome, condition: Callable[[], Any], what: str) -> Any:
    """Wait for something on the page to be true; return it."""
    wait = WebDriverWait(driver, PATIENCE, ignored_exceptions=[StaleElementReferenceException])
    return wait.until(lambda _: condition(), f"not within {PATIENCE:.0f} s at {driver.current_url}: {what}")


def close_assistant(driver: Chrome) -> None:
    """Close the panel that MLflow opens on a first visit from the same machine; it hides a third of the page."""

    def closed() -> bool:
        buttons = driver.find_elements(By.CSS_SELECTOR, CLOSE)
        for button in buttons:  # it may not listen yet: again, then
            button.click()
        return not buttons

    until(driver, closed, "the Assistant closed")


def settle(driver: Chrome, *, quiet: float = 2.0) -> None:
    """Wait until the page looks the same for `quiet` seconds."""
    seen, since = b"", time.monotonic()

    def same() -> bool:
        nonlocal seen, since
        if (now := driver.get_screenshot_as_png()) != seen:
            seen, since = now, time.monotonic()
        return time.monotonic() - since >= quiet

    until(driver, same, "the page at rest")


def rows(driver: Chrome) -> list[dict[str, dict[str, Any]]]:
    """The rows of the list from the top: column id -> text, whole (not cut off), inside (not out of sight)."""
    return driver.execute_script(ROWS)


def charts(driver: Chrome) -> list[dict[str, Any]]:
    """The charts: title, scale of the vertical axis, number of drawn lines, curves with run, steps and values.

    The page draws each curve twice, the second time (pale) as it was before smoothing.
    """
    return driver.execute_script(CHARTS)


def cards(driver: Chrome) -> dict[str, tuple[int, int, int, int]]:
    """Every chart's place by its title, whatever draws it: left, top, right, bottom in pixels."""
    return {title: tuple(box) for title, box in driver.execute_script(CARDS)}


def text(driver: Chrome) -> str:
    """All text of the page."""
    return driver.find_element(By.TAG_NAME, "body").text


def pictures(driver: Chrome) -> list[list[int]]:
    """Width and height of every picture of the page that is larger than an icon."""
    return driver.execute_script(PICTURES)
