# SPDX-License-Identifier: Apache-2.0
"""lmms-eval's tasks: the eleven of the model card, and any other by name."""

import contextlib
import difflib
import functools
import os
import re
import socket
import urllib.parse
import urllib.request
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from huggingface_hub import get_token
from PIL import ImageFile

from .._optional import needs

__all__ = ["CARD_METRICS", "EXTRA", "expand", "import_harness", "load_task", "main_metric", "right_answers"]

EXTRA = 'pip install "transformers-fastvlm[eval]"'

_TASK = re.compile(r"^task:[ \t]*[\"']?([\w.+-]+)[\"']?[ \t]*(?:#.*)?$", re.MULTILINE)
_GROUP = re.compile(r"^group:[ \t]*[\"']?([\w.+-]+)[\"']?[ \t]*(?:#.*)?$", re.MULTILINE)
_ANSWERS = ("answers", "answer")
_SUBMISSION = "submission"


CARD_METRICS = {
    "ai2d": "exact_match",
    "scienceqa_img": "exact_match",
    "mmmu_val": "mmmu_acc",
    "vqav2_val": "exact_match",
    "chartqa": "relaxed_overall",
    "textvqa_val": "exact_match",
    "infovqa_val": "anls",
    "docvqa_val": "anls",
    "ocrbench": "ocrbench_accuracy",
    "realworldqa": "exact_match",
    "seedbench": "seed_image",
}
"""The metric of each of the model card's eleven tasks, by lmms-eval's task name; `card` selects these tasks."""


def import_harness() -> None:
    """Import lmms-eval without its side effects on the process.

    Raises:
        ImportError: lmms-eval is not installed, or is incompatible with the version of another package.
    """
    truncated = ImageFile.LOAD_TRUNCATED_IMAGES
    # The import replaces loguru's handlers, turns warnings off, and lets Pillow read truncated images.
    with needs("lmms-eval", "fastvlm eval", EXTRA), warnings.catch_warnings(), contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError):
            from loguru import logger

            stack.enter_context(mock.patch.multiple(logger, remove=_nothing, add=_nothing))
        try:
            import lmms_eval.evaluator  # noqa: F401
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = truncated


def _nothing(*arguments: Any, **options: Any) -> None:
    """Do nothing, in place of loguru's functions."""


def expand(names: Sequence[str], include: str | os.PathLike[str] | None = None) -> dict[str, Path]:
    """Return the YAML files of tasks by name; groups and `card` are expanded into their tasks.

    Args:
        names: of tasks, of lmms-eval's groups, or "card".
        include: a folder with YAML files of further tasks.

    Raises:
        ValueError: a task is unknown; the message lists similar names.
        ImportError: lmms-eval is not installed.
    """
    tasks, groups = _index(None if include is None else str(include))
    found: dict[str, Path] = {}

    def add(name: str) -> None:
        if name in tasks:
            found[name] = tasks[name]
        elif name == "card":
            for member in CARD_METRICS:
                add(member)
        elif name in groups:
            for member in _members(groups[name]):
                add(member)
        else:
            near = difflib.get_close_matches(name, ["card", *tasks, *groups], n=4, cutoff=0.5)
            hint = f"Similar names: {', '.join(near)}." if near else "There is no similar name."
            raise ValueError(f"unknown task {name!r}. {hint} `card` selects the model card's eleven tasks.")

    for name in names:
        add(name)
    if not found:
        raise ValueError("no tasks were given; expected names of lmms-eval's tasks, or card.")
    return found


def load_task(name: str, path: Path) -> Any:
    """Return one of lmms-eval's tasks with its data.

    SEED-Bench is restricted to the questions about images, as on the card.

    Raises:
        ValueError: the data set has no answers or cannot be loaded, or the task does not use generate_until.
    """
    import_harness()
    from lmms_eval.api.task import ConfigurableMessagesTask
    from lmms_eval.utils import load_yaml_config

    config = load_yaml_config(str(path), mode="full")
    if "class" in config or config.get("output_type", "generate_until") != "generate_until":
        kind = "its own class" if "class" in config else f"output_type {config['output_type']}"
        raise ValueError(f"task {name} has {kind}; only tasks whose output_type is generate_until can be evaluated.")
    metrics = [metric["metric"] for metric in config.get("metric_list") or []]
    if metrics and all(metric == _SUBMISSION for metric in metrics):
        raise ValueError(
            f"task {name} has no answers: it is a test split that a server scores. Use its validation task instead."
        )
    arguments = dict(config.get("dataset_kwargs") or {})
    if arguments.get("token") is True and get_token() is None:
        del arguments["token"]  # datasets would fail without a token although the data are public
    config["dataset_kwargs"] = arguments or None
    if name == "seedbench":
        config["process_docs"] = _only_images
    try:
        with _offline_where_there_is_no_network(ConfigurableMessagesTask.download.retry):
            task = ConfigurableMessagesTask(config=config, model_name="fastvlm")
    except Exception as error:
        raise _explained(name, config, error) from error
    _require_answers(name, task)
    return task


def main_metric(name: str, task: Any) -> str:
    """Return the name of a task's main metric: the card's, or the first one that is not a submission."""
    metrics = list(task.aggregation())
    if CARD_METRICS.get(name) in metrics:
        return CARD_METRICS[name]
    return next(metric for metric in metrics if metric != _SUBMISSION)


def right_answers(doc: Mapping[str, Any], target: Any) -> tuple[str, ...]:
    """Return the distinct reference answers of a row.

    Args:
        doc: the row.
        target: lmms-eval's target of the row; for VQAv2 and TextVQA it is the name of a missing column.
    """
    if target in ("answer", "answers") and target not in doc:
        target = doc.get("answers") or []
    several = target if isinstance(target, list | tuple) else [target]
    texts = [str(one["answer"] if isinstance(one, Mapping) and "answer" in one else one) for one in several]
    return tuple(dict.fromkeys(texts))


@functools.cache
def _index(include: str | None) -> tuple[dict[str, Path], dict[str, Path]]:
    """Return the files of all tasks and groups.

    Only the names are read, since lmms-eval needs half a minute to parse all YAML files.
    """
    import_harness()
    import lmms_eval.tasks

    folders = [os.path.dirname(lmms_eval.tasks.__file__)]
    if include is not None:
        if not os.path.isdir(include):
            raise ValueError(f"the folder of tasks {include!r} does not exist; expected one with YAML files.")
        folders.append(include)
    tasks: dict[str, Path] = {}
    groups: dict[str, Path] = {}
    for folder in folders:
        for path in sorted(Path(folder).rglob("*.yaml")):
            text = path.read_text(encoding="utf-8", errors="replace")
            if names := _TASK.findall(text):
                tasks[names[0]] = path
            elif names := _GROUP.findall(text):
                groups[names[0]] = path
    return tasks, groups


def _members(path: Path) -> Iterator[str]:
    from lmms_eval.utils import load_yaml_config

    for member in load_yaml_config(str(path), mode="simple").get("task") or []:
        if not isinstance(member, str):
            raise ValueError(f"the group in {path} changes the settings of its tasks; name the tasks one by one.")
        yield member


def _only_images(documents: Any) -> Any:
    return documents.filter(lambda kind: kind == "image", input_columns=["data_type"])


def _require_answers(name: str, task: Any) -> None:
    """Raise ValueError if none of the first rows has an answer."""
    documents = task.eval_docs_no_media
    columns = [column for column in _ANSWERS if column in documents.column_names]
    if not columns or not len(documents):
        return
    rows = documents.select(range(min(len(documents), 100))).select_columns(columns)
    if all(value in (None, "", []) for row in rows for value in row.values()):
        raise ValueError(
            f"task {name} has no answers: the column {' and '.join(columns)} of {task.config.dataset_path} is empty. "
            "Use a split with answers, such as validation."
        )


@contextlib.contextmanager
def _offline_where_there_is_no_network(retrying: Any) -> Iterator[None]:
    """If the hub's name cannot be resolved, use the cache immediately instead of retrying for minutes.

    Args:
        retrying: the tenacity object of lmms-eval's data loading, which waits between five attempts.
    """
    import datasets.config
    from huggingface_hub import constants
    from tenacity import wait_none

    offline = constants.HF_HUB_OFFLINE
    if not offline and not urllib.request.getproxies():
        try:
            socket.getaddrinfo(urllib.parse.urlsplit(constants.ENDPOINT).hostname, None)
        except OSError:
            offline = True
    if not offline:
        yield
        return
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE, retrying.wait
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    retrying.wait = wait_none()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE, retrying.wait = before


def _explained(name: str, config: Mapping[str, Any], error: Exception) -> ValueError:
    """Return an error that explains why a task's data cannot be loaded."""
    from tenacity import RetryError

    cause: BaseException = error
    if isinstance(error, RetryError):
        cause = error.last_attempt.exception() or error
    source = config.get("dataset_path")
    text = f"{type(cause).__name__}: {cause}"
    local = source in ("parquet", "json", "csv", "arrow", "imagefolder") or os.path.exists(str(source))
    unreachable = isinstance(cause, ConnectionError) or any(
        words in text for words in ("OfflineMode", "offline", "Couldn't reach", "Connection", "resolve host")
    )
    if not local and unreachable:
        return ValueError(
            f"no network for task {name}: its data set {source} is not in the cache (HF_HOME), and the hub cannot be "
            "reached. Download it once with a network connection."
        )
    if type(cause).__name__ in ("DatasetNotFoundError", "GatedRepoError", "RepositoryNotFoundError"):
        return ValueError(
            f"task {name}: the data set {source} does not exist or needs a login (hf auth login). {cause}"
        )
    if type(cause).__name__ in ("UnidentifiedImageError", "DecompressionBombError") or isinstance(cause, SyntaxError):
        return ValueError(f"task {name}, row 0 has an image that cannot be read: {cause}")
    return ValueError(f"task {name}: its data cannot be loaded. {text}")
