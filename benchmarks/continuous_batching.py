# SPDX-License-Identifier: Apache-2.0
"""Continuous batching beside padded batches of `generate()`: tokens per second, and the time of a short answer.

    python benchmarks/continuous_batching.py [--model tiny] [--requests 64] [--rows 8] [--longest 256] [--rounds 3]
        [--warmup 1] [--seconds 0] [--threads N] [--out benchmarks/results/continuous_batching_tiny.json]

Each request has another image and question, and an answer of a fixed number of tokens from 4 to `--longest`, as
many short as long ones by their logarithm. Both answer the same requests with the same model: `padded` in batches of
`--rows`, each as long as its longest answer; `continuous` is `TransformersEngine` with as many rows. `alone` is one
request of `--longest` tokens, by `generate()` and by the engine. `--model 0.5b` has the shape of FastVLM-0.5B with
random weights in bfloat16.

With `--seconds`, the requests then arrive at random over so many seconds, and the record has the median time until an
answer of at most 16 tokens is complete; a padded batch takes all waiting requests.
"""

import queue
import random
import tempfile
import threading
import time
from functools import partial
from statistics import median
from typing import Any

import _results
import torch
from _results import answer_lengths, questions
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    StoppingCriteria,
    StoppingCriteriaList,
)

from transformers_fastvlm import FastVLMConfig, FastVLMImageProcessorPil, FastVLMProcessor
from transformers_fastvlm.bench.measuring import in_turns, ratio
from transformers_fastvlm.bench.random_weights import random_model
from transformers_fastvlm.checkpoints import tiny_checkpoint
from transformers_fastvlm.data.scenes.tokenizer import write_tokenizer
from transformers_fastvlm.engines import Sampling, TransformersEngine
from transformers_fastvlm.kernels import speed_up_linear_layers

SHORT = 16


class Ends(StoppingCriteria):
    """Ends each row at its own length."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths, self.step = torch.tensor(lengths), 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> Any:
        """Return for each row whether it is at its end, (rows,)."""
        self.step += 1
        return self.lengths <= self.step


class Work:
    """A model and the requests, answered in both ways."""

    def __init__(self, options: Any) -> None:
        self.rows = options.rows
        if options.model == "tiny":
            self.model = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint(), dtype="float32").eval()
            self.processor = AutoProcessor.from_pretrained(tiny_checkpoint())
        else:
            config = FastVLMConfig.from_preset(options.model)
            with tempfile.TemporaryDirectory() as folder:
                write_tokenizer(folder)
                tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
            images = FastVLMImageProcessorPil(size=config.vision_config.image_size)
            self.processor = FastVLMProcessor(images, tokenizer)
            config.image_token_id = self.processor.image_token_id
            self.model = random_model(config, torch.bfloat16, torch.device("cpu"))
            speed_up_linear_layers(self.model)  # as from_pretrained does
        self.model.generation_config.eos_token_id = None
        self.engine = TransformersEngine(self.model, self.processor, batch_size=options.rows)
        draw = random.Random(3)
        self.lengths = answer_lengths(options.requests, options.longest, draw)
        self.conversations = [row["conversation"] for row in questions(options.requests)]
        self.times = sorted(draw.uniform(0, options.seconds) for _ in range(options.requests))

    def padded(self, numbers: list[int]) -> None:
        """Answer one batch by generate()."""
        inputs = self.processor.apply_chat_template(
            [self.conversations[number] for number in numbers],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            padding=True,
        )
        lengths = [self.lengths[number] for number in numbers]
        ends = StoppingCriteriaList([Ends(lengths)])
        self.model.generate(**inputs, do_sample=False, max_new_tokens=max(lengths), stopping_criteria=ends)

    def all_padded(self) -> None:
        """Answer all requests, in batches in their order."""
        for first in range(0, len(self.lengths), self.rows):
            self.padded(list(range(first, min(first + self.rows, len(self.lengths)))))

    def all_continuous(self) -> None:
        """Answer all requests by the engine, as if no image had been seen."""
        self.engine._images._by_key.clear()
        self.engine.generate(self.conversations, [Sampling(max_new_tokens=length) for length in self.lengths])

    def alone(self, continuous: bool) -> None:
        """Answer one long request."""
        number = self.lengths.index(max(self.lengths))
        if continuous:
            self.engine._images._by_key.clear()
            self.engine.stream(self.conversations[number], Sampling(max_new_tokens=self.lengths[number])).result()
        else:
            self.padded([number])

    def arriving(self, continuous: bool) -> float:
        """Return the median seconds from the arrival of a short answer's request to its end."""
        self.engine._images._by_key.clear()
        waiting: queue.Queue[int] = queue.Queue()
        done: dict[int, float] = {}
        start = time.perf_counter()

        def answer_padded() -> None:
            while len(done) < len(self.lengths):
                batch = [waiting.get()]
                while len(batch) < self.rows and not waiting.empty():
                    batch.append(waiting.get())
                self.padded(batch)
                done.update(dict.fromkeys(batch, time.perf_counter() - start))

        thread = threading.Thread(target=answer_padded)
        requests = []
        if not continuous:
            thread.start()
        for number, arrives in enumerate(self.times):
            time.sleep(max(0.0, start + arrives - time.perf_counter()))
            if continuous:
                sampling = Sampling(max_new_tokens=self.lengths[number])
                requests.append(self.engine.stream(self.conversations[number], sampling))
            else:
                waiting.put(number)
        for number, request in enumerate(requests):
            request.result()
            done[number] = request.ended_at - start
        if not continuous:
            thread.join()
        short = [number for number, length in enumerate(self.lengths) if length <= SHORT]
        return median(done[number] - self.times[number] for number in short)


def main() -> None:
    """Measure, and write the record."""
    options = _results.parser(
        __doc__, model="tiny", requests=64, rows=8, longest=256, rounds=3, warmup=1, seconds=0.0, threads=None
    ).parse_args()
    torch.set_num_threads(options.threads)
    work = Work(options)
    tokens = sum(work.lengths)
    times = in_turns(
        {
            "padded": work.all_padded,
            "continuous": work.all_continuous,
            "alone, generate()": partial(work.alone, False),
            "alone, engine": partial(work.alone, True),
        },
        options.rounds,
        warmup=options.warmup,
        progress=print,
    )
    record: dict[str, Any] = {
        **_results.settings(options, "seconds"),
        "arrival_seconds": options.seconds,
        "tokens": tokens,
        "tokens_per_second": {name: round(tokens / median(times[name].wall), 1) for name in ("padded", "continuous")},
        "seconds": {name: one.spread() for name, one in times.items()},
        "throughput_ratio": ratio(median(times["padded"].wall), median(times["continuous"].wall)),
        "processor_ratio": ratio(median(times["padded"].cpu), median(times["continuous"].cpu)),
        "alone_processor_ratio": ratio(median(times["alone, engine"].cpu), median(times["alone, generate()"].cpu)),
    }
    if options.seconds:
        short = {name: work.arriving(name == "continuous") for name in ("padded", "continuous")}
        record["short_answer_seconds"] = short
        record["short_answer_ratio"] = round(short["padded"] / short["continuous"], 2)
    work.engine.close()
    _results.write(options, record)


if __name__ == "__main__":
    main()
