# SPDX-License-Identifier: Apache-2.0
"""What holding an answer to a schema costs for each token, by the number of tokens in the vocabulary.

    python benchmarks/schema_vocabulary.py [--vocabularies 512 151936] [--answers 20] [--rows 1] [--rounds 5]
        [--threads N] [--out benchmarks/results/schema_vocabulary.json]

No model runs: tokens are chosen from random logits, greedily, once under a schema and once without, for as many steps.
The difference is what a schema adds to a step of the decoder: the bits of the tokens that may come next, their use on
the logits, and the grammar's step. The vocabularies are made here, of random merges of letters and of longer tokens,
since the model's own cannot be shipped; 151,936 is the number of logits of FastVLM 0.5B and 1.5B. The time to compile
each schema is given too. The schemas are those of tests/schema_cases.py. Medians of the rounds, CPU time.
"""

import random
import string
import sys
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import _results
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from transformers_fastvlm.bench.measuring import Clock, in_turns
from transformers_fastvlm.engines import Sampling, Schema
from transformers_fastvlm.engines.grammars import Grammars
from transformers_fastvlm.engines.row_sampling import RowChooser, choose_tokens

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from schema_cases import SCHEMAS

LONGEST = 12
END = "<end>"


def tokenizer(size: int) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer with `size` tokens: the bytes, and random words, some with a blank."""
    chance = random.Random(0)
    vocabulary = [END, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    parts, merges, known = ["Ġ", *string.ascii_letters, *string.digits, *'{}[]",:-'], [], set(vocabulary)
    while len(vocabulary) < size:
        left, right = chance.choice(parts), chance.choice(parts)
        if (word := left + right) not in known and len(word) <= LONGEST and "Ġ" not in right:
            known.add(word)
            vocabulary.append(word)
            parts.append(word)
            merges.append((left, right))
    ids = {token: index for index, token in enumerate(vocabulary)}
    made = Tokenizer(models.BPE(vocab=ids, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END)


def steps(grammars: Grammars, schema: Schema, logits: list[torch.Tensor], longest: int = 64) -> int:
    """Return the number of steps until each row's answer under a schema is whole."""
    choosers = [RowChooser(Sampling(), grammars.matcher(schema), (0,)) for _ in range(len(logits[0]))]
    for step in range(longest):
        choose_tokens(choosers, logits[step % len(logits)])
        if all(chooser.ended for chooser in choosers):
            return step + 1
    return longest


def free(logits: list[torch.Tensor], count: int) -> None:
    """Choose tokens without a schema."""
    choosers = [RowChooser(Sampling()) for _ in range(len(logits[0]))]
    for step in range(count):
        choose_tokens(choosers, logits[step % len(logits)])


def measure(size: int, options: Any) -> dict[str, Any]:
    """Return the milliseconds of CPU time of a step and of a schema's compilation, by schema."""
    grammars = Grammars(tokenizer(size), [0], size)
    torch.manual_seed(0)
    answers = [[torch.randn(options.rows, size) for _ in range(8)] for _ in range(options.answers)]
    found = {}
    for name, (schema, _) in SCHEMAS.items():
        start = process_time()
        grammars.matcher(schema)
        compiled = process_time() - start
        counts = [steps(grammars, schema, logits) for logits in answers]

        def held(schema: Schema = schema) -> None:
            for logits in answers:
                steps(grammars, schema, logits)

        def unheld(counts: list[int] = counts) -> None:
            for logits, count in zip(answers, counts, strict=True):
                free(logits, count)

        work = {"with_schema": held, "without": unheld}
        times = in_turns(work, options.rounds, clock=Clock())
        a_step = {kind: 1e3 * median(own.cpu) / sum(counts) for kind, own in times.items()}
        found[name] = {
            "steps": sum(counts),
            "compile_ms": round(1e3 * compiled, 1),
            "step_ms": {kind: round(value, 3) for kind, value in a_step.items()},
            "added_ms": round(a_step["with_schema"] - a_step["without"], 3),
        }
    return found


def main() -> None:
    options = _results.parser(
        __doc__, vocabularies=[512, 151936], answers=20, rows=1, rounds=5, threads=None
    ).parse_args()
    torch.set_num_threads(options.threads)
    values = {str(size): measure(size, options) for size in options.vocabularies}
    _results.write(options, {**_results.settings(options), "by_vocabulary": values}, packages=["llguidance"])


if __name__ == "__main__":
    main()
