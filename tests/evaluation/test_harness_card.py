# SPDX-License-Identifier: Apache-2.0
"""The eleven tasks of the model card, driven by lmms-eval with small data sets of the same columns as the real ones.

The tasks are lmms-eval's own, all but where their data lie; the answers are given, so that the scores are known.
"""

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from harness_running import ScriptedEngine
from PIL import Image

from transformers_fastvlm.checkpoints import tiny_checkpoint
from transformers_fastvlm.checkpoints.published import MODEL_CARD_TASKS
from transformers_fastvlm.evaluation.eval_run import EvaluationOptions, evaluate
from transformers_fastvlm.evaluation.results import read_run
from transformers_fastvlm.evaluation.tasks import CARD_METRICS, expand

pytest.importorskip("lmms_eval", reason="the tasks are lmms-eval's")
pytestmark = pytest.mark.filterwarnings("default")

LETTER = "Answer with the option's letter from the given choices directly."
PHRASE = "Answer the question using a single word or phrase."
WORD = "Answer the question with a single word."

RED, BLUE = (Image.new("RGB", (40, 30), colour) for colour in ("red", "blue"))
PEOPLE = ["red"] * 2 + ["blue"] * 8


def choices(question: str, answer: str) -> dict[str, Any]:
    options = dict(zip(("choice_a", "choice_b", "choice_c", "choice_d"), ("cat", "dog", "cow", "fox"), strict=True))
    return {"question": question, **options, "answer": answer}


def people() -> list[dict[str, Any]]:
    return [{"answer": word, "answer_confidence": "yes", "answer_id": at} for at, word in enumerate(PEOPLE)]


# Of each task: how the prompt ends, rows, and for each row what the model says and what that is worth.
TASKS: dict[str, tuple[str, list[dict[str, Any]], list[tuple[str, float]]]] = {
    "ai2d": (
        LETTER,
        [{"question": f"ai2d {n}?", "options": ["cat", "dog", "cow", "fox"], "answer": "1"} for n in range(5)],
        [("B", 1), ("B. dog", 1), ("b", 1), ("C", 0), ("dog", 0)],
    ),
    "scienceqa_img": (
        LETTER,
        [{"question": f"sqa {n}?", "hint": "", "choices": ["cat", "dog"], "answer": 1} for n in range(4)],
        [("B", 1), ("b", 1), ("B. dog", 1), ("The answer is B", 0)],
    ),
    "mmmu_val": (
        "",  # that of multiple choice and of open questions differ: see below
        [
            {
                "id": f"validation_Art_{n}",
                "question": f"mmmu {n} <image 1> or <image 2>?" if n == 2 else f"mmmu {n} <image 1>?",
                "options": "[]" if n == 3 else "['cat', 'dog']",
                "question_type": "open" if n == 3 else "multiple-choice",
                "answer": "42" if n == 3 else "B",
                "image_1": RED,
                "image_2": BLUE,
            }
            for n in range(4)
        ],
        [("B", 1), ("The answer is (A).", 0), ("B", 1), ("It is 42.", 1)],
    ),
    "vqav2_val": (
        PHRASE,
        [{"question": f"vqa {n}?", "question_id": n, "answers": people()} for n in range(3)],
        [("Blue", 1), ("a red", 0.6), ("green", 0)],
    ),
    "chartqa": (
        WORD,
        [
            {"question": f"chart {n}?", "answer": answer, "type": "human_test" if n % 2 else "augmented_test"}
            for n, answer in enumerate(("100", "100", "50%", "Yes", "10 km"))
        ],
        [("104", 1), ("106", 0), ("0.5", 1), ("yes", 1), ("10", 0)],
    ),
    "textvqa_val": (
        PHRASE,
        [{"question": f"text {n}?", "question_id": n, "answers": PEOPLE} for n in range(3)],
        [("blue", 1), ("red", 0.6), ("", 0)],
    ),
    "infovqa_val": (
        PHRASE,
        [{"question": f"info {n}?", "questionId": str(n), "answers": ["hello"]} for n in range(3)],
        [("Hello", 1), ("hallo", 0.8), ("world", 0)],
    ),
    "docvqa_val": (
        PHRASE,
        [{"question": f"doc {n}?", "questionId": str(n), "answers": ["1 km", "1000 m"]} for n in range(4)],
        [("1000 m", 1), ("1 km", 1), ("1 mm", 0.75), ("", 0)],
    ),
    "ocrbench": (
        "",
        [
            {
                "question": f"ocr {n}?",
                "answer": ["STOP", "HALT"],
                "dataset": "some",
                "question_type": "Doc-oriented VQA",
            }
            for n in range(3)
        ],
        [("It says stop.", 1), ("halt", 1), ("sto", 0)],
    ),
    "realworldqa": (
        "",
        [{"question": f"real {n}?", "answer": answer} for n, answer in enumerate(("A", "A", "Downhill", "3"))],
        [("A. left", 1), ("The answer is B", 0), ("downhill.", 1), ("three", 0)],
    ),
    "seedbench": (
        LETTER,
        [choices(f"seed {n}?", "B") | {"data_type": "image", "question_id": str(n)} for n in range(3)]
        + [choices("seed 3?", "B") | {"data_type": "video", "question_id": "3"}],
        [("B", 1), ("b. dog", 1), ("The dog", 0)],
    ),
}


def local_tasks(folder: Path) -> Path:
    """Write the tasks' data, and YAML files that are lmms-eval's but for the data's place."""
    import datasets

    (folder / "yaml").mkdir(parents=True)
    for (name, (_, rows, _)), path in zip(TASKS.items(), expand(TASKS).values(), strict=True):
        columns = {key: [row[key] for row in rows] for key in rows[0]}
        if name != "mmmu_val":
            columns["image"] = [[RED, BLUE] if name == "seedbench" else RED for _ in rows]
        dataset = datasets.Dataset.from_dict(columns)
        dataset.to_parquet(folder / f"{name}.parquet")
        split = (
            "validation" if name in ("mmmu_val", "vqav2_val", "textvqa_val", "infovqa_val", "docvqa_val") else "test"
        )
        place = {"data_files": {split: str(folder / f"{name}.parquet")}, "cache_dir": str(folder / "cache")}
        (folder / "yaml" / f"{name}.yaml").write_text(
            f"include: {path}\ntask: {name}\ndataset_path: parquet\ndataset_name: null\n"
            f"dataset_kwargs: {json.dumps(place)}\n"
        )
    return folder / "yaml"


def test_all_eleven_tasks_score_what_was_worked_out_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        row["question"].split("?")[0].split(" <")[0]: says[0]
        for _, rows, said in TASKS.values()
        for row, says in zip(rows, said, strict=False)
    }

    def say(text: str) -> str:
        (found,) = [answer for words, answer in given.items() if words in text.lower()]
        return found

    engine = ScriptedEngine(say)
    monkeypatch.setattr("transformers_fastvlm.engines.load_engine", lambda name, model, **options: engine)
    include = local_tasks(tmp_path / "data")
    options = EvaluationOptions(
        tasks=("card",), include=include, engine="scripted", batch_size=4, images=True, time_first_token=False
    )
    run = evaluate(str(tiny_checkpoint()), tmp_path / "out", options)

    assert list(run.tasks) == list(MODEL_CARD_TASKS) == list(CARD_METRICS)
    assert read_run(tmp_path / "out") == run
    for name, (_, _, said) in TASKS.items():
        samples = run.samples_of(name)
        assert [(s.given, s.score) for s in samples] == [(text, pytest.approx(worth)) for text, worth in said], name
        expected = 100 * statistics.fmean(worth for _, worth in said)
        assert run.tasks[name].score == pytest.approx(expected, abs=1e-3), name
        assert (run.tasks[name].metric, run.tasks[name].count) == (CARD_METRICS[name], len(said))
        assert all((tmp_path / "out" / "images" / image).is_file() for s in samples for image in s.images)
        assert all(s.images for s in samples)
    assert run.tasks["ocrbench"].raw == 2
    # What counts as right is readable, whatever the task calls it.
    shown = {name: run.samples_of(name)[0].answers for name in TASKS}
    assert shown["vqav2_val"] == shown["textvqa_val"] == ("red", "blue")
    assert shown["ai2d"] == shown["scienceqa_img"] == shown["mmmu_val"] == shown["seedbench"] == ("B",)
    assert (shown["docvqa_val"], shown["chartqa"]) == (("1 km", "1000 m"), ("100",))

    # The protocol of the card: each task's words, and its images before them.
    asked = {text.split("?")[0].lower(): (text, images, limit) for text, images, limit in engine.asked}
    assert len(asked) == len(engine.asked) == sum(task.count for task in run.tasks.values())
    for name, (suffix, rows, _) in TASKS.items():
        if name != "mmmu_val":
            text, images, _ = asked[rows[0]["question"].split("?")[0].lower()]
            assert text.endswith(f"\n{suffix}" if suffix else rows[0]["question"]), (name, text)
            assert len(images) == (2 if name == "seedbench" else 1)
    mmmu = [(text, images) for text, images, _ in engine.asked if text.startswith("mmmu")]
    assert sorted(len(images) for _, images in mmmu) == [1, 1, 1, 2]
    assert [text.endswith(PHRASE) for text, _ in sorted(mmmu, key=lambda one: one[0])] == [False, False, False, True]
    assert all(text.endswith((PHRASE, LETTER)) and "<image" not in text for text, _ in mmmu)
    assert asked["chart 0"][2] == 16 and asked["doc 0"][2] == 32
