# SPDX-License-Identifier: Apache-2.0
"""Each tool leaves the process as it found it: random streams, environment, signals, Pillow's limits, logs, threads.

One exception is documented: reading the first image adds a filter to `warnings.filters` that matches only Pillow's
warnings in threads that read an image.
"""

import contextlib
import gc
import importlib.util
import json
import logging
import os
import random
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import huggingface_hub.utils
import numpy as np
import pytest
import rich.style  # noqa: F401  # draws a number when it is imported
import torch
from PIL import Image, ImageFile
from transformers import AutoProcessor
from transformers.utils import logging as transformers_logging

from transformers_fastvlm.checkpoints import tiny_checkpoint
from transformers_fastvlm.engines import Sampling, load_engine
from transformers_fastvlm.images import decoding

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGPIPE") if hasattr(signal, name)]
ENDING = 20.0
"""Seconds to wait until stopped threads have ended."""


def open_files() -> list[str]:
    """Return the targets of the process's open file descriptors."""
    folder = "/proc/self/fd"
    if not os.path.isdir(folder):
        return []
    found = []
    for name in os.listdir(folder):
        try:
            found.append(os.readlink(os.path.join(folder, name)))
        except OSError:  # the descriptor of the listing itself
            continue
    return sorted(found)


def _loguru_handlers() -> list[int] | None:
    """Return the ids of loguru's handlers, which lmms-eval uses for logging; None if it is not installed."""
    if importlib.util.find_spec("loguru") is None:
        return None
    from loguru import logger

    return list(logger._core.handlers)  # type: ignore[attr-defined]


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def filters() -> list[Any]:
    """Return the warning filters, without decoding's own and those of categories that libraries add at import."""
    known = ("builtins", "PIL")
    return [
        one
        for one in warnings.filters
        if one is not decoding._FILTER and one[2].__module__.partition(".")[0] in known  # one[2] is its category
    ]


STATE: dict[str, Callable[[], Any]] = {
    "torch's random state": lambda: torch.random.get_rng_state().tolist(),
    "Python's random state": random.getstate,
    "numpy's random state": lambda: json.dumps(np.random.get_state(legacy=False), default=lambda array: array.tolist()),
    "the environment": lambda: dict(os.environ),
    "the umask": umask,
    "the working directory": os.getcwd,
    "sys.path": lambda: list(sys.path),
    "standard streams": lambda: [sys.stdin, sys.stdout, sys.stderr],
    "hooks": lambda: [sys.excepthook, threading.excepthook, sys.unraisablehook],
    "signal handlers": lambda: [signal.getsignal(number) for number in SIGNALS],
    "Image.MAX_IMAGE_PIXELS": lambda: Image.MAX_IMAGE_PIXELS,
    "ImageFile.LOAD_TRUNCATED_IMAGES": lambda: ImageFile.LOAD_TRUNCATED_IMAGES,
    "warnings.filters": filters,
    "the root logger": lambda: (list(logging.root.handlers), logging.root.level),
    "Transformers' verbosity": transformers_logging.get_verbosity,
    "Transformers' progress bars": transformers_logging.is_progress_bar_enabled,
    "the hub's progress bars": huggingface_hub.utils.are_progress_bars_disabled,
    "HF_HUB_OFFLINE": lambda: huggingface_hub.constants.HF_HUB_OFFLINE,
    "gradients": torch.is_grad_enabled,
    "inference mode": torch.is_inference_mode_enabled,
    "torch's threads": torch.get_num_threads,
    "the default dtype": torch.get_default_dtype,
    "precision of products": torch.get_float32_matmul_precision,
    "deterministic algorithms": torch.are_deterministic_algorithms_enabled,
    # tqdm keeps one for all bars of a process.
    "loguru's handlers": _loguru_handlers,
    "threads": lambda: [one.name for one in threading.enumerate() if one.name != "tqdm_monitor"],
    "open files": open_files,
}


def settled(name: str, before: Any) -> Any:
    """Return a part of the state; for threads and files, wait until new ones have ended, and return the rest."""
    if name not in ("threads", "open files"):
        return STATE[name]()
    end = time.monotonic() + ENDING
    gc.collect()
    while (new := Counter(STATE[name]()) - Counter(before)) and time.monotonic() < end:
        time.sleep(0.05)
    return [*before, *new.elements()] if new else before


# The tools, each with a separate folder


def scenes(folder: Path, count: int = 2) -> Path:
    """Write drawn scenes as a training file; return it."""
    from transformers_fastvlm.data.scenes import SceneDataset

    rows, drawn = [], SceneDataset(count, seed=1)
    for index in range(count):
        row = drawn[index]
        row["images"][0].save(folder / f"{index}.png")
        rows.append({"messages": row["messages"], "images": [f"{index}.png"]})
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


def command(*words: str | Path) -> None:
    """Run `fastvlm` in this process."""
    from typer.testing import CliRunner

    from transformers_fastvlm.cli import app

    result = CliRunner().invoke(app, [str(word) for word in words], prog_name="fastvlm")
    assert result.exit_code == 0, (result.stdout, result.stderr, result.exception)


def use_processor(folder: Path) -> None:
    processor = AutoProcessor.from_pretrained(tiny_checkpoint())
    scenes(folder)
    content = [{"type": "image", "path": str(folder / "0.png")}, {"type": "text", "text": "What is it?"}]
    processor.apply_chat_template([{"role": "user", "content": content}], tokenize=True, return_dict=True)
    (folder / "bad.png").write_bytes((folder / "0.png").read_bytes()[:100])
    with pytest.raises(ValueError, match="truncated"):
        processor.image_processor(str(folder / "bad.png"))


def use_engine(folder: Path) -> None:
    with contextlib.closing(load_engine("transformers", "tiny", device="cpu")) as engine:
        question = [{"role": "user", "content": [{"type": "text", "text": "What is it?"}]}]
        for sampling in (Sampling(max_new_tokens=2), Sampling(max_new_tokens=2, temperature=1.0, seed=3)):
            assert engine.generate([question], sampling)[0].completion_tokens > 0


def use_generate(folder: Path) -> None:
    scenes(folder, 1)
    command("generate", folder / "0.png", "-m", "tiny", "-p", "What?", "--temperature", "1", "--seed", "3", "--json")


def use_batch(folder: Path) -> None:
    scenes(folder)
    command("batch", folder / "*.png", "-m", "tiny", "-p", "What is it?", "-o", folder / "out.jsonl")


def use_training(folder: Path) -> None:
    from transformers_fastvlm.training import load_recipe, run

    settings = ["model.path=tiny", "train.precision=float32", "train.global_batch_size=1"]
    settings += ["arguments.per_device_train_batch_size=1", "arguments.max_steps=2", "arguments.use_cpu=true"]
    recipe = load_recipe("finetune", [*settings, f"data.source={scenes(folder)}", f"output_dir={folder / 'out'}"])
    run(recipe)


def use_data_check(folder: Path) -> None:
    command("data", "check", scenes(folder))


def use_export(target: str) -> Callable[[Path], None]:
    return lambda folder: command("export", target, "tiny", folder / "out")


def use_evaluation(folder: Path) -> None:
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed")
    from transformers_fastvlm.evaluation import EvaluationOptions, evaluate

    scenes(folder, 1)
    (folder / "questions.jsonl").write_text(json.dumps({"image": "0.png", "question": "What?", "answer": "x"}) + "\n")
    options = EvaluationOptions(data=folder / "questions.jsonl", engine_options={"device": "cpu"}, max_new_tokens=2)
    evaluate(str(tiny_checkpoint()), folder / "out", options)


def use_server(folder: Path) -> None:
    pytest.importorskip("fastapi", reason="fastapi is not installed")
    pytest.importorskip("uvicorn", reason="uvicorn is not installed")
    import urllib.request

    from transformers_fastvlm.server import Settings, listen, serve

    answers: list[Any] = []

    def use(url: str) -> None:
        try:
            body = {"model": "tiny", "max_tokens": 2, "temperature": 1, "seed": 3}
            body |= {"messages": [{"role": "user", "content": "What is it?"}]}
            fields = {"Content-Type": "application/json"}
            request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), fields)
            with urllib.request.urlopen(request) as answer:
                answers.append(json.load(answer))
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    def ready(url: str) -> None:
        threading.Thread(target=use, args=(url,)).start()

    engine = load_engine("transformers", "tiny", device="cpu")
    with listen("127.0.0.1", 0) as bound, contextlib.closing(engine):
        serve(engine, Settings(name="tiny", max_pixels=1000), bound, ready)
    assert answers[0]["usage"]["completion_tokens"] > 0


TOOLS: dict[str, Callable[[Path], None]] = {
    "processor": use_processor,
    "engine": use_engine,
    "generate": use_generate,
    "batch": use_batch,
    "training": use_training,
    "data check": use_data_check,
    "info": lambda folder: command("info", "tiny"),
    "export apple": use_export("apple"),
    "export native": use_export("native"),
    "evaluation": use_evaluation,
    "server": use_server,
}


@pytest.fixture
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing asks the hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.usefixtures("_offline")
@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_leaves_the_process_as_it_was(tool: str, tmp_path: Path) -> None:
    random.random(), np.random.random(), torch.rand(1)  # whatever was seeded before
    before = {name: look() for name, look in STATE.items()}
    TOOLS[tool](tmp_path)
    changed = {name: (before[name], now) for name in STATE if (now := settled(name, before[name])) != before[name]}
    assert not changed, "\n".join(f"{name}: {value}" for name, value in _shown(changed).items())


def _shown(changed: dict[str, tuple[Any, Any]]) -> dict[str, str]:
    """Return a tool's changes of the state; for collections, only the new elements."""
    return {
        name: str([one for one in now if one not in before] if isinstance(now, list | set) else (before, now))[:500]
        for name, (before, now) in changed.items()
    }
