# SPDX-License-Identifier: Apache-2.0
"""The web page in a real headless Chromium: images, answers, presets, camera, phone, keyboard, and nothing outside.

Nothing here waits a fixed time; every wait polls, and allows for a slow machine.
"""

import contextlib
import functools
import gc
import importlib.util
import json
import os
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

if importlib.util.find_spec("gradio") is None:  # not imported yet: it leaves event loops open, see pytestmark
    pytest.skip("gradio is not installed", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from transformers_fastvlm import FastViTHDModel  # noqa: E402
from transformers_fastvlm.checkpoints import tiny_checkpoint  # noqa: E402
from transformers_fastvlm.data.scenes import SceneDataset  # noqa: E402
from transformers_fastvlm.demo import Page  # noqa: E402
from transformers_fastvlm.engines import TransformersEngine  # noqa: E402

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or "/usr/bin/chromium"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
]
SLOW = 240_000  # milliseconds

pytestmark = [
    pytest.mark.skipif(not os.path.exists(CHROMIUM), reason="Chromium is not installed"),
    # Gradio and what it builds on leave event loops and sockets to the garbage collector, and warn at import.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
expect = playwright.expect
expect.set_options(timeout=SLOW)


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Any]:
    model = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint(), dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(tiny_checkpoint())


@pytest.fixture(scope="module")
def page(parts: tuple[Any, Any]) -> Iterator[tuple[Page, str]]:
    """The page with the embedded model, served, and its address."""
    engine = TransformersEngine(*parts, batch_size=1)
    shown = Page(engine, name="tiny", scenes=True, notice="For <b>tests</b>.", max_new_tokens=64)
    with contextlib.closing(engine), shown as page:
        yield page, page.start()
    gc.collect()  # here, where it may warn, and not in another module's tests


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(page: tuple[Page, str], browser: Any) -> Iterator[Callable[..., Any]]:
    """Open the page as a new visitor; afterwards check that nothing went wrong in it or outside this machine."""
    served, address = page
    contexts, problems = [], []

    def ours(url: str) -> bool:
        return url.startswith((address, "data:", "blob:"))

    def open_page(width: int = 1000, height: int = 800, **options: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": height}, permissions=["camera"], **options)
        contexts.append(context)
        context.set_default_timeout(SLOW)
        context.on("request", lambda request: None if ours(request.url) else problems.append(request.url))
        context.on("weberror", lambda error: problems.append(str(error.error)))
        tab = context.new_page()
        before = set(served.visitors)
        tab.goto(address)
        expect(box(tab)).to_be_visible()
        until(lambda: set(served.visitors) - before, tab)
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []


def until(condition: Callable[[], Any], tab: Any) -> None:
    """Poll for something on the server, while the browser goes on."""
    for _ in range(SLOW // 100):
        if condition():
            return
        tab.wait_for_timeout(100)
    raise AssertionError("waited in vain")


def box(tab: Any) -> Any:
    return tab.locator("#question textarea")


def status(tab: Any) -> Any:
    return tab.locator("#status p")


def ask(tab: Any, question: str, *files: Path | str) -> str:
    """Ask, wait for the end, and return the answer that the page shows."""
    if files:
        attach(tab, *files)
    box(tab).fill(question)
    box(tab).press("Enter")
    return answered(tab)


def attach(tab: Any, *files: Path | str) -> None:
    tab.locator("#question input[type=file]").set_input_files([str(file) for file in files])
    expect(tab.get_by_label("Remove file")).to_have_count(len(files))


def answered(tab: Any) -> str:
    expect(status(tab)).to_contain_text("First token after")
    return str(tab.get_by_test_id("bot").last.inner_text()).strip()


def refused(tab: Any) -> str:
    alert = tab.locator("#status [role=alert]")
    expect(alert).to_be_visible()
    return str(alert.inner_text())


def opened(file: Path) -> Image.Image:
    with Image.open(file) as image:
        return image.copy()


def expected(parts: tuple[Any, Any], *turns: str, files: tuple[Path, ...] = ()) -> str:
    """What plain generate() answers greedily to the last of these turns."""
    model, processor = parts
    images = [{"type": "image", "image": opened(file)} for file in files]
    messages: list[dict[str, Any]] = []
    for number, text in enumerate(turns):
        role = "assistant" if number % 2 else "user"
        messages.append({"role": role, "content": [*images, {"type": "text", "text": text}]})
        images = []
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    return str(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


@pytest.fixture
def scenes(tmp_path: Path) -> tuple[Path, Path]:
    files = tmp_path / "first.png", tmp_path / "second.png"
    for index, file in enumerate(files):
        SceneDataset(2, seed=7, kinds=["count"])[index]["images"][0].save(file)
    return files


def test_two_questions_about_an_image_and_then_another(
    visit: Callable[..., Any],
    parts: tuple[Any, Any],
    scenes: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Answers are generate's, the second question encodes nothing, errors change nothing, a new image starts over."""
    encoded: list[int] = []
    encode = FastViTHDModel.forward

    @functools.wraps(encode)
    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        encoded.append(1)
        return encode(self, *args, **kwargs)

    tab = visit()
    wanted = expected(parts, "How many shapes are there?", files=scenes[:1])
    monkeypatch.setattr(FastViTHDModel, "forward", counted)
    assert ask(tab, "How many shapes are there?", scenes[0]) == wanted
    assert len(encoded) == 1 and "image encoded" in status(tab).inner_text()
    expect(tab.get_by_alt_text("Your image")).to_have_count(1)

    # Text is text: this would fetch something if it were rendered.
    second = "Describe the picture. ![x](http://example.invalid/x.png) <img src=http://example.invalid/y.png>"
    box(tab).fill(second)
    box(tab).press("Enter")
    expect(status(tab)).to_contain_text("image reused")
    assert len(encoded) == 1
    assert answered(tab) == expected(parts, "How many shapes are there?", wanted, second, files=scenes[:1])
    assert second in tab.get_by_test_id("user").last.inner_text()

    broken = tmp_path / "broken.png"
    broken.write_bytes(scenes[1].read_bytes()[:2000])
    attach(tab, broken)
    box(tab).fill("And this?")
    box(tab).press("Enter")
    assert "The image 'broken.png' is truncated" in refused(tab)
    expect(box(tab)).to_have_value("And this?")
    expect(tab.get_by_test_id("bot")).to_have_count(2)
    tab.get_by_label("Remove file").click()

    assert ask(tab, "How many shapes are there?", *scenes) == expected(
        parts, "How many shapes are there?", files=scenes
    )
    expect(tab.get_by_alt_text("Your image 2 of 2")).to_have_count(1)
    expect(tab.get_by_test_id("bot")).to_have_count(1)
    expect(tab.get_by_label("Share")).to_be_hidden()

    tab.get_by_role("button", name="New conversation", exact=True).click()
    expect(tab.locator("#conversation button.example")).to_have_count(4)
    tab.get_by_role("button", name="Count", exact=True).click()
    assert "There is no image yet" in refused(tab)


def test_an_example_and_a_preset(visit: Callable[..., Any], parts: tuple[Any, Any], page: tuple[Page, str]) -> None:
    tab = visit()
    tab.locator("#conversation button.example").nth(2).click()
    answered(tab)
    box(tab).fill("half a question")
    tab.get_by_role("button", name="Count", exact=True).click()
    expect(tab.get_by_test_id("bot")).to_have_count(2)
    expect(status(tab)).to_contain_text("image reused")
    expect(tab.get_by_test_id("user").last).to_contain_text("How many shapes are there?")
    expect(box(tab)).to_have_value("half a question")


@pytest.mark.parametrize("how", ["paste", "drop"])
def test_pasted_and_dropped_images(visit: Callable[..., Any], scenes: tuple[Path, Path], how: str) -> None:
    tab = visit()
    tab.evaluate(
        """async ([how, bytes]) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], "it.png", { type: "image/png" }));
            const options = { bubbles: true, cancelable: true };
            const event = how === "paste" ? new ClipboardEvent("paste", { ...options, clipboardData: data })
                                          : new DragEvent("drop", { ...options, dataTransfer: data });
            document.querySelector("#question textarea").dispatchEvent(event);
        }""",
        [how, list(scenes[0].read_bytes())],
    )
    expect(tab.get_by_label("Remove file")).to_have_count(1)
    tab.get_by_role("button", name="Describe", exact=True).click()
    answered(tab)
    expect(tab.get_by_alt_text("Your image")).to_have_count(1)


def test_stop(visit: Callable[..., Any], page: tuple[Page, str], parts: tuple[Any, Any]) -> None:
    """The answer streams, Stop ends it, and what there is stays."""
    served, tab = page[0], visit()
    config = parts[0].generation_config
    before = config.eos_token_id, served.answerer.max_new_tokens
    config.eos_token_id, served.answerer.max_new_tokens = None, 10_000
    parts[1].context_length, context = 20_000, parts[1].context_length
    try:
        box(tab).fill("Describe the picture.")
        box(tab).press("Enter")
        tab.wait_for_function("document.querySelector('[data-testid=bot]')?.innerText.length > 20")
        tab.get_by_role("button", name="Stop", exact=True).click()
        expect(status(tab)).to_contain_text("stopped")
    finally:
        config.eos_token_id, served.answerer.max_new_tokens = before
        parts[1].context_length = context
    assert len(tab.get_by_test_id("bot").inner_text()) > 20
    expect(tab.get_by_role("button", name="Submit", exact=True)).to_be_visible()
    expect(tab.get_by_role("button", name="Describe", exact=True)).to_be_enabled()


def test_a_conversation_that_is_too_long(
    visit: Callable[..., Any], page: tuple[Page, str], parts: tuple[Any, Any]
) -> None:
    tab = visit()
    context, parts[1].context_length = parts[1].context_length, 12
    try:
        box(tab).fill("Describe the picture, and all that is in it, word by word.")
        box(tab).press("Enter")
        assert "has become too long" in refused(tab) and "the model reads 12" in refused(tab)
    finally:
        parts[1].context_length = context


def test_visitors_are_apart_and_leave_nothing(
    visit: Callable[..., Any], page: tuple[Page, str], scenes: tuple[Path, Path]
) -> None:
    first, second = visit(), visit()
    ask(first, "How many shapes are there?", scenes[0])
    second.get_by_role("button", name="Count", exact=True).click()
    assert "There is no image yet" in refused(second)
    known = set(page[0].visitors)
    first.close()
    until(lambda: len(set(page[0].visitors) & known) < len(known), second)
    ask(second, "How many shapes are there?", scenes[1])


def test_camera(visit: Callable[..., Any], page: tuple[Page, str]) -> None:
    tab = visit()
    tab.get_by_role("tab", name="Live camera").click()
    tab.get_by_label("Asked about each frame").fill("How many shapes are there?")
    tab.get_by_role("button", name="Click to Access Webcam").click()
    tab.locator("#camera").get_by_text("Record").click()
    expect(tab.locator("#timing")).to_contain_text(re.compile(r"First token after \d+ ms"))
    expect(tab.locator("#caption textarea")).not_to_have_value("")
    first = tab.locator("#caption textarea").input_value()
    assert len(first) < 12  # a number, or a word; not a description
    tab.get_by_role("tabpanel").last.get_by_role("button", name="Describe", exact=True).click()
    expect(tab.locator("#caption textarea")).not_to_have_value(first)
    tab.locator("#camera").get_by_text("Stop").click()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone(visit: Callable[..., Any], scenes: tuple[Path, Path], scheme: str) -> None:
    """Nothing is wider than the screen, all controls are reachable, and text can be read."""
    tab = visit(375, 740, color_scheme=scheme, has_touch=True, is_mobile=True)
    ask(tab, "Describe the picture.", scenes[0])
    for name in ("Ask about images", "Live camera"):
        tab.get_by_role("tab", name=name).click()
        assert tab.evaluate("document.documentElement.scrollWidth") <= 375
        for button in tab.get_by_role("tabpanel").locator("button:visible").all():
            place = button.bounding_box()
            assert place is None or (place["x"] >= 0 and place["x"] + place["width"] <= 375), place
        faint = tab.evaluate(FAINT_TEXT)
        assert faint == []


FAINT_TEXT = """() => {
    const parse = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
    const light = (c) => c.slice(0, 3).map((v) => v / 255)
        .map((v) => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
    const ground = (node) => {
        for (; node; node = node.parentElement) {
            const color = parse(getComputedStyle(node).backgroundColor);
            if (color.length === 3 || color[3] > .9) return color;
        }
        return [255, 255, 255];
    };
    const faint = [];
    for (const node of document.querySelectorAll("main *")) {
        const own = [...node.childNodes].some((one) => one.nodeType === 3 && one.textContent.trim());
        if (!own || !node.checkVisibility({ visibilityProperty: true, opacityProperty: true })) continue;
        if (node.closest("button[disabled]")) continue;
        const [a, b] = [light(parse(getComputedStyle(node).color)), light(ground(node))];
        const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
        if (ratio < 4.5) faint.push(node.textContent.trim().slice(0, 40) + ": " + ratio.toFixed(1));
    }
    return faint;
}"""


def test_keyboard_only(visit: Callable[..., Any]) -> None:
    """Tab goes from top to bottom and reaches everything, each with a name; Enter chooses and sends."""
    tab = visit()
    names = []
    for _ in range(20):
        tab.keyboard.press("Tab")
        name = tab.evaluate(
            """() => { const a = document.activeElement;
                const own = a.ariaLabel || a.innerText || a.placeholder || a.querySelector("img")?.alt;
                return a === document.body ? "" : own || "nameless"; }"""
        )
        names.append(name.strip())
        if name.startswith("Select example 1"):
            tab.keyboard.press("Enter")
            answered(tab)
        if name == "Ask about the image":
            break
    assert "nameless" not in names
    wanted = ["Ask about images", "Describe", "Read the word", "Count", "New conversation", "Upload a file"]
    places = [names.index(name) for name in [*wanted, "Ask about the image"]]
    assert places == sorted(places)
    expect(tab.get_by_test_id("bot")).to_have_count(1)
    tab.keyboard.type("How many shapes are there?")
    tab.keyboard.press("Enter")
    expect(tab.get_by_test_id("bot")).to_have_count(2)


def test_forged_requests(visit: Callable[..., Any], page: tuple[Page, str], tmp_path: Path) -> None:
    """A request cannot make the server read its own files or fetch a URL."""
    visit()
    _, address = page
    config = json.load(urllib.request.urlopen(f"{address}config", timeout=SLOW / 1000))
    submits = [one["id"] for one in config["dependencies"] if any(event == "submit" for _, event in one["targets"])]
    secret = tmp_path / "secret.png"
    Image.new("RGB", (8, 8)).save(secret)
    for path, reason in (
        ("http://127.0.0.1:9/x.png", "URLs are not downloaded"),
        ("ftp://example.invalid/x.png", "URLs are not downloaded"),
        (str(secret), ""),
    ):
        file = {"path": path, "meta": {"_type": "gradio.FileData"}}
        body = {"fn_index": submits[0], "session_hash": "forged", "data": [{"text": "What is it?", "files": [file]}]}
        request = urllib.request.Request(
            f"{address}gradio_api/queue/join", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        urllib.request.urlopen(request, timeout=SLOW / 1000).close()
        with urllib.request.urlopen(
            f"{address}gradio_api/queue/data?session_hash=forged", timeout=SLOW / 1000
        ) as stream:
            last = next(line.decode() for line in stream if b"process_completed" in line)
        assert '"success":false' in last.replace(" ", "") and reason in last
    for path in (str(secret), "/etc/passwd", str(Path(__file__))):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"{address}gradio_api/file={path}", timeout=SLOW / 1000)
        assert caught.value.code in (403, 404)
        caught.value.close()


def test_the_page_is_bound_to_this_machine_and_cleans_up(parts: tuple[Any, Any]) -> None:
    page = Page(TransformersEngine(*parts), name="tiny")
    folder = Path(os.environ["GRADIO_TEMP_DIR"])
    with page:
        assert page.start().startswith("http://127.0.0.1:") and folder.is_dir()
    assert not folder.exists()
