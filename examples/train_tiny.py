# SPDX-License-Identifier: Apache-2.0
"""Train a tiny FastVLM from scratch on synthetic scenes: tokenizer, encoder, new model, stages 1 to 3, Apple's layout.

    python examples/train_tiny.py WORK [--out DIRECTORY] [--processes 2] [--steps N]

Each stage has a directory in WORK; an interrupted run resumes when it is started again. The result goes to WORK/tiny
or to --out. On a CPU with few cores, one process per core is faster than one process with as many threads.
benchmarks/tiny_accuracy.py counts its right answers; `make train-tiny` runs both.

The encoder is trained alone first, as FastVLM's comes from CLIP. An untrained encoder and an untrained language model
learn positions together, and then nothing more for a long time.
"""

import argparse
import os
import shutil
import string
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import EvalPrediction, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from transformers_fastvlm import FastViTHDConfig, FastViTHDModel, FastVLMImageProcessorPil
from transformers_fastvlm.checkpoints import convert
from transformers_fastvlm.data.scenes import COLORS, SHAPES, make_collage, make_scene
from transformers_fastvlm.data.scenes.tokenizer import write_tokenizer
from transformers_fastvlm.training import load_recipe, new_model, run, save_model

MODEL_FILES = ("model.safetensors", "config.json", "generation_config.json")
STAGES = ("tiny-stage1", "tiny-stage2", "tiny-stage3")

# 16 tokens an image. The early stages, whose maps are large, are narrow: they are where the time would go.
VISION = {
    "image_size": 256,
    "depths": [1, 1, 2, 3, 1],
    "hidden_sizes": [16, 32, 64, 128, 256],
    "projection_dim": 0,
    "reparameterized": False,
    "layer_scale_init_value": 0.1,
}
# Heads of 32, the smallest that every engine takes. Rows to spare, as in Apple's checkpoints.
LANGUAGE_MODEL = {
    "model_type": "qwen2",
    "vocab_size": 512,
    "hidden_size": 192,
    "intermediate_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "initializer_range": 0.04,
}


# Pre-training of the encoder: half collages, half scenes.
ENCODER_IMAGES = 56_000
ENCODER_BATCH = 16
SCENES = ("attribute", "relation", "count", "number", "word", "chart")
GROUPS = {
    "letters": string.ascii_uppercase,
    "digits": string.digits,
    "colors": COLORS,
    "shapes": SHAPES,
    "bars": [f"bar {value}" for value in range(1, 7)],
    "places": ["top", "middle", "bottom", "left", "center", "right"],
}
LABELS = {label: number for number, label in enumerate(label for group in GROUPS.values() for label in group)}


class MarkFinder(nn.Module):
    """An encoder with heads that predict what each quarter of a feature's square shows.

    Earlier stages have heads too, so that they get a gradient before the last stages are trained (Deeply-Supervised
    Nets, arXiv 1409.5185).

    Args:
        encoder: the encoder to train.
    """

    def __init__(self, encoder: FastViTHDModel) -> None:
        super().__init__()
        self.encoder = encoder
        *_, third, fourth, _ = encoder.config.hidden_sizes
        self.heads = nn.ModuleList(
            nn.Conv2d(width, answers * len(LABELS), 1)
            for width, answers in ((encoder.config.num_features, 4), (fourth, 1), (third, 1))
        )
        for head in self.heads:
            nn.init.zeros_(head.weight)
            nn.init.constant_(head.bias, -6.0)  # nearly always the answer is no

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        outputs = self.encoder(pixel_values, output_hidden_states=True)
        last, fourth, third = self.heads
        logits = nn.functional.pixel_shuffle(last(outputs.last_hidden_state), 2)
        answers = [logits]
        for head, maps in ((fourth, outputs.hidden_states[-2]), (third, outputs.hidden_states[-3])):
            maps = nn.functional.adaptive_avg_pool2d(maps, labels.shape[2:])
            answers.append(head(nn.functional.layer_norm(maps.movedim(1, 3), maps.shape[1:2]).movedim(3, 1)))
        losses = [nn.functional.binary_cross_entropy_with_logits(one, labels, reduction="none") for one in answers]
        loss = sum(one.sum((1, 2, 3)).mean() for one in losses)
        return {"loss": loss, "logits": logits > 0}


class Images(Dataset):
    """Collages and scenes in turn, as pixel values and the labels of `MarkFinder`: `(labels, rows, columns)`, 0 or 1.

    Args:
        length: number of images.
        seed: series of the images.
    """

    def __init__(self, length: int, seed: int) -> None:
        self.length, self.seed = length, seed
        self.image_processor = FastVLMImageProcessorPil(size=VISION["image_size"])

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        scene = make_collage(self.seed, index) if index % 2 else make_scene(self.seed, index, SCENES)
        width, height = scene.image.size
        side, slots = max(width, height), VISION["image_size"] // 32
        labels = torch.zeros(len(LABELS), slots, slots)
        for mark in scene.marks:
            x, y = (0.5 + (share - 0.5) * length / side for share, length in ((mark.x, width), (mark.y, height)))
            labels[[LABELS[label] for label in mark.labels], int(y * slots), int(x * slots)] = 1
        pixel_values = self.image_processor(scene.image, return_tensors="pt").pixel_values[0]
        return {"pixel_values": pixel_values, "labels": labels}


def found(prediction: EvalPrediction) -> dict[str, float]:
    """Return the share of right ones among what was there or was said to be there, by group of labels."""
    said, there = torch.as_tensor(prediction.predictions).bool(), torch.as_tensor(prediction.label_ids).bool()
    both, either = ((said & there).sum((0, 2, 3)), (said | there).sum((0, 2, 3)))
    numbers = {name: [LABELS[label] for label in group] for name, group in GROUPS.items()}
    return {name: round(float(both[group].sum() / either[group].sum()), 3) for name, group in numbers.items()}


def pretrain_encoder(work: Path, steps: int) -> Path:
    """Train an encoder to say what is where and return its directory."""
    out = work / "encoder"
    if (out / "config.json").exists():
        return out
    torch.manual_seed(0)
    model = MarkFinder(FastViTHDModel(FastViTHDConfig(**VISION)))
    arguments = TrainingArguments(
        output_dir=str(work / "encoder-checkpoints"),
        per_device_train_batch_size=ENCODER_BATCH,
        per_device_eval_batch_size=64,
        max_steps=steps,
        learning_rate=8e-3,
        adam_beta2=0.98,
        weight_decay=0.05,
        max_grad_norm=5.0,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": int(0.4 * steps), "min_lr_ratio": 0.02},
        warmup_steps=50,
        logging_steps=50,
        eval_strategy="steps",
        eval_steps=250,
        save_steps=500,
        save_total_limit=1,
        dataloader_num_workers=1,
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=torch.accelerator.is_available(),
        report_to="none",
    )
    images = Images(steps * ENCODER_BATCH, seed=4), Images(256, seed=10)
    trainer = Trainer(model, arguments, train_dataset=images[0], eval_dataset=images[1], compute_metrics=found)
    begun = Path(arguments.output_dir).is_dir() and get_last_checkpoint(arguments.output_dir) is not None
    trainer.train(resume_from_checkpoint=begun)
    model.encoder.save_pretrained(out)
    return out


def train(work: Path, processes: int = 1, steps: int | None = None) -> Path:
    """Run what is not there yet and return the directory of the last stage.

    Args:
        work: directory for everything on the way.
        processes: how many share each batch of the stages, on CPUs; a divisor of 16.
        steps: ends each part after so many.
    """
    previous = work / "new"
    if not previous.exists():
        write_tokenizer(work / "tokenizer")
        encoder = pretrain_encoder(work, steps or ENCODER_IMAGES // ENCODER_BATCH)
        save_model(*new_model(encoder, LANGUAGE_MODEL, work / "tokenizer"), previous)
    for stage in STAGES:
        out = work / stage
        if not (out / "config.json").exists():
            changes = [f"model.path={previous}", f"output_dir={out}"]
            if steps:
                changes.append(f"arguments.max_steps={steps}")
            if processes == 1:
                run(load_recipe(stage, changes), resume=True, report=print)
            else:
                changes.append(f"arguments.per_device_train_batch_size={16 // processes}")
                launch(stage, changes, processes)
        previous = out
    return previous


def launch(stage: str, changes: list[str], processes: int) -> None:
    """Run a stage on several processes, which each with its share of the cores."""
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["-m", "transformers_fastvlm", "train", stage, *changes, "--resume"]
    subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, check=True)


def export(trained: Path, tokenizer: Path, out: Path) -> None:
    """Write the files of a checkpoint laid out as Apple's: the weights, two configurations, Qwen2's tokenizer files."""
    with tempfile.TemporaryDirectory() as folder:
        made = convert(trained, Path(folder) / "apple", "apple").directory
        out.mkdir(parents=True, exist_ok=True)
        for file in (*(made / name for name in MODEL_FILES), *tokenizer.iterdir()):
            shutil.copyfile(file, out / file.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("work", type=Path, help="directory for intermediate results")
    parser.add_argument("--out", type=Path, help="directory of the result")
    parser.add_argument("--processes", type=int, default=1, help="processes for the stages, a divisor of 16")
    parser.add_argument(
        "--steps", type=int, help="end each part after this many, for a quick try; the result is useless"
    )
    options = parser.parse_args()
    if options.processes < 1 or 16 % options.processes:
        parser.error(f"--processes is {options.processes}; expected a divisor of 16, the size of a batch.")
    torch.manual_seed(0)
    trained = train(options.work, options.processes, options.steps)
    out = options.out or options.work / "tiny"
    export(trained, options.work / "tokenizer", out)
    print(f"the tiny model: {out}")


if __name__ == "__main__":
    main()
