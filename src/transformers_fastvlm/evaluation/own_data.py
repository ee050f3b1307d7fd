# SPDX-License-Identifier: Apache-2.0
"""Custom questions: a JSONL or JSON file, Parquet, or a data set saved by Hugging Face's `datasets`."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..data.folders import ALL_SPLITS
from ..data.image_files import ImageFolder, image_bytes
from ..data.row_fields import images_of, is_absent
from ..data.row_sources import open_part
from ..data.rows import Rows
from ..data.sample_errors import ImageError, SampleError, shortened
from ..images.read_options import ReadOptions
from .metrics import check_answers, score

__all__ = ["OwnData", "own_task", "read_own_data"]

_EXPECTED = 'expected {"image": PATH, "question": TEXT, "answer": TEXT}, or lists as "images" and "answers"'


@dataclass(frozen=True)
class OwnData:
    """Questions with their reference answers.

    Attributes:
        name: of the resulting task.
        documents: one for each row, with its number `row`, `question`, `answers`, and `stamp`, which changes when an
            image of the row changes.
        rows: the unmodified rows of the file.
        images: opens the images that rows name.
    """

    name: str
    documents: list[dict[str, Any]]
    rows: Rows
    images: ImageFolder

    def open_images(self, row: int) -> list[Image.Image]:
        """Return the images of a row, decoded.

        Raises:
            ValueError: an image cannot be read; the message names the row.
        """
        try:
            return [self.images.open(source) for source in images_of(self.rows[row])]
        except SampleError as error:
            raise type(error)(error.reason, self.rows.place(row)) from error


def read_own_data(
    path: str | os.PathLike[str],
    metric: str,
    limit: int | None = None,
    reading: ReadOptions = ReadOptions(),  # noqa: B008 - frozen
) -> OwnData:
    """Read questions and check them before a model is loaded.

    A row has "question", "answer" or "answers", and "image" or "images". Images are paths relative to the data's folder
    and inside it, or, in Parquet and saved data sets, embedded images. A row without images is a text question.

    Args:
        path: a .jsonl, .json or .parquet file, or a folder with such files or from `save_to_disk`.
        metric: scores the answers; see `METRICS`.
        limit: number of rows to read from the start; None for all.
        reading: how images are read.

    Raises:
        ValueError: a row has no question or no answer, or its image file does not exist; the message names the row.
        OSError: the file does not exist.
        ImportError: `datasets` is not installed.
    """
    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(f"there is no file or folder {str(path)!r}; expected the data to evaluate on.")
    if not file.is_dir() and file.suffix.lower() not in (".jsonl", ".json", ".parquet"):
        raise ValueError(
            f"the data are {str(path)!r}; expected a .jsonl, .json or .parquet file, or a folder with such files or "
            "one that save_to_disk wrote."
        )
    part = open_part(file, None, ALL_SPLITS, None, False, reading)
    rows, images = part.rows, part.images
    if rows.damage is not None:
        raise rows.damage
    count = len(rows) if limit is None else min(limit, len(rows))
    if not count:
        raise ValueError(f"{file} has no rows; {_EXPECTED} in each.")
    documents = []
    for number in range(count):
        try:
            row = rows[number]
            question = row.get("question")
            if not isinstance(question, str) or not question.strip():
                raise SampleError(f"question is {shortened(question)}; {_EXPECTED}.")
            stamp = json.dumps([_stamp(source, images) for source in images_of(row)])
            answers = _answers(row, metric)
            documents.append({"row": number, "question": question, "answers": answers, "stamp": stamp})
        except SampleError as error:
            raise error if error.place else type(error)(error.reason, rows.place(number)) from error
        except ValueError as error:
            raise SampleError(str(error), rows.place(number)) from error
    name = re.sub(r"[^\w.+-]+", "_", file.stem if file.is_file() else file.resolve().name) or "own"
    return OwnData(name, documents, rows, images)


def own_task(data: OwnData, metric: str, suffix: str | None, max_new_tokens: int) -> Any:
    """Return a task of lmms-eval that asks the questions of `data`.

    Args:
        data: the questions.
        metric: see `METRICS`.
        suffix: a line added to each question, such as "Answer with a single word."
        max_new_tokens: longest answer, in tokens.
    """
    from datasets import Dataset, DatasetDict
    from lmms_eval.api.task import ConfigurableMessagesTask

    class OwnTask(ConfigurableMessagesTask):
        def download(self, dataset_kwargs: Any = None) -> None:
            self.dataset = self.dataset_no_image = DatasetDict({"test": Dataset.from_list(data.documents)})

    def ask(document: Mapping[str, Any]) -> str:
        return "\n".join(part for part in (document["question"], suffix) if part)

    def judge(document: Mapping[str, Any], results: list[str]) -> dict[str, float]:
        return {metric: score(metric, document["answers"], results[0])}

    config = {
        "task": data.name,
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_visual": lambda document: data.open_images(document["row"]),
        "doc_to_text": ask,
        "doc_to_target": "answers",
        "process_results": judge,
        "generation_kwargs": {"max_new_tokens": max_new_tokens, "until": []},
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True}],
    }
    return OwnTask(config=config, model_name="fastvlm")


def _stamp(source: Any, images: ImageFolder) -> list[Any]:
    """Return a stamp that changes when the image changes: a file's size and time, or a digest of embedded bytes.

    Raises:
        SampleError: the path is outside the data's folder, or the file does not exist.
    """
    if isinstance(source, Mapping):
        if (content := source.get("bytes")) is not None:
            return [hashlib.sha256(image_bytes(content, "the image")).hexdigest()]
        source = source.get("path")
    if not isinstance(source, str):
        raise SampleError(f"an image is {shortened(source)} ({type(source).__name__}); {_EXPECTED}.")
    path = images._path_of(source)
    try:
        found = os.stat(path)
    except OSError as error:
        raise ImageError(f"the image {shortened(source)} cannot be read: {error.strerror}, {path!r}.") from error
    return [source, found.st_size, found.st_mtime_ns]


def _answers(row: Mapping[str, Any], metric: str) -> list[str]:
    found = row.get("answer") if row.get("answers") is None else row["answers"]
    several = found if isinstance(found, list) else [found]
    if not several or any(is_absent(answer) or isinstance(answer, bool | dict | list) for answer in several):
        raise SampleError(f"the answer is {shortened(found)}; {_EXPECTED}.")
    answers = [str(answer) for answer in several]
    check_answers(metric, answers)
    return answers
