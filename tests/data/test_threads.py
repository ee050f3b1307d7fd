# SPDX-License-Identifier: Apache-2.0
"""What threads may share: rows, collators, and processors whose conversations are rendered with masks."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from transformers_fastvlm import FastVLMProcessor
from transformers_fastvlm.conversations import RENDERING, render_with_spans
from transformers_fastvlm.data import FastVLMDataCollator
from transformers_fastvlm.data.json_rows import JsonRows

THREADS = 6


@pytest.fixture(autouse=True)
def switching() -> Iterator[None]:
    """Let threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def chat(turns: int, words: int) -> list[dict[str, str]]:
    said = " ".join(["blue"] * words)
    return [
        {"role": ("user", "assistant")[index % 2], "content": ("<image>\n" if index == 0 else "") + f"{said} {index}"}
        for index in range(2 * turns)
    ]


@pytest.mark.parametrize("masks_too", [False, True])
def test_labels_and_masks(masks_too: bool, checkpoint: Callable[[str], Path]) -> None:
    red = Image.new("RGB", (32, 32), "red")
    processors = [FastVLMProcessor.from_pretrained(checkpoint("qwen2_tied")) for _ in range(2)]
    collators = [FastVLMDataCollator(processor) for processor in processors]
    chats = [chat(1 + number % 4, 1 + 7 * number % 23) for number in range(24)]

    def labels(number: int) -> torch.Tensor:
        sample = {"messages": chats[number], "images": [red]}
        return collators[number % 2]([sample, {"messages": chat(1, 3), "images": [red]}])["labels"]

    def mask(number: int) -> torch.Tensor:
        options: Any = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        pair = [chats[number], chat(1, 3)]
        made = processors[number % 2].apply_chat_template(
            pair, **options, return_tensors="pt", processor_kwargs={"images": [red, red], "padding": True}
        )
        return torch.as_tensor(made["assistant_masks"])

    works = [(labels, number) for number in range(24)] * 3
    if masks_too:
        works += [(mask, number) for number in range(24)]
        works = works[::5] + works[1::5] + works[2::5] + works[3::5] + works[4::5]
    expected = {work: work[0](work[1]) for work in dict.fromkeys(works)}
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(lambda work: work[0](work[1]), works))
    wrong = [number for number, work in enumerate(works) if not torch.equal(found[number], expected[work])]
    assert wrong == []


class Watched(os.PathLike[str]):
    """A path that notes, when it is opened, whether another thread could render meanwhile."""

    def __init__(self, path: Path) -> None:
        self.path, self.free = path, False

    def __fspath__(self) -> str:
        def render() -> bool:
            free = RENDERING.acquire(blocking=False)
            if free:
                RENDERING.release()
            return free

        with ThreadPoolExecutor(1) as pool:
            self.free = pool.submit(render).result()
        return str(self.path)


def test_images_are_decoded_while_others_render(processor: FastVLMProcessor, golden: Path) -> None:
    image = Watched(golden / "images" / "square_rgb.png")
    content = [{"type": "image", "path": image}, {"type": "text", "text": "What?"}]
    chat = [{"role": "user", "content": content}, {"role": "assistant", "content": "A square."}]
    processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    assert image.free


@pytest.mark.parametrize("end", ["", "\n", "\n\n", "  ", "\n  ", "x\n  "])
def test_the_text_is_that_of_the_template(end: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    template = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}|{% endfor %}" + end
    chats = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "bc"}]]
    texts, spans = render_with_spans(chats, template)
    plain, _ = render_jinja_template(conversations=chats, chat_template=template)
    assert (texts, spans) == (plain, [[(0, 1), (2, 4)]])


@pytest.mark.parametrize("pread", [True, False])
def test_rows(tmp_path: Path, pread: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not pread:
        monkeypatch.delattr("os.pread")
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"id": number, "text": "x" * (number % 97)}) + "\n" for number in range(500)))
    rows = JsonRows(file)

    def read(start: int) -> list[int]:
        return [number for number in range(start, 500, 3) if rows[number]["id"] != number]

    with ThreadPoolExecutor(THREADS) as pool:
        assert list(pool.map(read, [0, 1, 2] * 4)) == [[]] * 12


def test_rows_are_silent_at_the_end_of_a_program(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"id": 1}\n')
    path = str(tmp_path / "rows.jsonl")
    code = f"from transformers_fastvlm.data.json_rows import JsonRows; rows = JsonRows({path!r}); rows[0]"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
