# SPDX-License-Identifier: Apache-2.0
"""Make the screenshots of docs/demo.md: `fastvlm demo` with the embedded model, in headless Chromium.

    python tools/demo_screenshots.py [FOLDER]

Needs the extra `demo`, the package playwright, and Chromium (its path is in the variable CHROMIUM, or it is found).
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

from transformers_fastvlm.demo import Page
from transformers_fastvlm.engines import load_engine

SLOW = 240_000  # milliseconds
MOST_BYTES = 150_000
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
]


def take(tab: Any, path: Path) -> None:
    """Write what a tab shows as a PNG with few colours, of at most MOST_BYTES."""
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.png"
        tab.screenshot(path=str(raw), animations="disabled", caret="hide")
        with Image.open(raw) as image:
            small = image.convert("RGB").quantize(128, method=Image.Quantize.MEDIANCUT)
    small.save(path, optimize=True)
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise SystemExit(f"{path} has {size} bytes; expected at most {MOST_BYTES}.")
    print(path, small.size, size, "bytes")


def talk(tab: Any, address: str, again: bool) -> None:
    """Press an example, and ask again if wanted."""
    tab.goto(address)
    tab.locator("#conversation button.example").first.click()
    tab.locator("#status", has_text="image encoded").wait_for()
    if again:
        tab.locator("#question textarea").fill("Describe the picture.")
        tab.keyboard.press("Enter")
        tab.locator("#status", has_text="image reused").wait_for()
        tab.locator("#question textarea").blur()
    tab.wait_for_function("[...document.images].every((image) => image.complete)")


def watch(tab: Any) -> None:
    """Caption the camera."""
    tab.get_by_role("tab", name="Live camera").click()
    tab.get_by_role("button", name="Click to Access Webcam").click()
    tab.locator("#camera").get_by_text("Record").click()
    tab.locator("#timing", has_text="ms").wait_for()


def main(folder: Path) -> None:
    """Write demo.png (light, wide), demo-phone.png (dark, narrow) and demo-camera.png to a folder."""
    from playwright.sync_api import sync_playwright

    folder.mkdir(parents=True, exist_ok=True)
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or "/usr/bin/chromium"
    engine = load_engine("transformers", "tiny", batch_size=1)
    name = "tiny, the test model that ships with the package, for drawn scenes"
    with Page(engine, name=name, scenes=True) as page, sync_playwright() as driver:
        address = page.start()
        browser = driver.chromium.launch(executable_path=chromium, args=FLAGS)
        for file, (width, height), scheme in (
            ("demo.png", (1000, 990), "light"),
            ("demo-phone.png", (375, 812), "dark"),
        ):
            context = browser.new_context(
                viewport={"width": width, "height": height}, color_scheme=scheme, permissions=["camera"]
            )
            context.set_default_timeout(SLOW)
            tab = context.new_page()
            talk(tab, address, again=scheme == "light")
            take(tab, folder / file)
            if scheme == "light":
                watch(tab)
                tab.set_viewport_size({"width": width, "height": 620})
                take(tab, folder / "demo-camera.png")
            context.close()
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "docs" / "images")
