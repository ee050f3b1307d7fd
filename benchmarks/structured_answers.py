# SPDX-License-Identifier: Apache-2.0
"""Answers of the tiny model that follow a schema: how many parse, and what a schema costs in tokens per second.

    python benchmarks/structured_answers.py [--scenes 200] [--rounds 5] [--rows 16] [--threads N]
        [--out benchmarks/results/structured_answers.json]

Asks one question about each of a number of scenes that no training has seen, under each of the five schemas of
tests/schema_cases.py: greedily, and every second one at temperature 2. An answer fits if its finish reason is "stop"
and if it is what the schema says, checked by hand.

For the cost, a batch of questions without images is answered under each schema, and again without one with as many
tokens in each row; nothing else ends an answer then, as the model has no end token. The two take turns. Images are
left out since their encoding, which takes the same time in both, would hide the cost. Medians of the rounds;
`of_processor_seconds` is the ratio of CPU time; use it on a shared machine.
"""

import sys
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import _results
import torch
from _results import questions
from transformers import AutoModelForImageTextToText, AutoProcessor

from transformers_fastvlm.bench.measuring import Clock, in_turns, ratio
from transformers_fastvlm.checkpoints import tiny_checkpoint
from transformers_fastvlm.engines import Sampling, Schema, TransformersEngine

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from schema_cases import SCHEMAS

MAX_TOKENS = 256
TEXTS = ("Describe the picture as JSON.", "How many stars are there?", "What number is written?", "Hi")


def load(ends: bool = True) -> TransformersEngine:
    """Load the tiny model; without `ends`, only its limit ends an answer."""
    model = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint(), dtype="float32").eval()
    if not ends:
        model.generation_config.eos_token_id = None
    return TransformersEngine(model, AutoProcessor.from_pretrained(tiny_checkpoint()))


def fitting(engine: TransformersEngine, scenes: list[dict[str, Any]], name: str) -> dict[str, int]:
    """Return how many answers there are under a schema, and how many fit it; every second one is sampled."""
    schema, fits = SCHEMAS[name]
    samplings = [
        Sampling(max_new_tokens=MAX_TOKENS, temperature=2.0 * (row % 2), seed=row if row % 2 else None, schema=schema)
        for row in range(len(scenes))
    ]
    answers = engine.generate([scene["conversation"] for scene in scenes], samplings)
    fitted = sum(answer.finish_reason == "stop" and fits(answer.text) for answer in answers)
    return {"answers": len(answers), "fit": fitted, "different": len({answer.text for answer in answers})}


def cost(held: TransformersEngine, free: TransformersEngine, schema: Schema, options: Any) -> dict[str, Any]:
    """Return tokens a second with a schema and without, of as many tokens."""
    texts = [TEXTS[row % len(TEXTS)] for row in range(options.rows)]
    conversations = [[{"role": "user", "content": [{"type": "text", "text": text}]}] for text in texts]
    samplings = [
        Sampling(max_new_tokens=MAX_TOKENS, temperature=1.0, seed=row, schema=schema) for row in range(options.rows)
    ]
    counts = [answer.completion_tokens for answer in held.generate(conversations, samplings)]
    plain = [Sampling(max_new_tokens=count, temperature=1.0, seed=row) for row, count in enumerate(counts)]
    work = {
        "with_schema": partial(held.generate, conversations, samplings),
        "without": partial(free.generate, conversations, plain),
    }
    assert [answer.completion_tokens for answer in work["without"]()] == counts
    times = in_turns(work, options.rounds, clock=Clock())
    seconds = {name: median(own.wall) for name, own in times.items()}
    processor = {name: median(own.cpu) for name, own in times.items()}
    return {
        "tokens": sum(counts),
        "tokens_a_second": {name: round(sum(counts) / value, 1) for name, value in seconds.items()},
        "speed_with_schema_to_without": ratio(seconds["without"], seconds["with_schema"]),
        "of_processor_seconds": ratio(processor["without"], processor["with_schema"]),
    }


def main() -> None:
    options = _results.parser(__doc__, scenes=200, rounds=5, rows=16, threads=None).parse_args()
    torch.set_num_threads(options.threads)
    held, free = load(), load(ends=False)
    scenes = questions(options.scenes)
    costs = {name: cost(held, free, schema, options) for name, (schema, _) in SCHEMAS.items()}
    fits = {name: fitting(held, scenes, name) for name in SCHEMAS}
    held.close()
    free.close()
    values = {**_results.settings(options), "answers": fits, "cost": costs}
    _results.write(options, values, packages=["llguidance"])


if __name__ == "__main__":
    main()
