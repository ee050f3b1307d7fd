# SPDX-License-Identifier: Apache-2.0
"""The page of answers: order, what is left out, and that nothing of a data set or a model gets into its markup."""

import base64
import hashlib
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from transformers_fastvlm.evaluation.page import Shown, write_page
from transformers_fastvlm.evaluation.results import EvaluationRun, Sample, TaskResult

NASTY = "<script>alert('x')</script>\"onload='x' & \x00\ud83d </article>"


class Page(HTMLParser):
    """Collects tags, texts and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.articles: list[dict[str, str | None]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "article":
            self.articles.append(dict(attrs))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def sample(at: int, score: float, task: str = "t", **changes: Any) -> Sample:
    fields: dict[str, Any] = {"question": f"question {at}", "answers": ("yes",), "given": "no", "images": ()}
    return Sample(task=task, doc_id=at, score=score, **fields | changes)


def run_of(*samples: Sample) -> EvaluationRun:
    tasks = {}
    for task in dict.fromkeys(one.task for one in samples):
        own = [one.score for one in samples if one.task == task]
        tasks[task] = TaskResult(metric="m", score=100 * sum(own) / len(own), count=len(own))
    return EvaluationRun(
        model="m",
        engine="e",
        dtype="d",
        settings={},
        versions={},
        tasks=tasks,
        seconds={"total": 1, "generate": 1},
        samples=samples,
    )


def page_of(tmp_path: Path, *samples: Sample, most: int = 50) -> tuple[Page, Shown, str]:
    shown = write_page({"x": (run_of(*samples), tmp_path)}, tmp_path / "page.html", most)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    return Page(text), shown, text


def test_wrong_ones_first(tmp_path: Path) -> None:
    scores = [1.0, 0.0, 0.6, 0.3, 1.0, 0.0]
    page, shown, text = page_of(tmp_path, *(sample(at, score) for at, score in enumerate(scores)))
    assert re.findall(r"question (\d)", text) == ["1", "5", "3", "2", "0", "4"]
    assert [article["data-state"] for article in page.articles] == ["wrong"] * 2 + ["partly"] * 2 + ["right"] * 2
    assert shown == Shown(6, 6) and "partly right 60 %" in re.sub(r"<[^>]*>", "", text)


def test_too_many_are_thinned_evenly_right_and_wrong(tmp_path: Path) -> None:
    samples = [sample(at, float(at % 4 == 0)) for at in range(40)]
    page, shown, text = page_of(tmp_path, *samples, sample(0, 1.0, "u"), most=8)
    assert shown == Shown(9, 41) and "9 of 41 questions" in text
    of_t = [article["data-state"] for article in page.articles if article["data-task"] == "0"]
    assert of_t == ["wrong"] * 4 + ["right"] * 4
    assert re.findall(r"question (\d+)", text)[:4] == ["1", "10", "21", "30"]
    few_right = [sample(at, float(at == 7)) for at in range(40)]
    page, _, _ = page_of(tmp_path, *few_right, most=8)
    assert [article["data-state"] for article in page.articles] == ["wrong"] * 7 + ["right"]
    with pytest.raises(ValueError, match="samples_a_task is 0"):
        page_of(tmp_path, samples[0], most=0)


def test_everything_is_escaped(tmp_path: Path) -> None:
    nasty = sample(0, 0.0, NASTY, question=NASTY, answers=(NASTY, NASTY, ""), given=NASTY)
    plain, _, _ = page_of(tmp_path, sample(0, 0.0, answers=("a", "b")))
    page, _, text = page_of(tmp_path, nasty)
    assert page.tags.count("script") == 1 and page.tags.count("article") == 1
    assert set(page.tags) <= set(plain.tags) | {"span"}
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "\x00" not in text and "alert('x')" not in text
    assert "".join(page.texts).count("<script>alert('x')</script>") >= 4
    assert "(2 times)" in text and "empty" in text


def test_the_policy_lets_only_the_pages_own_script_and_style_work(tmp_path: Path) -> None:
    page, _, text = page_of(tmp_path, sample(0, 1.0))
    policy = dict(page.attributes)["content"]
    found = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None and found is not None and "default-src 'none'" in found[1]
    for tag, directive in (("script", "script-src"), ("style", "style-src")):
        content = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.S)
        assert content is not None
        digest = base64.b64encode(hashlib.sha256(content[1].encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in found[1]
    assert not re.search(r"https?://|//[a-z]|@import|url\(", text)
    assert not re.search(r'<[^>]* style="', text)  # the policy would drop it


def test_images_are_in_the_page_and_small(tmp_path: Path) -> None:
    (tmp_path / "images" / "sub").mkdir(parents=True)
    Image.new("RGBA", (1600, 400), (255, 0, 0, 0)).save(tmp_path / "images" / "sub" / "wide.png")
    Image.new("L", (30, 20), 128).save(tmp_path / "images" / "small.png")
    page, _, text = page_of(tmp_path, sample(0, 1.0, images=("sub/wide.png", "small.png")))
    sources = re.findall(r'<img src="data:image/jpeg;base64,([^"]+)"', text)
    images = [Image.open(io.BytesIO(base64.b64decode(source))) for source in sources]
    assert [image.size for image in images] == [(640, 160), (30, 20)]
    assert min(images[0].convert("RGB").getpixel((5, 5))) > 240  # as the model sees it: on white
    assert ("alt", "image 2 of 2, t · 0") in page.attributes


@pytest.mark.parametrize("content", [None, b"", b"no picture"])
def test_bad_images_are_named_and_an_old_page_stays(tmp_path: Path, content: bytes | None) -> None:
    (tmp_path / "images").mkdir()
    if content is not None:
        (tmp_path / "images" / "bad.png").write_bytes(content)
    (tmp_path / "page.html").write_text("old")
    with pytest.raises(ValueError, match=r"bad\.png"):
        page_of(tmp_path, sample(0, 1.0, images=("bad.png",)))
    assert (tmp_path / "page.html").read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"images", "page.html"}


def test_several_runs_share_a_question(tmp_path: Path) -> None:
    one = run_of(sample(0, 1.0, given="yes"), sample(1, 0.0, given="no"), sample(2, 1.0))
    other = run_of(sample(0, 0.0, given="maybe"), sample(1, 0.0, given="no"), sample(2, 1.0, question="another"))
    write_page({"one": (one, tmp_path), "other": (other, tmp_path)}, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    page = Page(text)
    assert [(article["data-state"], "data-differ" in article) for article in page.articles] == [
        ("wrong", False),
        ("wrong", True),
        ("right", False),
        ("right", False),
    ]
    assert "Given by other" in text and "runs differ (1)" in text


def test_questions_whose_image_was_kept_come_first_and_others_say_so(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (30, 20)).save(tmp_path / "images" / "a.png")
    kept = [at for at in range(40) if at % 10 == 3]
    samples = [sample(at, 0.0, images=("a.png",) if at in kept else ()) for at in range(40)]
    _, _, text = page_of(tmp_path, *samples, most=4)
    assert re.findall(r"question (\d+)", text) == [str(at) for at in kept] and "stored no image" not in text
    _, _, text = page_of(tmp_path, *samples, most=6)
    assert text.count("stored no image") == 2 and text.count("<img src") == 4
    _, _, text = page_of(tmp_path, sample(0, 0.0))
    assert "stored no image" not in text  # a task without images
