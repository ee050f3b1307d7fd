# SPDX-License-Identifier: Apache-2.0
"""Tokens a second of decoding: this package beside Transformers' own `fast_vlm`, and weights of 8 and 4 bits.

    python benchmarks/decode_speed.py [--preset 0.5b] [--steps 4] [--rounds 5] [--loads 4] [--threads N]
        [--device cpu|cuda] [--groups bfloat16 float32 quantized] [--out benchmarks/results/decode_speed.json]

All have the same random weights of the preset's shape and continue one prompt of random tokens, a token at a time,
the likeliest each. The models of a group are in memory together and decode in turns. Where weights come to lie in
memory makes a difference of some per cent, so all are written and loaded again, several times. A figure is one over the
median time of a step; `processor` counts the time that the process computed, the one to compare on a machine that
others use too. `milliseconds_of_operations` says what one more step of each spent its time on. Needs timm for the port
and torchao for the quantized models.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import _results
import torch
from train_throughput import write_checkpoints

import transformers_fastvlm
from transformers_fastvlm import compat

GROUPS = {
    "bfloat16": {"ours": "bfloat16", "native": "bfloat16"},
    "float32": {"ours": "float32", "native": "float32"},
    "quantized": {"ours": "bfloat16", "int8": "bfloat16", "int4": "bfloat16"},
}
PROMPT_TOKENS = 16


def load(name: str, folder: Path, dtype: str, device: str) -> Any:
    """Load one of the models, those with less bits as a user does."""
    from transformers import AutoModelForImageTextToText

    settings: dict[str, Any] = {}
    if name in ("int8", "int4"):
        from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup
        from transformers import TorchAoConfig

        four: Any = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
        if device == "cuda":
            four = Int4WeightOnlyConfig(group_size=32, int4_packing_format="tile_packed_to_4d")
        settings["quantization_config"] = TorchAoConfig(Int8WeightOnlyConfig() if name == "int8" else four)
    directory = folder / ("native" if name == "native" else "ours")
    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=dtype, device_map=device, **settings)
    assert isinstance(model, transformers_fastvlm.FastVLMForConditionalGeneration) == (name != "native"), type(model)
    return model.eval()


class Decoder:
    """A model in the middle of an answer."""

    def __init__(self, model: Any, device: str):
        self.model, self.device = model, device
        prompt = torch.randint(0, 150_000, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))
        out = model(input_ids=prompt.to(device), use_cache=True, logits_to_keep=1)
        self.cache, self.token = {compat.CACHE: out[compat.CACHE]}, out.logits[:, -1:].argmax(-1)

    def step(self) -> tuple[float, float]:
        """Decode one token and return the seconds by the clock and of the processor."""
        start, computed = time.perf_counter(), time.process_time()
        out = self.model(input_ids=self.token, **self.cache, use_cache=True, logits_to_keep=1)
        self.token = out.logits[:, -1:].argmax(-1)
        int(self.token)  # waits for an accelerator
        return time.perf_counter() - start, time.process_time() - computed


@torch.inference_mode()
def measure(group: dict[str, str], options: argparse.Namespace) -> dict[str, Any]:
    """Return tokens a second of each model of a group, and ratios to its last or first."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in group}
    for number in range(options.loads):
        order = list(group) if number % 2 == 0 else list(reversed(group))
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoints(options, Path(folder))
            decoders = {
                name: Decoder(load(name, Path(folder), group[name], options.device), options.device) for name in order
            }
            for turn in range(options.rounds):
                first = turn % len(order)  # none is always the first of a turn
                for name in order[first:] + order[:first]:
                    decoder = decoders[name]
                    decoder.step()
                    times[name] += [decoder.step() for _ in range(options.steps)]
            spent = {name: _results.operations(decoders[name].step) for name in group}
            del decoders, decoder
    speed = {
        name: {
            "tokens_per_second": round(1 / median(step[0] for step in steps), 3),
            "tokens_per_processor_second": round(1 / median(step[1] for step in steps), 3),
        }
        for name, steps in times.items()
    }
    base = "native" if "native" in speed else "ours"
    ratios = {
        f"{name} / {'native' if base == 'native' else 'bfloat16'}": {
            key: round(found[key] / speed[base][key], 3) for key in found
        }
        for name, found in speed.items()
        if name != base
    }
    return {"speed": speed, "ratios": ratios, "milliseconds_of_operations": spent}


def main() -> None:
    parser = _results.parser(__doc__)
    parser.add_argument("--preset", default="0.5b")
    parser.add_argument("--layers", type=int, help="layers of the language model, if not the preset's")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--steps", type=int, default=4, help="timed steps of a model in a turn")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each model after a load")
    parser.add_argument("--loads", type=int, default=4, help="times that all are written and loaded")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = {name: measure(GROUPS[name], options) for name in options.groups}
    values = {
        "preset": options.preset,
        "prompt_tokens": PROMPT_TOKENS,
        "steps": options.steps,
        "rounds": options.rounds,
        "loads": options.loads,
        "threads": options.threads,
        "results": results,
    }
    _results.write(options, values, device=options.device, packages=["torchao"])


if __name__ == "__main__":
    main()
