"""Makes docs/images/report.png, the picture in README.md: the answer and two figures of a report, from its report.html.

    .venv/bin/python docs/make_picture.py report/report.html /usr/bin/chromium

Needs Chromium; without the second argument the one of `playwright install chromium` is taken.
"""

import io
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

PICTURE = Path(__file__).parent / "images" / "report.png"
WIDTH = 1200
PARTS = ("header", "#s-tokens", "#s-tokens + .grid")  # of the page, one below the other
COLOURS = 256


def make(report: Path, chromium: str | None) -> None:
    """Writes the picture."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": 900}, color_scheme="light")
        page.goto(report.absolute().as_uri())
        boxes = [page.locator(part).bounding_box() for part in PARTS]
        shown = Image.open(io.BytesIO(page.screenshot(full_page=True)))
        browser.close()
    crops = [shown.crop((0, int(box["y"]), WIDTH, int(box["y"] + box["height"]) + 1)) for box in boxes if box]
    picture = Image.new("RGB", (WIDTH, sum(crop.height for crop in crops) + 24 * len(crops)), "white")
    top = 0
    for crop in crops:
        picture.paste(crop, (0, top))
        top += crop.height + 24
    picture.quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(PICTURE, optimize=True)


if __name__ == "__main__":
    make(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None)
