# SPDX-License-Identifier: Apache-2.0
"""Decoding in tokens per second: this package, Transformers' own `fast_vlm`, and 8- and 4-bit weights.

    python benchmarks/decode_speed.py [--preset 0.5b] [--steps 4] [--rounds 5] [--loads 4] [--threads N]
        [--device cpu|cuda] [--groups bfloat16 float32 quantized] [--out benchmarks/results/decode_speed.json]

All have the same random weights of the preset's shape and continue one prompt of random tokens by greedy decoding.
The models of a group are in memory together and decode in turns. The position of weights in memory changes times by a
few percent, so all are written and loaded several times. A figure is one divided by the median time of a step.
`processor` is CPU time; compare it on a shared machine. `milliseconds_of_operations` is the profile of one more step.
Needs timm for the native model and torchao for the quantized models.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import _results
import torch
from tiny_accuracy import quantization_config
from train_throughput import write_checkpoints

import transformers_fastvlm
from transformers_fastvlm import compat
from transformers_fastvlm.bench.measuring import Clock, Times, in_turns

GROUPS = {
    "bfloat16": {"ours": "bfloat16", "native": "bfloat16"},
    "float32": {"ours": "float32", "native": "float32"},
    "quantized": {"ours": "bfloat16", "int8": "bfloat16", "int4": "bfloat16"},
}
PROMPT_TOKENS = 16


def load(name: str, folder: Path, dtype: str, device: str) -> Any:
    """Load one of the models, those with less bits as a user does."""
    from transformers import AutoModelForImageTextToText

    settings = {"quantization_config": quantization_config(name, device)} if name in ("int8", "int4") else {}
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

    def decode(self, steps: int = 1) -> None:
        """Decode some tokens."""
        for _ in range(steps):
            out = self.model(input_ids=self.token, **self.cache, use_cache=True, logits_to_keep=1)
            self.token = out.logits[:, -1:].argmax(-1)


@torch.inference_mode()
def measure(group: dict[str, str], options: argparse.Namespace) -> dict[str, Any]:
    """Return tokens a second of each model of a group, and ratios to its last or first."""
    times = {name: Times() for name in group}
    for number in range(options.loads):
        order = list(group) if number % 2 == 0 else list(reversed(group))
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoints(options, Path(folder))
            decoders = {
                name: Decoder(load(name, Path(folder), group[name], options.device), options.device) for name in order
            }
            work = {name: partial(decoder.decode, options.steps) for name, decoder in decoders.items()}
            found = in_turns(
                work,
                options.rounds,
                warmup=0,
                clock=Clock(options.device),
                before=lambda name, turn, decoders=decoders: decoders[name].decode(),
            )
            spent = {name: _results.operations(decoders[name].decode) for name in group}
            del decoders, work
        for name, own in found.items():
            times[name].wall += own.wall
            times[name].cpu += own.cpu
    speed = {name: own.rates(options.steps, "tokens") for name, own in times.items()}
    base = "native" if "native" in speed else "ours"
    ratios = {
        f"{name} / {'native' if base == 'native' else 'bfloat16'}": {
            key: round(own[key] / speed[base][key], 3) for key in own
        }
        for name, own in speed.items()
        if name != base
    }
    return {"speed": speed, "ratios": ratios, "milliseconds_of_operations": spent}


def main() -> None:
    parser = _results.parser(__doc__, preset="0.5b", steps=4, rounds=5, loads=4, threads=None, device="cpu")
    parser.add_argument("--layers", type=int, help="layers of the language model, if not the preset's")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    values = {
        **_results.settings(options, "device", "groups"),
        "prompt_tokens": PROMPT_TOKENS,
        "results": {name: measure(GROUPS[name], options) for name in options.groups},
    }
    _results.write(options, values, device=options.device, packages=["torchao"])


if __name__ == "__main__":
    main()
