"""Take the pictures of README: python docs/screenshots.py LIST_URL CHART_URL -o docs/images

The two links are those that `hpo run` prints. Needs the dev extra, and Debian's packages chromium and chromium-driver.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import browser

TALL = (browser.SIZE[0], 1155)  # pixels: two rows of charts


def take(url: str, picture: Path, *, charts: bool) -> None:
    """Write what a user sees at `url`, a list or charts, after closing MLflow's Assistant."""
    with browser.chromium(size=TALL if charts else browser.SIZE) as driver:
        driver.get(url)
        browser.until(driver, lambda: browser.rows(driver), "a run")
        browser.close_assistant(driver)
        if charts:
            browser.until(driver, lambda: any(chart["drawn"] for chart in browser.charts(driver)), "a curve")
        browser.settle(driver)
        if not driver.save_screenshot(str(picture)):
            raise SystemExit(f"{picture} could not be written.")
        print(picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("list_url")
    parser.add_argument("chart_url")
    parser.add_argument("-o", dest="folder", type=Path, required=True, help="folder for list.png and charts.png")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    take(arguments.list_url, arguments.folder / "list.png", charts=False)
    take(arguments.chart_url, arguments.folder / "charts.png", charts=True)


if __name__ == "__main__":
    main()
