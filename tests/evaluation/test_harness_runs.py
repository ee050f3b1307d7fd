# SPDX-License-Identifier: Apache-2.0
"""Whole evaluations of real models: the same accuracy as without the harness, and the same table after kills."""

import json
import random
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness_running import HELD_OUT_SERIES, ScriptedEngine, fastvlm, finish, kill_after, write_scenes
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from transformers_fastvlm.checkpoints import tiny_checkpoint
from transformers_fastvlm.data.scenes import SceneDataset
from transformers_fastvlm.engines.base import Sampling
from transformers_fastvlm.evaluation.eval_run import JOURNAL, LOG, EvaluationOptions, evaluate
from transformers_fastvlm.evaluation.own_data import OwnData
from transformers_fastvlm.evaluation.results import EvaluationRun, read_run

pytest.importorskip("lmms_eval", reason="the harness is lmms-eval")
pytestmark = pytest.mark.filterwarnings("default")

FLOAT32 = {"dtype": "float32", "device": "cpu"}


def table(run: EvaluationRun) -> Any:
    """Return all of a run that must not depend on kills."""
    return run.tasks, sorted(run.samples, key=lambda sample: sample.doc_id)


@torch.inference_mode()
def direct_answers(count: int, batch: int) -> list[tuple[str, str]]:
    """Return the right and the given answer to each scene, as benchmarks/tiny_accuracy.py counts them."""
    model = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint(), dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(tiny_checkpoint())
    scenes = SceneDataset(count, seed=HELD_OUT_SERIES, task="questions", aspect="any")
    pairs = []
    for start in range(0, count, batch):
        rows = [scenes[index] for index in range(start, min(count, start + batch))]
        texts = [
            processor.apply_chat_template(row["messages"][:-1], add_generation_prompt=True, tokenize=False)
            for row in rows
        ]
        inputs = processor(
            text=texts,
            images=[row["images"] for row in rows],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        tokens = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        given = processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        pairs += [(row["messages"][-1]["content"], answer) for row, answer in zip(rows, given, strict=True)]
    return pairs


def own(data: Path, **changes: Any) -> EvaluationOptions:
    chosen: dict[str, Any] = {"data": data, "max_new_tokens": 16, "engine_options": FLOAT32, "images": False}
    return EvaluationOptions(**(chosen | {"time_first_token": False} | changes))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes"), 24)


@pytest.fixture(scope="module")
def undisturbed(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> EvaluationRun:
    return evaluate(str(tiny_checkpoint()), tmp_path_factory.mktemp("undisturbed"), own(scenes, batch_size=5))


def test_the_tiny_model_is_as_accurate_as_without_the_harness(undisturbed: EvaluationRun) -> None:
    pairs = direct_answers(24, 8)
    ordered = sorted(undisturbed.samples, key=lambda sample: sample.doc_id)
    assert [(sample.answers[0], sample.given) for sample in ordered] == pairs
    assert undisturbed.tasks["scenes"].score == pytest.approx(100 * sum(a == b for a, b in pairs) / 24)
    assert undisturbed.dtype == "float32"


def test_an_onnx_export_answers_the_same(scenes: Path, undisturbed: EvaluationRun, tmp_path: Path) -> None:
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package, reason="the export to ONNX is an extra")
    finish(fastvlm("export", "onnx", "tiny", tmp_path / "onnx", "--precision", "float32"))
    command = ("eval", tmp_path / "onnx", "--engine", "onnx", "--data", scenes, "--out", tmp_path / "out", "--no-page")
    finish(fastvlm(*command, "--max-new-tokens", 16))
    run = read_run(tmp_path / "out")
    assert (run.engine, run.dtype) == ("onnx", "float32")
    assert table(run) == table(undisturbed)


def test_killed_after_some_answers_and_started_again_the_table_is_the_same(
    scenes: Path, undisturbed: EvaluationRun, tmp_path: Path
) -> None:
    command = ("eval", "tiny", "--data", scenes, "--out", tmp_path / "out", "--batch", 5, "--dtype", "float32")
    command = (*command, "--max-new-tokens", 16, "--device", "cpu", "--no-page", "--no-first-token")
    lines = random.randrange(1, 5)
    kill_after(fastvlm(*command), tmp_path / "out" / JOURNAL, lines)
    before = (tmp_path / "out" / JOURNAL).read_bytes()
    assert before.count(b"\n") >= lines and not (tmp_path / "out" / "results.json").exists()
    printed = finish(fastvlm(*command))
    assert (tmp_path / "out" / JOURNAL).read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    assert table(read_run(tmp_path / "out")) == table(undisturbed)
    assert printed == f"scenes  {undisturbed.tasks['scenes'].score:6.2f} %  exact, 24 rows\n"


def test_answers_of_another_checkpoint_or_with_other_settings_are_not_used(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines: list[ScriptedEngine] = []

    def load(name: str, model: str, **options: Any) -> ScriptedEngine:
        engines.append(ScriptedEngine(lambda text: "red"))
        return engines[-1]

    monkeypatch.setattr("transformers_fastvlm.engines.load_engine", load)
    model = Path(shutil.copytree(tiny_checkpoint(), tmp_path / "model"))

    def asked(**changes: Any) -> int:
        evaluate(str(model), tmp_path / "out", own(scenes, engine="scripted", limit=6, **changes))
        return len(engines[-1].asked)

    assert asked() == 6
    assert asked() == 0
    assert asked(batch_size=3) == 0, "how many are answered together changes nothing"
    assert asked(engine_options={"dtype": "bfloat16"}) == 6
    assert asked(suffix="Say one word.") == 6
    assert asked(max_new_tokens=9) == 6
    content = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps(content | {"top_k": 3}))
    assert asked() == 6
    read: list[tuple[int, int]] = []
    evaluate(
        str(model),
        tmp_path / "out",
        own(scenes, engine="scripted", limit=8),
        reading=lambda *bytes_of: read.append(bytes_of),
    )
    assert read[-1][0] == read[-1][1] > (model / "model.safetensors").stat().st_size
    assert len(engines[-1].asked) == 2, "more rows of the same need only what is new"


def test_several_images_and_none_in_one_batch(tmp_path: Path, checkpoint: Callable[[str], Path]) -> None:
    for colour in ("red", "blue"):
        Image.new("RGB", (70, 40), colour).save(tmp_path / f"{colour}.png")
    rows = [
        {"images": ["red.png", "blue.png"], "question": "Which two?", "answer": "x"},
        {
            "image": "blue.png",
            "question": "Which one, and is a literal <image> in the question a picture?",
            "answer": "x",
        },
        {"question": "None?", "answer": "x"},
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = evaluate(
        str(checkpoint("qwen2_tied")),
        tmp_path / "out",
        own(tmp_path / "data.jsonl", images=True, max_new_tokens=4, time_first_token=True),
    )
    assert [len(sample.images) for sample in run.samples] == [2, 1, 0]
    assert all((tmp_path / "out" / "images" / name).is_file() for sample in run.samples for name in sample.images)
    assert run.time_to_first_token is not None and run.time_to_first_token > 0
    assert 0 < run.seconds["generate"] < run.seconds["total"]
    journal = (tmp_path / "out" / JOURNAL).read_text().splitlines()
    assert sum(len(json.loads(line)) for line in journal[1:]) == 3


def test_an_image_that_cannot_be_read_stops_the_run_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = ScriptedEngine(lambda text: "red")
    monkeypatch.setattr("transformers_fastvlm.engines.load_engine", lambda name, model, **options: engine)
    data = write_scenes(tmp_path / "data", 4)
    (data.parent / "pictures" / "2.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"task scenes, row 2 has an image that cannot be read: .*pictures/2.png"):
        evaluate(str(tiny_checkpoint()), tmp_path / "out", own(data, engine="scripted", batch_size=1))
    assert not (tmp_path / "out" / "results.json").exists()


def test_images_are_opened_while_the_model_answers_but_only_a_few(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[int] = []
    waiting: list[int] = []
    answered = [0]
    really = OwnData.open_images

    def open_images(data: OwnData, row: int) -> list[Image.Image]:
        opened.append(row)
        waiting.append(len(opened) - answered[0])
        return really(data, row)

    monkeypatch.setattr(OwnData, "open_images", open_images)
    options = own(scenes, batch_size=5)
    evaluate(str(tiny_checkpoint()), tmp_path, options, progress=lambda done, total: answered.__setitem__(0, done))
    assert sorted(opened) == list(range(24))
    assert 5 < max(waiting) <= 10, "more than are answered, but two batches at most"
    assert not any(thread.name.startswith("fastvlm") for thread in threading.enumerate())


def test_the_log_has_what_the_evaluation_prints_and_nothing_of_other_threads(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def speak(who: str) -> None:
        from loguru import logger

        print(f"{who} prints")
        print(f"{who} warns", file=sys.stderr)
        logger.info(f"{who} logs")

    class Speaking(ScriptedEngine):
        def stream(self, conversation: Any, sampling: Sampling) -> Any:
            speak("the evaluation")
            other = threading.Thread(target=speak, args=("another thread",))
            other.start()
            other.join()
            return super().stream(conversation, sampling)

    monkeypatch.setattr("transformers_fastvlm.engines.load_engine", lambda *a, **options: Speaking(lambda text: "red"))
    streams = sys.stdout, sys.stderr
    evaluate(str(tiny_checkpoint()), tmp_path / "out", own(scenes, engine="scripted"))
    assert (sys.stdout, sys.stderr) == streams
    log, shown = (tmp_path / "out" / LOG).read_text(), capsys.readouterr()
    assert all(f"the evaluation {done}" in log for done in ("prints", "warns", "logs"))
    assert "another thread" not in log
    assert "another thread prints" in shown.out and "another thread warns" in shown.err
    assert "the evaluation" not in shown.out + shown.err.replace("the evaluation logs", "")


def test_a_question_that_fills_the_context_is_named(tmp_path: Path, checkpoint: Callable[[str], Path]) -> None:
    rows = [{"question": "Short?", "answer": "x"}, {"question": "long " * 40_000, "answer": "x"}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"task data, row 1: .* fills the (model's )?context"):
        evaluate(str(checkpoint("qwen2_tied")), tmp_path / "out", own(tmp_path / "data.jsonl"))


@pytest.mark.soak
def test_the_tiny_model_is_as_accurate_on_500_scenes(tmp_path: Path) -> None:
    run = evaluate(str(tiny_checkpoint()), tmp_path / "out", own(write_scenes(tmp_path / "data", 500)))
    pairs = direct_answers(500, 50)
    assert run.tasks["scenes"].score == pytest.approx(100 * sum(a == b for a, b in pairs) / 500)
    assert [sample.given for sample in run.samples] == [given for _, given in pairs]


@pytest.mark.soak
def test_killed_several_times_the_table_is_the_same(tmp_path: Path) -> None:
    data = write_scenes(tmp_path / "data", 120)
    command = (
        "eval",
        "tiny",
        "--data",
        data,
        "--batch",
        4,
        "--dtype",
        "float32",
        "--device",
        "cpu",
        "--no-first-token",
    )
    finish(fastvlm(*command, "--out", tmp_path / "whole"))
    out = tmp_path / "out"
    for lines in sorted(random.sample(range(1, 30), 5)):
        kill_after(fastvlm(*command, "--out", out), out / JOURNAL, lines)
    finish(fastvlm(*command, "--out", out))
    assert table(read_run(out)) == table(read_run(tmp_path / "whole"))
