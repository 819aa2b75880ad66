"""Take the pictures of the documentation: python docs/screenshots.py NAME=URL... -o docs/images

Each becomes NAME.png. `parameters=` with a link to charts cuts out those of the parameters, `first-visit=` leaves
MLflow's Assistant open. Needs the dev extra, and Debian's packages chromium, chromium-driver and fonts-liberation.
"""

import argparse
import io
import sys
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))

import browser

TALL = (browser.SIZE[0], 1155)  # pixels: two rows of charts
OF_PARAMETERS = ("Parallel Coordinates", "best_epoch vs. best_val_nmse")


def take(name: str, url: str, picture: Path) -> None:
    """Write what a user sees at `url`, after closing MLflow's Assistant but for a first visit."""
    charts = "compareRunsMode=CHART" in url
    with browser.chromium(size=TALL if charts or "/artifacts/" in url else browser.SIZE) as driver:
        driver.get(url)
        if "viewStateShareKey" in url:
            browser.until(driver, lambda: browser.rows(driver), "a run")
        browser.settle(driver)
        if name != "first-visit":
            browser.close_assistant(driver)
        if charts:
            browser.until(driver, lambda: any(chart["drawn"] for chart in browser.charts(driver)), "a curve")
        if url.endswith(".png"):
            browser.until(driver, lambda: browser.pictures(driver), "a picture")
        browser.settle(driver)
        shot = Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB")
        if name == "parameters":
            cards = browser.cards(driver)
            left, top, right, bottom = zip(*(cards[title] for title in OF_PARAMETERS), strict=True)
            shot = shot.crop((min(left), min(top), max(right), max(bottom)))
    shot.quantize(256).save(picture, optimize=True)  # a third of the bytes, and nobody sees it
    print(picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", metavar="NAME=URL", nargs="+")
    parser.add_argument("-o", dest="folder", type=Path, required=True, help="folder of the pictures")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for page in arguments.pages:
        name, _, url = page.partition("=")
        take(name, url, arguments.folder / f"{name}.png")


if __name__ == "__main__":
    main()
