# SPDX-License-Identifier: Apache-2.0
"""lmms-eval's tasks: the eleven of the model card, and any other by its name."""

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
"""The metric that is the model card's figure, by lmms-eval's name of each of its eleven tasks, which `card` names."""


def import_harness() -> None:
    """Import lmms-eval, or say how to install it; nothing else of the process changes.

    Raises:
        ImportError: it is not installed, or does not go with the version of another package.
    """
    truncated = ImageFile.LOAD_TRUNCATED_IMAGES
    # Its import takes all handlers off loguru, adds others, turns warnings off, and lets Pillow read truncated images.
    with needs("lmms-eval", "fastvlm eval", EXTRA), warnings.catch_warnings(), contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError):
            from loguru import logger

            stack.enter_context(mock.patch.multiple(logger, remove=_nothing, add=_nothing))
        try:
            import lmms_eval.evaluator  # noqa: F401
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = truncated


def _nothing(*arguments: Any, **options: Any) -> None:
    """Stand in for what lmms-eval would call."""


def expand(names: Sequence[str], include: str | os.PathLike[str] | None = None) -> dict[str, Path]:
    """Return the YAML files of tasks, by their names, groups and `card` written out.

    Args:
        names: of tasks, of lmms-eval's groups of tasks, or "card".
        include: a folder with YAML files of further tasks.

    Raises:
        ValueError: there is no such task; the message lists names that are near.
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
            hint = f"Near names: {', '.join(near)}." if near else "No name is near it."
            raise ValueError(f"unknown task {name!r}. {hint} `card` stands for the model card's eleven tasks.")

    for name in names:
        add(name)
    if not found:
        raise ValueError("no task was named; expected names of lmms-eval's tasks, or card.")
    return found


def load_task(name: str, path: Path) -> Any:
    """Return one of lmms-eval's tasks with its data.

    Of SEED-Bench only the questions about pictures are taken, as the card does.

    Raises:
        ValueError: its data set has no answers, is nowhere to be had, or the task is of a kind that generates none.
    """
    import_harness()
    from lmms_eval.api.task import ConfigurableMessagesTask
    from lmms_eval.utils import load_yaml_config

    config = load_yaml_config(str(path), mode="full")
    if "class" in config or config.get("output_type", "generate_until") != "generate_until":
        kind = "a class of its own" if "class" in config else f"output_type {config['output_type']}"
        raise ValueError(f"task {name} has {kind}; only tasks whose output_type is generate_until can be evaluated.")
    metrics = [metric["metric"] for metric in config.get("metric_list") or []]
    if metrics and all(metric == _SUBMISSION for metric in metrics):
        raise ValueError(
            f"task {name} has no answers: its data are a test whose scores a server gives out. Take its validation "
            "task instead."
        )
    arguments = dict(config.get("dataset_kwargs") or {})
    if arguments.get("token") is True and get_token() is None:
        del arguments["token"]  # datasets refuses without a token what is public anyway
    config["dataset_kwargs"] = arguments or None
    if name == "seedbench":
        config["process_docs"] = _only_pictures
    try:
        with _offline_where_there_is_no_network(ConfigurableMessagesTask.download.retry):
            task = ConfigurableMessagesTask(config=config, model_name="fastvlm")
    except Exception as error:
        raise _explained(name, config, error) from error
    _require_answers(name, task)
    return task


def main_metric(name: str, task: Any) -> str:
    """Return the name of the metric that stands for a task: the card's, or the first one that is no submission."""
    metrics = list(task.aggregation())
    if CARD_METRICS.get(name) in metrics:
        return CARD_METRICS[name]
    return next(metric for metric in metrics if metric != _SUBMISSION)


def right_answers(doc: Mapping[str, Any], target: Any) -> tuple[str, ...]:
    """Return what counts as right in a row, each once.

    Args:
        doc: the row.
        target: what lmms-eval calls its target; for VQAv2 and TextVQA that is the name of a column that is not there.
    """
    if target in ("answer", "answers") and target not in doc:
        target = doc.get("answers") or []
    several = target if isinstance(target, list | tuple) else [target]
    texts = [str(one["answer"] if isinstance(one, Mapping) and "answer" in one else one) for one in several]
    return tuple(dict.fromkeys(texts))


@functools.cache
def _index(include: str | None) -> tuple[dict[str, Path], dict[str, Path]]:
    """Return the files of all tasks and groups.

    Only their names are read: to parse all YAML files takes lmms-eval half a minute.
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
            raise ValueError(f"the group of {path} changes its tasks' settings; name the tasks one by one.")
        yield member


def _only_pictures(documents: Any) -> Any:
    return documents.filter(lambda kind: kind == "image", input_columns=["data_type"])


def _require_answers(name: str, task: Any) -> None:
    """Raise ValueError if none of the first rows says what is right."""
    documents = task.eval_docs_no_media
    columns = [column for column in _ANSWERS if column in documents.column_names]
    if not columns or not len(documents):
        return
    rows = documents.select(range(min(len(documents), 100))).select_columns(columns)
    if all(value in (None, "", []) for row in rows for value in row.values()):
        raise ValueError(
            f"task {name} has no answers: the column {' and '.join(columns)} of {task.config.dataset_path} is empty. "
            "Take a split with answers, such as validation."
        )


@contextlib.contextmanager
def _offline_where_there_is_no_network(retrying: Any) -> Iterator[None]:
    """Where the hub's name cannot be looked up, use what is cached at once, and not after minutes of retries.

    Args:
        retrying: tenacity's object of lmms-eval's loading of data, which waits between five tries.
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
    """Return in one sentence why a task's data cannot be had."""
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
            f"no network for task {name}: its data set {source} is neither on this machine (HF_HOME) nor can the hub "
            "be reached. Fetch it once on a machine with a network."
        )
    if type(cause).__name__ in ("DatasetNotFoundError", "GatedRepoError", "RepositoryNotFoundError"):
        return ValueError(
            f"task {name}: the data set {source} was not found, or needs a login (hf auth login). {cause}"
        )
    if type(cause).__name__ in ("UnidentifiedImageError", "DecompressionBombError") or isinstance(cause, SyntaxError):
        return ValueError(f"task {name}, row 0 has an image that cannot be read: {cause}")
    return ValueError(f"task {name}: its data cannot be used. {text}")
