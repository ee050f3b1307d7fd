# SPDX-License-Identifier: Apache-2.0
"""Callbacks: sample answers at each evaluation, and the lines that a run prints."""

import contextlib
import itertools
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import ProgressCallback

from ..random_streams import kept_random_streams
from ..tokens import IMAGE_TOKEN
from .ending import hours

__all__ = ["SAMPLES_FILE", "LinesAboveBar", "LogLines", "SampleAnswers", "iter_rows", "untouched"]

SAMPLES_FILE = "samples.jsonl"

logger = logging.getLogger(__name__)


class SampleAnswers(TrainerCallback):
    """Answers the first rows of a data set at each evaluation by greedy decoding, and records the answers.

    Answers go to `samples.jsonl` in the run's directory, one object per row with `step`, `id`, `prompt`, `answer` and
    `expected`; to the log; and to TensorBoard if the run reports there. Training is not affected: random generators,
    the mode of each module and the cache setting are restored.

    Args:
        processor: the processor of the model.
        dataset: data set of samples; its first `rows` are answered, or all if it has fewer.
        conversation: "sft" to generate each row's last answer, or "plain" to generate its caption.
        rows: number of rows.
        max_new_tokens: maximum number of tokens of an answer.
        report: called with each answer, on the main process; by default answers are logged.
    """

    def __init__(
        self,
        processor: Any,
        dataset: Any,
        conversation: str = "sft",
        rows: int = 4,
        max_new_tokens: int = 64,
        report: Any = logger.info,
    ) -> None:
        self.processor, self.conversation = processor, conversation
        self.max_new_tokens, self.report = max_new_tokens, report
        self.dataset, self.rows = dataset, rows
        self._samples: list[dict[str, Any]] | None = None
        self._writers: list[TensorBoardCallback] = []

    def attach(self, trainer: Any) -> None:
        """Add the callback to a trainer, and find its TensorBoard callbacks."""
        self._writers = [one for one in trainer.callback_handler.callbacks if isinstance(one, TensorBoardCallback)]
        trainer.add_callback(self)

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Answer the rows. All processes generate, since a model may be sharded; the main process writes."""
        with untouched(model):
            if self._samples is None:
                self._samples = list(itertools.islice(iter_rows(self.dataset), self.rows))
            records = [
                {"step": state.global_step, "id": sample.get("id"), **self._answered(model, sample)}
                for sample in self._samples
            ]
        if not state.is_world_process_zero:
            return
        with (Path(args.output_dir) / SAMPLES_FILE).open("a", encoding="utf-8") as stream:
            for record in records:
                stream.write(json.dumps(record, ensure_ascii=False) + "\n")
        for number, record in enumerate(records):
            self.report(
                f"step {record['step']}: {record['prompt']!r} -> {record['answer']!r} (expected {record['expected']!r})"
            )
            for callback in self._writers:
                if callback.tb_writer is not None:
                    text = f"{record['prompt']}\n\n**{record['answer']}**\n\nexpected: {record['expected']}"
                    callback.tb_writer.add_text(f"samples/{number}", text, record["step"])

    def _answered(self, model: Any, sample: dict[str, Any]) -> dict[str, str]:
        last = max(index for index, turn in enumerate(sample["messages"]) if turn["role"] == "assistant")
        messages, expected = sample["messages"][:last], sample["messages"][last]["content"]
        if self.conversation == "plain":
            prompt = shown = IMAGE_TOKEN
        else:
            prompt = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            shown = messages[-1]["content"].replace(IMAGE_TOKEN, "").strip()
        images = list(sample.get("images") or ())
        inputs = self.processor(text=prompt, images=images or None, return_tensors="pt").to(model.device)
        output = model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False, use_cache=True)
        answer = self.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        if self.conversation == "plain":
            answer = answer.split("\n")[0]  # a caption ends with its line
        return {"prompt": shown, "answer": answer.strip(), "expected": expected}


class LogLines(TrainerCallback):
    """Reports each log entry as a line of text, with the remaining time.

    Args:
        report: called with each line, on the main process.
    """

    def __init__(self, report: Any) -> None:
        self.report = report
        self._start = (0.0, 0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the time and step at which the run started."""
        self._start = (time.monotonic(), state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Report a log entry of `Trainer`."""
        if not state.is_world_process_zero or not logs:
            return
        numbers = [f"{name} {value:.4g}" for name, value in logs.items() if isinstance(value, int | float)]
        since, first = self._start
        done = state.global_step - first
        if done and state.global_step < state.max_steps:
            left = (time.monotonic() - since) / done * (state.max_steps - state.global_step)
            numbers.append(f"{hours(left)} left")
        self.report(f"step {state.global_step}/{state.max_steps}: {', '.join(numbers)}")


class LinesAboveBar(ProgressCallback):
    """A progress bar that prints reported lines above itself.

    Args:
        report: called with each line; writes it to the terminal.
    """

    def __init__(self, report: Any) -> None:
        super().__init__()
        self._report = report

    def report(self, line: str) -> None:
        """Write a line above the bar."""
        bars = [bar for bar in (self.training_bar, self.prediction_bar) if bar is not None]
        with bars[0].external_write_mode() if bars else contextlib.nullcontext():
            self._report(line)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Print nothing; `LogLines` reports log entries."""


def iter_rows(dataset: Any) -> Iterator[dict[str, Any]]:
    """Yield the samples of a map-style or an iterable data set in order."""
    if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
        return (dataset[index] for index in range(len(dataset)))
    return iter(dataset)


@contextlib.contextmanager
def untouched(model: torch.nn.Module) -> Iterator[None]:
    """Evaluate inside this context without gradients, and restore random generators and every module's mode."""
    modes = {module: module.training for module in model.modules()}
    try:
        with kept_random_streams(), torch.no_grad():
            model.eval()
            yield
    finally:
        for module, training in modes.items():
            module.training = training
