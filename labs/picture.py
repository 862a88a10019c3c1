"""A picture of the page at /, for the README: a real question and one that the documents do not answer, asked in Chromium.

It starts a server of its own, with the newest adapter and the index that `make index` wrote. It needs Chromium on the path
(Debian: apt-get install chromium) and the driver in requirements/dev.lock. Run by:

    make screenshots
"""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.config import ROOT
from pipelines.errors import EngineError

if TYPE_CHECKING:
    from PIL.Image import Image
    from playwright.sync_api import Browser

PICTURE = ROOT / "labs" / "measured" / "page.png"
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
DESKTOP, PHONE = (1120, 820), (360, 820)
QUESTIONS = ("Who developed Phi-2?", "What is the boiling point of ethanol?")
GAP = 24  # pixels between the two pictures
COLOURS = 192  # of the file; text stays sharp, and the file small
ANSWER_SECONDS = 300


def find_chromium() -> str:
    """Return the path of Chromium; `EngineError` if it is not installed."""
    found = next((path for name in CHROMIUM if (path := shutil.which(name))), None)
    if not found:
        raise EngineError("there is no Chromium on the path", f"one of {', '.join(CHROMIUM)}", "apt-get install chromium")
    return found


def chromium_options() -> dict[str, Any]:
    """Return how Playwright starts the installed Chromium; root has no sandbox to start it in."""
    return {"executable_path": find_chromium(), "args": ["--no-sandbox"] if os.geteuid() == 0 else []}


def take(model: str, to: Path = PICTURE) -> Path:
    """Serve a model, ask, and write the picture: a desktop in light, a phone in dark.

    Raises:
        LabError: there is no Chromium, or the server does not start.
    """
    from playwright.sync_api import sync_playwright

    from labs.screen import say
    from serving.launch import running
    from serving.settings import load_serve_config

    options = chromium_options()
    with (
        running(model, load_serve_config("default", ["port=0", "engine_port=0", "keys=null"]), say=say) as served,
        sync_playwright() as play,
    ):
        browser = play.chromium.launch(**options)
        phone, desktop = (_asked(browser, served.url, *view) for view in ((PHONE, "dark"), (DESKTOP, "light")))
        browser.close()
    _beside([desktop, phone]).save(to, optimize=True)
    return to


def _asked(browser: Browser, url: str, size: tuple[int, int], scheme: Any) -> Image:
    from PIL import Image

    page = browser.new_page(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
    page.goto(url)
    for number, question in enumerate(QUESTIONS, 1):
        page.get_by_label("Question", exact=True).fill(question)
        page.keyboard.press("Enter")
        page.locator(".figures").nth(number - 1).wait_for(timeout=ANSWER_SECONDS * 1000)
    page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    return Image.open(io.BytesIO(page.screenshot(animations="disabled")))


def _beside(pictures: list[Image]) -> Image:
    from PIL import Image

    width = sum(picture.width for picture in pictures) + GAP * (len(pictures) - 1)
    whole, left = Image.new("RGB", (width, max(p.height for p in pictures)), "white"), 0
    for picture in pictures:
        whole.paste(picture, (left, 0))
        left += picture.width + GAP
    return whole.quantize(COLOURS)
