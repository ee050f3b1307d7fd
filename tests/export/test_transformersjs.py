# SPDX-License-Identifier: Apache-2.0
"""transformers.js, in Node and in a headless Chromium, gives PyTorch's words.

Node's packages are those of javascript/package-lock.json: `npm ci --ignore-scripts` in tests/export/javascript, or in
a folder with copies of its two JSON files that FASTVLM_NODE_FOLDER names.
"""

import base64
import contextlib
import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from test_readme import ROOT, blocks

pytest.importorskip("onnx", reason="the export to ONNX is an extra")
pytest.importorskip("onnxruntime", reason="the export to ONNX is an extra")
pytest.importorskip("onnxscript", reason="the export to ONNX is an extra")

from onnx_cases import PRECISIONS, prepared, pytorch_answer, scenes, tiny_export

from transformers_fastvlm.export.onnx_files import javascript_template
from transformers_fastvlm.processing_fastvlm import chat_template_for

SCRIPTS = Path(__file__).parent / "javascript"
PACKAGES = Path(os.environ.get("FASTVLM_NODE_FOLDER", SCRIPTS))
PAGE = ROOT / "examples" / "browser"
CHROMIUM = shutil.which("chromium")
DTYPES = {"float32": "fp32", "float16": "fp16"}
ENOUGH_SECONDS = 1800

pytestmark = [
    pytest.mark.skipif(shutil.which("node") is None, reason="Node is not installed"),
    pytest.mark.skipif(
        not (PACKAGES / "node_modules" / "@huggingface" / "transformers").is_dir(),
        reason="run npm ci --ignore-scripts in tests/export/javascript",
    ),
]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the page's documentation makes it: page, packages, and the model as `model`."""
    folder = tmp_path_factory.mktemp("browser")
    for file in [*PAGE.iterdir(), *SCRIPTS.glob("*.mjs")]:
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
    (folder / "node_modules").symlink_to(PACKAGES / "node_modules")
    (folder / "model").symlink_to(tiny_export().directory)
    return folder


def node(folder: Path, script: str, *arguments: str) -> list[str]:
    """Run a script and return the lines it printed."""
    done = subprocess.run(
        ["node", script, *arguments], cwd=folder, capture_output=True, text=True, timeout=ENOUGH_SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def test_chat_templates_render_the_same(workplace: Path, tmp_path: Path) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    system = {"role": "system", "content": "Be brief."}
    question = {"role": "user", "content": "<image>\nWhat is it?"}
    parts = {"role": "user", "content": [{"type": "text", "text": "What is it?"}, {"type": "image"}]}
    answer = {"role": "assistant", "content": "A cat."}
    conversations = [[question], [system, parts, answer, {"role": "user", "content": "And now?"}], [question, answer]]
    cases, expected = [], []
    for kind in ("qwen2", "llama"):
        for number, messages in enumerate(conversations):
            cases.append([javascript_template(kind), messages, number < 2])
            rendered, _ = render_jinja_template(
                [messages], chat_template=chat_template_for(kind), add_generation_prompt=number < 2
            )
            expected += rendered
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    (line,) = node(workplace, "templates.mjs", str(tmp_path / "cases.json"))
    assert json.loads(line) == expected


@pytest.mark.parametrize("page", ["docs/export.md", "DIRECTORY/README.md"])
def test_shown_programs_run(tmp_path: Path, page: str) -> None:
    directory = tiny_export().directory
    (tmp_path / "node_modules").symlink_to(PACKAGES / "node_modules")
    for name in ("tiny-onnx", "DIRECTORY"):
        (tmp_path / name).symlink_to(directory)
    picture = Image.new("RGB", (256, 256), "red")
    file = directory / "README.md" if page.startswith("DIRECTORY") else ROOT / page
    (block,) = [block for block in blocks(file.read_text(encoding="utf-8")) if block.language == "js"]
    # Without loss, so that both see the same pixels, whatever the file is called.
    picture.save(tmp_path / re.findall(r"image\.(?:png|jpg)", block.code)[0], format="png")
    (tmp_path / "shown.mjs").write_text(block.code, encoding="utf-8")
    question = re.findall(r"<image>\\n(.*?)\"", block.code)[0]
    count = int(re.findall(r"max_new_tokens: (\d+)", block.code)[0])
    assert node(tmp_path, "shown.mjs") == [pytorch_answer(picture, question, count)[1]]


def write_cases(folder: Path, count: int, aspect: str = "any") -> tuple[Path, list[dict[str, Any]]]:
    """Write pictures, pixel values and a list of them; return its file and the list."""
    cases = []
    for number, (picture, question, answer) in enumerate(scenes(count, aspect)):
        inputs = prepared(picture, question)
        picture.save(folder / f"{number}.png")
        (folder / f"{number}.f32").write_bytes(inputs["pixel_values"].float().numpy().tobytes())
        cases.append(
            {
                "image": str(folder / f"{number}.png"),
                "question": question,
                "pixels": str(folder / f"{number}.f32"),
                "shape": list(inputs["pixel_values"].shape),
                "input_ids": inputs["input_ids"][0].tolist(),
                "answer": answer,
            }
        )
    (folder / "cases.json").write_text(json.dumps(cases))
    return folder / "cases.json", cases


def compare_in_node(workplace: Path, folder: Path, count: int) -> None:
    file, _ = write_cases(folder, count)
    lines = node(workplace, "run.mjs", str(tiny_export().directory), "fp32", str(file))
    for line, (picture, question, _) in zip(lines, scenes(count), strict=True):
        result = json.loads(line)
        tokens, text = pytorch_answer(picture, question)
        assert result["tokens"] == tokens
        assert result["text"] == text
        assert result["sameIds"]
        assert result["distance"] < 8, "its own preprocessing pads and shrinks as ours does, but for the filter"


def test_node_answers_as_pytorch(workplace: Path, tmp_path: Path) -> None:
    compare_in_node(workplace, tmp_path, 6)


@pytest.mark.soak
def test_node_answers_as_pytorch_on_200_scenes(workplace: Path, tmp_path: Path) -> None:
    compare_in_node(workplace, tmp_path, 200)


@pytest.mark.parametrize("precision", [name for name in PRECISIONS if name != "float32"])
def test_node_runs_every_precision(workplace: Path, tmp_path: Path, precision: str) -> None:
    file, cases = write_cases(tmp_path, 2)
    lines = node(workplace, "run.mjs", str(tiny_export().directory), DTYPES.get(precision, precision), str(file))
    assert len(lines) == len(cases)
    assert all(json.loads(line)["text"] for line in lines)


@pytest.mark.soak
@pytest.mark.parametrize("aspect", ["square", "oblong"])
def test_report_accuracy_through_its_own_preprocessing(workplace: Path, tmp_path: Path, aspect: str) -> None:
    file, cases = write_cases(tmp_path, 200, aspect)
    results = [json.loads(line) for line in node(workplace, "run.mjs", str(tiny_export().directory), "fp32", str(file))]
    ours, theirs = (
        100 * sum(result[key] == case["answer"] for result, case in zip(results, cases, strict=True)) / len(cases)
        for key in ("text", "own")
    )
    distance = sum(result["distance"] for result in results) / len(results)
    print(f"{aspect}: our pixel values {ours} %, its own {theirs} %, {distance:.2f} grey levels apart")
    assert theirs > ours - 10


class _Handler(http.server.SimpleHTTPRequestHandler):
    extensions_map = http.server.SimpleHTTPRequestHandler.extensions_map | {
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
    }

    def log_message(self, *arguments: Any) -> None:
        pass


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder on this machine and yield its address."""
    handler = functools.partial(_Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


ASK = """async ([bytes, shape, ids]) => {
  const { Tensor } = await import("./node_modules/@huggingface/transformers/dist/transformers.min.js");
  const { load } = await import("./fastvlm.js");
  const model = await load({ dtype: "fp32", device: "wasm" });
  const values = new Float32Array(Uint8Array.from(atob(bytes), (c) => c.charCodeAt(0)).buffer);
  const size = [1, ids.length];
  return await model.generate({
    pixel_values: new Tensor("float32", values, shape),
    input_ids: new Tensor("int64", BigInt64Array.from(ids, BigInt), size),
    attention_mask: new Tensor("int64", new BigInt64Array(ids.length).fill(1n), size),
  });
}"""


COUNT_ANSWERS = """() => {
  const status = document.getElementById("status");
  window.answers = 0;
  new MutationObserver(() => (window.answers += / s$/.test(status.textContent))).observe(status, { childList: true });
}"""


# Whether Stop could be pressed, and the other button's words, each time that changes.
WATCH_STOP = """() => {
  const stop = document.getElementById("stop");
  const ask = document.getElementById("ask");
  window.states = [];
  new MutationObserver(() => window.states.push([!stop.disabled, ask.innerText])).observe(stop, { attributes: true });
}"""


NO_ADAPTER = """Object.defineProperty(navigator, "gpu", { value: { requestAdapter: async () => null } });"""


@contextlib.contextmanager
def chromium(**context: Any) -> Iterator[Any]:
    """Open a page in a headless Chromium with a camera that needs no asking."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright drives the browser")
    with playwright.sync_playwright() as tools:
        browser = tools.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"],
        )
        try:
            page = browser.new_context(permissions=["camera"], **context).new_page()
            page.set_default_timeout(1000 * ENOUGH_SECONDS)
            yield page
        finally:
            browser.close()


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_the_page_in_chromium(workplace: Path, tmp_path: Path) -> None:
    _, cases = write_cases(tmp_path, 1)
    (picture, question, _), case = scenes(1)[0], cases[0]
    with served(workplace) as address, chromium(viewport={"width": 800, "height": 900}) as page:
        asked, problems = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(f"{address}/?dtype=fp32&device=wasm")
        page.wait_for_selector("body[data-ready]")

        pixels = base64.b64encode(Path(case["pixels"]).read_bytes()).decode()
        assert page.evaluate(ASK, [pixels, case["shape"], case["input_ids"]]) == pytorch_answer(picture, question)[1]

        page.fill("#question", question)
        page.set_input_files("#file", case["image"])
        page.wait_for_selector("body[data-view=image]")
        # The image waits for a question: nothing runs, and Ask is Ask.
        assert page.is_disabled("#stop") and page.inner_text("#answer") == ""
        assert page.inner_text("#ask") == "Ask" and "Ask a question" in page.inner_text("#status")
        page.evaluate(WATCH_STOP)
        page.click("#ask")
        page.wait_for_function("document.getElementById('stop').disabled && answer.textContent")
        assert page.evaluate("window.states") == [[True, "Ask"], [False, "Ask"]]  # the answer may take a blink
        assert page.get_attribute("#status", "data-kind") == ""
        page.screenshot(path=os.environ.get("FASTVLM_SCREENSHOT", str(tmp_path / "page.png")))

        page.evaluate(COUNT_ANSWERS)
        page.click("#camera")
        page.wait_for_function("document.body.dataset.view === 'camera' && video.videoWidth > 0")
        page.wait_for_function("window.answers >= 2 && answer.textContent")
        page.click("#stop")
        page.wait_for_function("document.getElementById('stop').disabled")
        page.click("#camera")
        assert page.get_attribute("body", "data-view") == "image" and page.is_disabled("#stop")
        assert problems == []
        assert all(url.startswith((address, "blob:", "data:")) for url in asked), asked


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_the_page_without_an_adapter_and_without_a_model(workplace: Path) -> None:
    with served(workplace) as address, chromium(viewport={"width": 900, "height": 500}) as page:
        page.add_init_script(NO_ADAPTER)
        page.goto(f"{address}/?dtype=fp32")
        page.wait_for_selector("body[data-ready]")
        assert page.inner_text("#status") == "Ready, on wasm."
        page.click("#ask")
        assert page.inner_text("#status").startswith("Choose an image first") and page.is_disabled("#stop")

        page.goto(f"{address}/?model=nowhere&device=wasm")
        page.wait_for_selector("#status[data-kind=error]")
        assert "could not be loaded" in page.inner_text("#status")
        box = page.locator("#status").bounding_box()
        assert box is not None and box["y"] + box["height"] < 500 and page.evaluate("window.scrollY") == 0
