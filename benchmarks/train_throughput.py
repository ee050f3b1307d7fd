# SPDX-License-Identifier: Apache-2.0
"""Training throughput and peak memory beside Transformers' own `fast_vlm` (with timm), by the same `Trainer` arguments.

    python benchmarks/train_throughput.py [--preset 0.5b] [--image-size 512] [--batch-size 2] [--tokens 164]
        [--dtype bfloat16 float32] [--checkpointing off on] [--steps 3] [--warmup 1] [--rounds 1] [--threads N]
        [--native-steps N] [--device cpu|cuda] [--out benchmarks/results/train_throughput.json]

Both train all parameters of the same model from the same random weights, by plain `Trainer` with AdamW, on one batch
of random pixels and tokens. Each implementation runs in a separate process, in turns, and reports the time of each
step and its peak memory. `processor_seconds` is CPU time; compare it on a shared machine. Needs timm and accelerate;
peak memory on a CPU (VmHWM) needs Linux.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import _results

IMPLEMENTATIONS = ("ours", "native")


def arguments() -> argparse.Namespace:
    parser = _results.parser(
        __doc__,
        preset="0.5b",
        image_size=512,
        batch_size=2,
        tokens=164,
        dtype=["bfloat16", "float32"],
        checkpointing=["off", "on"],
        steps=3,
        warmup=1,
        rounds=1,
        threads=None,
        device="cpu",
    )
    parser.add_argument("--layers", type=int, help="layers of the language model, if not the preset's")
    parser.add_argument("--native-steps", type=int, help="timed steps of the port, if it takes very long")
    parser.add_argument("--child", nargs=4, metavar=("IMPLEMENTATION", "DIRECTORY", "DTYPE", "CHECKPOINTING"))
    return parser.parse_args()


def write_checkpoints(options: argparse.Namespace, folder: Path) -> None:
    """Write the same random weights of the preset's shape for each implementation."""
    import torch

    from transformers_fastvlm import FastVLMConfig
    from transformers_fastvlm.bench.random_weights import native_twin, random_model

    config: Any = FastVLMConfig.from_preset(options.preset)
    if options.layers:
        config.text_config.num_hidden_layers = options.layers
        config.text_config.layer_types = config.text_config.layer_types[: options.layers]
    for implementation, own in (("ours", config), ("native", native_twin(config))):
        random_model(own, torch.bfloat16, torch.device("cpu")).save_pretrained(folder / implementation)


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Train in this process and return the seconds of each step, the losses and the peak memory in bytes."""
    import dataclasses

    import torch
    from transformers import AutoModelForImageTextToText, Trainer, TrainerCallback, TrainingArguments

    import transformers_fastvlm
    from transformers_fastvlm.bench.measuring import Clock, Times, peak_bytes

    implementation, directory, dtype, checkpointing = options.child
    torch.set_num_threads(options.threads)
    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=dtype)
    torch.manual_seed(0)  # now, since loading draws other numbers in each
    ours = isinstance(model, transformers_fastvlm.FastVLMForConditionalGeneration)
    assert ours == (implementation == "ours"), type(model)
    image_tokens = (options.image_size // 64) ** 2
    ids = torch.randint(0, 150_000, (options.batch_size, options.tokens))
    ids[:, 8 : 8 + image_tokens] = model.config.image_token_id
    labels = ids.masked_fill(ids == model.config.image_token_id, -100)
    pixels = torch.rand(options.batch_size, 3, options.image_size, options.image_size).to(model.dtype)
    rows = [{"input_ids": ids[i], "labels": labels[i], "pixel_values": pixels[i]} for i in range(options.batch_size)]
    steps = options.warmup + options.steps
    # Named so from Transformers 5.23 on, where the old name warns.
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    clock, times = Clock(options.device), Times()
    losses: list[float] = []

    class Watch(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start = clock.now()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.add(self.start, clock.now())

        def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
            if logs and "loss" in logs:
                losses.append(logs["loss"])

    with tempfile.TemporaryDirectory() as out:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                out,
                max_steps=steps,
                per_device_train_batch_size=options.batch_size,
                learning_rate=1e-5,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                remove_unused_columns=False,
                dataloader_pin_memory=False,
                use_cpu=options.device == "cpu",
                **{name: checkpointing == "on", f"{name}_kwargs": {"use_reentrant": False}},
            ),
            train_dataset=rows * steps,  # type: ignore[arg-type]
            callbacks=[Watch()],
        )
        trainer.train()
    peak = peak_bytes(torch.device(options.device))
    return {"seconds": times.wall, "processor_seconds": times.cpu, "losses": losses, "peak_bytes": peak}


def run_child(options: argparse.Namespace, folder: Path, implementation: str, dtype: str, on: str) -> dict[str, Any]:
    """Train in a new process and return what `train` returns there."""
    steps = options.native_steps if implementation == "native" and options.native_steps else options.steps
    command = [sys.executable, __file__, "--child", implementation, str(folder / implementation), dtype, on]
    for key in ("image_size", "batch_size", "tokens", "warmup", "threads", "device"):
        command += [f"--{key.replace('_', '-')}", str(getattr(options, key))]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    done = subprocess.run([*command, "--steps", str(steps)], stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{implementation}, {dtype}, checkpointing {on}: exit status {done.returncode}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    timed = ", ".join(f"{seconds:.1f}" for seconds in result["processor_seconds"])
    print(f"{dtype}, checkpointing {on}, {implementation}: {timed} s of CPU time", file=sys.stderr, flush=True)
    return result


def summarise(options: argparse.Namespace, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Put the runs of one implementation together, warm-up left out."""
    timed = {
        kind: [round(seconds, 3) for run in runs for seconds in run[kind][options.warmup :]]
        for kind in ("seconds", "processor_seconds")
    }
    return {
        "samples_per_second": float(f"{options.batch_size / median(timed['seconds']):.4g}"),
        **{kind: {"median": median(values), "all": values} for kind, values in timed.items()},
        "first_loss": round(runs[0]["losses"][0], 4),
        "peak_bytes": max(run["peak_bytes"] for run in runs),
    }


def compare(options: argparse.Namespace, folder: Path, dtype: str, on: str) -> dict[str, Any]:
    """Train both implementations in turns and return their figures and ratios."""
    runs: dict[str, list[dict[str, Any]]] = {implementation: [] for implementation in IMPLEMENTATIONS}
    for _ in range(options.rounds):
        for implementation in IMPLEMENTATIONS:
            runs[implementation].append(run_child(options, folder, implementation, dtype, on))
    ours, native = (summarise(options, runs[implementation]) for implementation in IMPLEMENTATIONS)
    over = {kind: round(native[kind]["median"] / ours[kind]["median"], 3) for kind in ("seconds", "processor_seconds")}
    return {
        "dtype": dtype,
        "gradient_checkpointing": on == "on",
        "native": native,
        "ours": ours,
        "native_over_ours": {**over, "peak_bytes": round(native["peak_bytes"] / ours["peak_bytes"], 3)},
    }


def main() -> None:
    options = arguments()
    if options.child:
        print(json.dumps(train(options)))
        return
    if options.tokens < 9 + (options.image_size // 64) ** 2:
        raise SystemExit(
            f"--tokens {options.tokens} is too few for the image's tokens; raise it or lower --image-size."
        )
    kept = ("preset", "layers", "image_size", "batch_size", "tokens", "warmup", "rounds", "threads", "device")
    values: dict[str, Any] = {"settings": {key: getattr(options, key) for key in kept}, "cases": []}
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoints(options, Path(folder))
        for dtype in options.dtype:
            for on in options.checkpointing:
                values["cases"].append(compare(options, Path(folder), dtype, on))
                # After each case, since all of them take long on a small machine.
                _results.write(options, values, device=options.device, packages=["accelerate"])


if __name__ == "__main__":
    main()
